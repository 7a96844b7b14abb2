"""LoRA's two factors, rounded for torch's product in 16 bits after W was decoded: one small kernel."""

import torch
import triton
import triton.language as tl

from .grid import ceil_div
from .launch import launch
from .rounding import round_to

#: Rows of a factor that a program takes at a time.
_TILE = 1024
#: So many programs, where the rank is less, keep enough loads on their way; more would each read all of low.
_PROGRAMS = 128
#: Of a component of low, what is beyond the largest goes to up. fp16 ends just below 2^16.
_LARGEST = tl.constexpr(2.0**15)
_OF_LARGEST = tl.constexpr(2.0**-15)


@triton.jit(do_not_specialize=["m"])  # it changes from call to call
def rounded_factors_kernel(
    low,
    up,
    low_out,
    up_out,
    scaling,
    m,
    n,
    rank,
    up_row_stride,
    up_component_stride,
    MOVES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One component of the rank, every num_programs(1)-th tile of rows of each factor; up_out lies as up does.

    MOVES: up takes over what of the component is beyond 2^15, and a large scaling.
    """
    component, first_row, step = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE, tl.num_programs(1) * TILE
    low += component
    low_out += component
    up += component * up_component_stride
    up_out += component * up_component_stride
    tile = tl.arange(0, TILE)
    moved = tl.full([TILE], 1.0, tl.float32)
    if MOVES:
        # What is not finite stays so in its own row, and does not count for the others.
        largest = tl.zeros([TILE], tl.float32)
        for first in range(0, m, TILE):
            row = first + tile
            at = row.to(tl.int64) * rank
            magnitude = tl.abs(tl.load(low + at, mask=row < m, other=0.0).to(tl.float32) * scaling)
            largest = tl.maximum(largest, tl.where(magnitude < float("inf"), magnitude, 0.0))
        # At most 2^15: up, below 2 in any LoRA, would be infinite for all rows because of one far beyond fp16.
        least = tl.maximum(tl.abs(moved * scaling), 1.0)
        moved = tl.minimum(tl.maximum(tl.max(largest, 0) * _OF_LARGEST, least), _LARGEST)
    for first in range(first_row, m, step):
        row = first + tile
        at = row.to(tl.int64) * rank
        values = tl.load(low + at, mask=row < m, other=0.0).to(tl.float32) * scaling
        if MOVES:
            values = tl.div_rn(values, moved)
        tl.store(low_out + at, round_to(values, low_out.dtype.element_ty), mask=row < m)
    for first in range(first_row, n, step):
        row = first + tile
        at = row.to(tl.int64) * up_row_stride
        values = tl.load(up + at, mask=row < n, other=0.0).to(tl.float32) * moved
        tl.store(up_out + at, round_to(values, up_out.dtype.element_ty), mask=row < n)


def rounded_factors(
    low: torch.Tensor, up: torch.Tensor, dtype: torch.dtype, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(low [m, rank], up [n, rank]) in ``dtype``, whose product low up^T is scaling times that of the given ones.

    low is contiguous; up, as given and as returned, may be the transpose of what is. Only fp16 has too small a range
    for low, whose size is x's or the loss scale's: there the other factor, which is small, takes over what of it is
    beyond 2^15, and a large scaling.
    """
    if scaling == 1 and dtype != torch.float16 and low.dtype == up.dtype == dtype:
        return low, up
    (m, rank), n = low.shape, up.shape[0]
    low_out = low.new_empty([m, rank], dtype=dtype)
    up_out = up.new_empty_strided(up.shape, up.stride(), dtype=dtype)
    launch(
        rounded_factors_kernel,
        (rank, max(1, min(_PROGRAMS // rank, ceil_div(n, _TILE)))),
        low,
        up,
        low_out,
        up_out,
        float(scaling),
        m,
        n,
        rank,
        *up.stride(),
        MOVES=dtype == torch.float16,
        TILE=_TILE,
        num_warps=4,
    )
    return low_out, up_out
