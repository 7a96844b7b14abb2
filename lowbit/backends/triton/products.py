"""What the products share: the order of tiles, the expert that a tile is of, LoRA, and the sums of splits."""

import torch
import triton
import triton.language as tl

from . import INTERPRETED
from .decode import round_to
from .launch import launch
from .operands import Weight
from .shapes import FACTOR_PROGRAMS, FACTOR_TILE, SUM_TILE, WARPS, ceil_div

_INTERPRETED = tl.constexpr(INTERPRETED)
#: So many tiles of rows are numbered one after the other for the same columns. Their programs run at the same time, and
#: all but the first read W from the L2 cache.
_BAND = tl.constexpr(8)
#: A component of a low factor is at most this large; the other factor takes the rest. fp16 ends just below 2^16.
_LARGEST = tl.constexpr(2.0**15)
_OF_LARGEST = tl.constexpr(2.0**-15)


@triton.jit
def tile_position(tile, row_tiles, column_tiles):
    """Return (row tile, column tile) of tile number ``tile``."""
    band = tile // (_BAND * column_tiles) * _BAND
    rows = tl.minimum(row_tiles - band, _BAND)
    within = tile % (_BAND * column_tiles)
    return band + within % rows, within // rows


@triton.jit
def expert_of_tile(row_tile, expert_ends, experts, m, TILE_M: tl.constexpr, EXPERTS: tl.constexpr):
    """Return (expert, its first row in the tile, the end of its rows). An expert of ``experts`` or more: no such tile.

    Each expert's rows are cut into tiles of TILE_M of their own, so one without rows has none. Only the device knows
    how many there are in all: ceil(m / TILE_M) + experts are enough. EXPERTS: ``experts`` or more, a power of two.
    Ends that are out of order or past the ``m`` rows leave rows out, but nothing is read or written past them.
    """
    index = tl.arange(0, EXPERTS)
    ends = tl.load(expert_ends + index, mask=index < experts, other=0)
    begins = tl.load(expert_ends + index - 1, mask=(index < experts) & (index > 0), other=0)
    ends = tl.minimum(tl.maximum(ends, 0), m)
    begins = tl.minimum(tl.maximum(begins, 0), m)
    tiles = tl.cdiv(tl.maximum(ends - begins, 0), TILE_M)
    last_tile = tl.cumsum(tl.where(index < experts, tiles, 0), 0)
    before = last_tile <= row_tile
    expert = tl.sum(before.to(tl.int32), 0)
    first_tile = tl.max(tl.where(before, last_tile, 0), 0)
    begin = tl.sum(tl.where(index == expert, begins, 0), 0)
    end = tl.sum(tl.where(index == expert, ends, 0), 0)
    return expert, begin.to(tl.int64) + (row_tile - first_tile).to(tl.int64) * TILE_M, end


@triton.jit
def dot(a, b, total, TRANSPOSED: tl.constexpr = False):
    """Return total + a b^T (TRANSPOSED: a^T b^T), summed in fp32.

    Triton's interpreter would multiply the bits of bf16 as integers.
    """
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(tl.trans(a) if TRANSPOSED else a, tl.trans(b), total, input_precision="ieee")


@triton.jit
def rest_of(values, high):
    """Return values - high of fp32 ``values`` and the rounded ones; 0 beside an infinity, where it would be a NaN."""
    high = high.to(tl.float32)
    return tl.where(high - high == 0, values - high, 0.0)


@triton.jit
def _in_three_bf16(values):
    """Return (high, low, high without infinities): |values - high - low| <= 2^-16 |values|.

    An infinity has no low part, and a factor whose low part is 0 must not make NaN of it.
    """
    high = round_to(values, tl.bfloat16)
    whole = high.to(tl.float32)
    finite = whole - whole == 0
    low = round_to(tl.where(finite, values - whole, 0.0), tl.bfloat16)
    return high, low, round_to(tl.where(finite, whole, 0.0), tl.bfloat16)


@triton.jit
def _in_two_bf16(values):
    """Return (high, low), the same two for every product: an infinity or NaN is the low one, beside 1.

    The third does not fit the registers next to 128 rows of grad; with these two ptxas spills in linear's int8 tiles.
    """
    high = round_to(values, tl.bfloat16).to(tl.float32)
    held = high - high == 0
    low = tl.where(held, values - high, values)
    high = tl.where(held, high, tl.clamp(values, -1.0, 1.0))
    return round_to(high, tl.bfloat16), round_to(low, tl.bfloat16)


