"""The sum of what programs computed of one product, each over a part of its contraction."""

import triton
import triton.language as tl

from .rounding import round_to

#: Elements of a program of sum_splits_kernel.
SUM_TILE = 1024


@triton.jit
def sum_splits_kernel(workspace, bias, y, n, numel, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """y [m, n] from the shares [SPLITS, m, n], added in order: bits do not depend on which program was first."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < numel
    total = tl.zeros((TILE,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(workspace + split * numel.to(tl.int64) + at, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, round_to(total, y.dtype.element_ty), mask=mask)
