"""Tiles of x W^T + scaling t B^T + bias, for one matrix and for a stack of them: what kernels of ``linear.py`` do.

The codebook's values meet x on tensor cores; the sums over BK columns, all of one block, are scaled in fp32. W is the
right operand: on mma.sync the bytes go from shared memory to the registers which the decoded pairs have to be in.
(Joining them is no work: a byte's two codes are neighbours in k.)
"""

import triton
import triton.language as tl

from ... import format as fmt
from . import INTERPRETED
from .decode import decode_codes, load_scales, scales_of
from .rounding import in_two_bf16, round_to

_INTERPRETED = tl.constexpr(INTERPRETED)
_INT8_UNIT = tl.constexpr(1 / fmt.INT8_MAX)


@triton.jit
def _dot(a, b, total):
    """total + a b^T, summed in fp32. Triton's interpreter would multiply the bits of bf16 as integers."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b.T, total, input_precision="ieee")


@triton.jit
def contract_four_bits(
    x_rows,  # pointers [BM, 1]: to the first column
    w_rows,  # pointers [BN, 1]
    block,  # int64 [BN]: number of each row's first block
    absmax,
    group_scales,
    offset,
    scale_map,
    k,
    split,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    DTYPE: tl.constexpr,
    PORTABLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    COPIES: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """x W^T over a share of k, fp32 [BM, BN]. k is a multiple of BLOCK_SIZE and of PRODUCTS * BK, BLOCK_SIZE of BK.

    PRODUCTS of 2: Triton gives each warp rows of W of its own only where it sees a second product; with one it lets two
    warps decode the same weights.
    """
    x_rows += tl.arange(0, BK)[None, :]
    w_rows += tl.arange(0, BK // 2)[None, :]
    STEP: tl.constexpr = PRODUCTS * BK
    steps = tl.cdiv(k // STEP, SPLITS)
    begin = split * steps * STEP
    end = min(begin + steps * STEP, k)
    # Scales of fewer columns than there are threads: COPIES of each, or the compiler would have every thread decode
    # those of all of its sums, instead of one that it passes on.
    block = tl.broadcast_to(block[:, None], (BN, COPIES))
    all_there = block >= 0
    at_first = min(begin, k - BK)  # a last part of k can be empty
    stored, group_scale = load_scales(absmax, group_scales, block + at_first // BLOCK_SIZE, all_there, DOUBLE_QUANT)
    total = tl.zeros((BN, BM) if WEIGHT_FIRST else (BM, BN), tl.float32)
    for first in range(begin, end, STEP):
        for product in tl.static_range(PRODUCTS):
            at = first + product * BK
            codes = tl.load(w_rows + at // 2)
            values = tl.load(x_rows + at)
            scale = tl.max(scales_of(stored, group_scale, offset, scale_map, DOUBLE_QUANT), axis=1)
            # A step ahead: nothing else would hide their way from memory.
            following = block + min(at + BK, end - BK) // BLOCK_SIZE
            stored, group_scale = load_scales(absmax, group_scales, following, all_there, DOUBLE_QUANT)
            high, low = decode_codes(codes, FORMAT, DTYPE, PORTABLE)
            weight = tl.reshape(tl.join(high, low), (BN, BK))
            if WEIGHT_FIRST:
                sums = _dot(weight, values, tl.zeros((BN, BM), tl.float32))
                total = tl.fma(sums, tl.broadcast_to(scale[:, None], (BN, BM)), total)
            else:
                sums = _dot(values, weight, tl.zeros((BM, BN), tl.float32))
                total = tl.fma(sums, tl.broadcast_to(scale[None, :], (BM, BN)), total)
    return total.T if WEIGHT_FIRST else total


@triton.jit
def contract_int8(
    x_rows,  # pointers [BM, 1]: to the first column
    w_rows,  # pointers [BN, 1]
    absmax,  # pointers [BN]
    k,
    split,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The same for int8 codes, which x's 16 bits hold exactly; the sums are scaled by row at the end.

    k may be any; WHOLE: it is a multiple of PRODUCTS * BK.
    """
    x_rows += tl.arange(0, BK)[None, :]
    w_rows += tl.arange(0, BK)[None, :]
    STEP: tl.constexpr = PRODUCTS * BK
    steps = tl.cdiv(tl.cdiv(k, STEP), SPLITS)
    begin = split * steps * STEP
    total = tl.zeros((BN, BM) if WEIGHT_FIRST else (BM, BN), tl.float32)
    for first in range(begin, min(begin + steps * STEP, k), STEP):
        for product in tl.static_range(PRODUCTS):
            at = first + product * BK
            if WHOLE:
                weight = tl.load(w_rows + at)
                values = tl.load(x_rows + at)
            else:
                inside = (at + tl.arange(0, BK) < k)[None, :]
                weight = tl.load(w_rows + at, mask=inside, other=0)
                values = tl.load(x_rows + at, mask=inside, other=0.0)
            weight = weight.to(tl.float32).to(DTYPE)
            total = _dot(weight, values, total) if WEIGHT_FIRST else _dot(values, weight, total)
    return (total.T if WEIGHT_FIRST else total) * (tl.load(absmax) * _INT8_UNIT)[None, :]


@triton.jit
def add_lora(total, t, t_row, lora_b, b_row, scaling, rank, summed, EXACT: tl.constexpr):
    """total + scaling t B^T over the first ``summed`` of ``rank`` columns, of rows (int64) that exist.

    On tensor cores each factor is two bf16; low times low is left out (2^-16 of a product).
    """
    sums = tl.zeros(total.shape, tl.float32)
    for first in tl.range(0, summed, 16, num_stages=1):
        r = first + tl.arange(0, 16)
        mask = (r < rank)[None, :]
        a = tl.load(t + t_row[:, None] * rank + r[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(lora_b + b_row[:, None] * rank + r[None, :], mask=mask, other=0.0).to(tl.float32)
        if EXACT:
            sums = _dot(a, b, sums)
        else:
            a_high, a_low, a_finite = in_two_bf16(a)
            b_high, b_low, b_finite = in_two_bf16(b)
            sums = _dot(a_low, b_finite, sums)
            sums = _dot(a_finite, b_low, sums)
            sums = _dot(a_high, b_high, sums)
    return total + scaling * sums


@triton.jit
def store_tile(y, total, rows, row_end, columns, m, n, split):
    """A tile of y, rounded, or of share ``split`` of its sums in the workspace [splits, m, n]."""
    mask = (rows < row_end)[:, None] & (columns < n)[None, :]
    row = split.to(tl.int64) * m + rows
    tl.store(y + row[:, None] * n + columns[None, :], round_to(total, y.dtype.element_ty), mask=mask)