@triton.jit
def add_lora(a, b, total, DTYPE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return :func:`dot` of fp32 factors.

    Next to 16-bit DTYPEs the factors are sums of two bf16, and low times low is left out, 2^-16 of a product. (fp16's
    range would not hold the low parts of small numbers.)
    """
    if DTYPE == tl.float32:
        return dot(a, b, total, TRANSPOSED)
    else:
        if TRANSPOSED:
            a_high, a_low = _in_two_bf16(a)
            b_high, b_low = _in_two_bf16(b)
            a_beside, b_beside = a_high, b_high
        else:
            a_high, a_low, a_beside = _in_three_bf16(a)
            b_high, b_low, b_beside = _in_three_bf16(b)
        total = dot(a_low, b_beside, total, TRANSPOSED)
        total = dot(a_beside, b_low, total, TRANSPOSED)
        return dot(a_high, b_high, total, TRANSPOSED)


@triton.jit
def sum_splits_kernel(shares, y, numel, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Write y, the sum of the shares [SPLITS, numel] in order: bits do not depend on which program was first."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < numel
    total, share = tl.zeros((TILE,), tl.float32), shares + at
    for _ in range(SPLITS):
        total += tl.load(share, mask=mask, other=0.0)
        share += numel
    tl.store(y + at, round_to(total, y.dtype.element_ty), mask=mask)


def shares_of(y: torch.Tensor, splits: int) -> torch.Tensor:
    """Return what the programs of a product write: y, or fp32 [splits, *y.shape] for :func:`add_shares`."""
    return y if splits == 1 else y.new_empty([splits, *y.shape], dtype=torch.float32)


def add_shares(shares: torch.Tensor, y: torch.Tensor) -> None:
    """Write the sum of the shares to y, rounded to its dtype. There is nothing to do where y is the only share."""
    if shares is not y:
        grid, options = (ceil_div(y.numel(), SUM_TILE),), {"TILE": SUM_TILE, "num_warps": WARPS}
        launch(sum_splits_kernel, grid, shares, y, y.numel(), SPLITS=shares.shape[0], **options)


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
    """Round one component of the rank, every num_programs(1)-th tile of rows of each factor. up_out is laid out as up.

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
    """Return (low [m, rank], up [n, rank]) in ``dtype``; their product low up^T is scaling times that of the given.

    low is contiguous; up, as given and as returned, may be the transpose of what is. Only fp16 has too small a range
    for low, whose size is x's or the loss scale's: there the other factor, which is small, takes over what of it is
    beyond 2^15, and a large scaling. One small kernel does it.
    """
    if scaling == 1 and dtype != torch.float16 and low.dtype == up.dtype == dtype:
        return low, up
    (m, rank), n = low.shape, up.shape[0]
    low_out = low.new_empty([m, rank], dtype=dtype)
    up_out = up.new_empty_strided(up.shape, up.stride(), dtype=dtype)
    sizes, options = (m, n, rank, *up.stride()), {"TILE": FACTOR_TILE, "num_warps": WARPS}
    grid = (rank, max(1, min(FACTOR_PROGRAMS // rank, ceil_div(n, FACTOR_TILE))))
    moves = dtype == torch.float16
    launch(rounded_factors_kernel, grid, low, up, low_out, up_out, float(scaling), *sizes, MOVES=moves, **options)
    return low_out, up_out


def decoded_product(x, weight: Weight, shape, is_transposed: bool, low, up, scaling=1.0, bias=None) -> torch.Tensor:
    """Return torch's product of x and W^T (``is_transposed``) or W, of ``shape``, plus scaling low up^T and the bias.

    LoRA's product comes first: torch then adds it in its sums.
    """
    addend = None if bias is None else bias.to(x.dtype)
    if low is not None:
        low, up = rounded_factors(low, up, x.dtype, scaling)
        addend = low @ up.T if addend is None else torch.addmm(addend, low, up.T)
    matrix = torch.ops.lowbit_triton.dequantize.default(*weight.arguments(), shape, x.dtype)
    matrix = matrix.T if is_transposed else matrix
    return x @ matrix if addend is None else torch.addmm(addend, x, matrix)
