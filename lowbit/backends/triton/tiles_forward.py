"""Tiles of x W^T for a stack of matrices, transposed as in ``tiles_backward.py``: W x^T, W from registers."""

import triton
import triton.language as tl

from .decode import decode_codes, decode_scales
from .tiles_backward import add_product, columns_per_byte, transposed_dot


@triton.jit
def _decoded(
    codes, FORMAT: tl.constexpr, DTYPE: tl.constexpr, PORTABLE: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr
):
    """Codebook's values (int8: codes, which 16 bits hold) of ``codes`` [TILE_N, bytes], in DTYPE [TILE_N, TILE_K]."""
    if FORMAT == "int8":
        return codes.to(tl.int8, bitcast=True).to(tl.float32).to(DTYPE)
    else:
        high, low = decode_codes(codes, FORMAT, DTYPE, PORTABLE)
        return tl.reshape(tl.join(high, low), (TILE_N, TILE_K))


@triton.jit
def contract_columns(
    x,
    rows,  # int64 [TILE_M]: of x, all valid
    x_stride,
    packed,  # points to the matrix
    absmax,
    group_scales,
    offset,
    scale_map,
    matrix_block,  # number of the matrix's first block
    n,  # int64 [TILE_N]: rows of W, all valid
    in_features,
    row_bytes,
    row_blocks,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    DTYPE: tl.constexpr,
    PORTABLE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """W x^T, fp32 [TILE_N, TILE_M]. A tile lies in one block of each row: scales multiply sums, in fp32."""
    BYTES: tl.constexpr = TILE_K // columns_per_byte(FORMAT)
    total = tl.zeros((TILE_N, TILE_M), tl.float32)
    first_block = matrix_block + n * row_blocks
    for pair in range(0, in_features, 2 * TILE_K):
        # Two steps, because Triton gives all warps other rows of W only where it sees a second product: with one it
        # lets two warps decode the same weights.
        for step in tl.static_range(2):
            start = pair + step * TILE_K
            k = start + tl.arange(0, TILE_K)
            byte = start // columns_per_byte(FORMAT) + tl.arange(0, BYTES)
            codes = tl.load(packed + n[:, None] * row_bytes + byte[None, :], mask=byte[None, :] < row_bytes, other=0)
            operand = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=k[None, :] < in_features, other=0.0)
            weight = _decoded(codes, FORMAT, DTYPE, PORTABLE, TILE_N, TILE_K)
            if FORMAT == "int8":
                total = transposed_dot(tl.trans(weight), operand, total)
            else:
                scale = decode_scales(
                    absmax,
                    group_scales,
                    offset,
                    scale_map,
                    first_block + start // BLOCK_SIZE,
                    tl.zeros_like(n) + start < in_features,
                    DOUBLE_QUANT,
                )
                part = transposed_dot(tl.trans(weight), operand, tl.zeros((TILE_N, TILE_M), tl.float32))
                total = tl.fma(part, tl.broadcast_to(scale[:, None], (TILE_N, TILE_M)), total)
    if FORMAT == "int8":
        total *= (tl.load(absmax + first_block) * (1 / 127))[:, None]
    return total


@triton.jit
def add_lora_forward(
    total,
    rows,  # int64 [TILE_M]: of t, all valid
    n,  # int64 [TILE_N]: of lora_b, all valid
    t,
    t_row,
    t_column,
    lora_b,  # points to the matrix
    lora_b_row,
    lora_b_column,
    rank,
    scaling,
    DTYPE: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """total + scaling * lora_b t^T."""
    for start in tl.range(0, rank, TILE_R, num_stages=1):
        r = start + tl.arange(0, TILE_R).to(tl.int64)
        b = tl.load(t + rows[:, None] * t_row + r[None, :] * t_column, mask=r[None, :] < rank, other=0.0)
        a = tl.load(lora_b + n[None, :] * lora_b_row + r[:, None] * lora_b_column, mask=r[:, None] < rank, other=0.0)
        total = add_product(a.to(tl.float32), b.to(tl.float32) * scaling, total, DTYPE)
    return total
