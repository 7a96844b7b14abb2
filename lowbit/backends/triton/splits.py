"""The sum of what programs computed of one product, each over a part of its contraction."""

import torch
import triton
import triton.language as tl

from .grid import ceil_div
from .launch import launch
from .rounding import round_to

_TILE = 1024


@triton.jit
def sum_splits_kernel(workspace, y, numel, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """y from the shares [SPLITS, numel], added in order: bits do not depend on which program was first."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < numel
    total, share = tl.zeros((TILE,), tl.float32), workspace + at
    for _ in range(SPLITS):
        total += tl.load(share, mask=mask, other=0.0)
        share += numel
    tl.store(y + at, round_to(total, y.dtype.element_ty), mask=mask)


def add_splits(workspace: torch.Tensor, y: torch.Tensor) -> None:
    """y [...] = the sum of fp32 ``workspace`` [splits, ...], both contiguous, rounded to y's dtype."""
    grid = (ceil_div(y.numel(), _TILE),)
    launch(sum_splits_kernel, grid, workspace, y, y.numel(), SPLITS=workspace.shape[0], TILE=_TILE, num_warps=4)
