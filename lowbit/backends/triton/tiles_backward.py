"""Tiles of grad W, for one matrix and for a stack of them: what ``linear_grad_input`` and ``grouped`` share.

The product is made transposed, W^T grad^T: W is the tensor cores' A operand, which they take from registers (wgmma
on sm_90 as well as mma.sync), and warps divide its columns among themselves, so that each weight is decoded once.
A's rows are columns of W, and their order is free. The two nibbles of a byte therefore go to two accumulators, even
columns and odd ones, joined at the end. Within each, rows are numbered so that a lane's columns are neighbours in
memory (``_to_lanes``): one load from shared memory brings them, after 16-byte copies to there. Decoded weights stay
in registers. Triton moves what lies in bytes with 3.5 byte permutations for each 4 bytes, where 2 would do.

A weight's scale changes along the contraction: it cannot wait for the sum. It goes into the decoded weight, by two
packed FMAs for two weights, with the scale as a sum of two 16-bit numbers: one instruction a weight. Scaling in fp32
would take 2.5 (unpack, multiply, pack), a table of fp32 values 3.4; scaling grad instead takes as many as there are
rows of grad for each 1/(columns in a block), and a tile within one block of columns.
"""

import torch
import triton
import triton.language as tl

from ... import format as fmt
from . import INTERPRETED
from .decode import _value_bytes, decode_codes, decode_scales
from .rounding import round_to

_INTERPRETED = tl.constexpr(INTERPRETED)


def _scaled_asm(format: str, dtype: torch.dtype) -> str:
    """As ``decode._lookup_asm`` for 16 bits, each value times its element's scale, the sum of two operands.

    value * (high + low) = fma(value, high, value * low): the inner rounding is 2^-16 of the result and less.
    """
    values, kind = _value_bytes(format, dtype), "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    lines = ["{", ".reg .b32 codes, index, upper, a, b, p0, p1, shifted, minus_zero;", "shl.b32 shifted, $4, 4;"]
    lines.append("mov.b32 minus_zero, 0x80008000;")  # bf16x2 has no product without a sum before sm_90
    for half in (0, 1):  # as there: nibbles low, high, low, high
        lines.append(f"shr.u32 codes, $4, {16 * half};")
        lines.append("and.b32 index, codes, 0x7777;")
        lines.append(f"prmt.b32 upper, $4, shifted, {0xBFAE if half else 0x9D8C:#x};")
        for byte in (0, 1):
            table = [
                int.from_bytes(bytes(values[code][byte] for code in range(c, c + 4)), "little") for c in (0, 4, 8, 12)
            ]
            lines.append(f"prmt.b32 a, {table[0]:#010x}, {table[1]:#010x}, index;")
            lines.append(f"prmt.b32 b, {table[2]:#010x}, {table[3]:#010x}, index;")
            lines.append(f"lop3.b32 p{byte}, upper, b, a, 0xca;")
        for result, order in ((half, 0x7351), (2 + half, 0x6240)):
            lines.append(f"prmt.b32 a, p0, p1, {order:#x};")
            lines.append(f"fma.rn.{kind} b, a, ${7 + half}, minus_zero;")
            lines.append(f"fma.rn.{kind} ${result}, a, ${5 + half}, b;")
    return "\n".join([*lines, "}"])


_ASM = tl.constexpr(
    {
        (format, name): _scaled_asm(format, dtype)
        for format in fmt.CODEBOOKS
        for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16))
    }
)


@triton.constexpr_function
def _asm(format, dtype):
    return _ASM.value[format, str(dtype)]


@triton.constexpr_function
def _both(dtype):
    return (dtype, dtype)


@triton.constexpr_function
def columns_per_byte(format):
    return 1 if format == "int8" else 2


@triton.constexpr_function
def _blocks_in(columns, block_size, format):
    return 1 if format == "int8" else max(1, columns // block_size)


@triton.jit
def _to_lanes(tile, ROWS: tl.constexpr, BYTES: tl.constexpr, WARPS: tl.constexpr):
    """[ROWS, BYTES] with its columns in the order that ``contract_rows`` computes them in.

    In the A operand of mma.sync and wgmma lane 4 g + q of a warp holds rows g and g + 8 of each 16: row number bits
    (from the highest) are (repetition, warp, half, g), of which repetition and half are one lane's.
    """
    REPEATS: tl.constexpr = BYTES // (16 * WARPS)
    tile = tl.permute(tl.reshape(tile, (ROWS, WARPS, 8, REPEATS, 2)), (0, 3, 1, 4, 2))
    return tl.reshape(tile, (ROWS, BYTES))


@triton.jit
def _from_lanes(tile, ROWS: tl.constexpr, BYTES: tl.constexpr, WARPS: tl.constexpr):
    REPEATS: tl.constexpr = BYTES // (16 * WARPS)
    tile = tl.permute(tl.reshape(tile, (ROWS, REPEATS, WARPS, 2, 8)), (0, 2, 4, 1, 3))
    return tl.reshape(tile, (ROWS, BYTES))


@triton.jit
def _over_columns(scale, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BYTES: tl.constexpr, WARPS: tl.constexpr):
    """[ROWS, BLOCKS] repeated for each byte of the blocks."""
    scale = tl.broadcast_to(scale[:, :, None], (ROWS, BLOCKS, BYTES // BLOCKS))
    return _to_lanes(tl.reshape(scale, (ROWS, BYTES)), ROWS, BYTES, WARPS)


@triton.jit
def rest_of(values, high):
    """What fp32 ``values`` have beyond ``high``, their rounded ones; 0 beside an infinity (which would make a NaN)."""
    high = high.to(tl.float32)
    return tl.where(high - high == 0, values - high, 0.0)


@triton.jit
def transposed_dot(a, b, total):
    """total + a^T b^T, summed in fp32. Triton's interpreter would multiply the bits of bf16 as integers."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(tl.trans(a), tl.trans(b), total, input_precision="ieee")


@triton.jit
def contract_rows(
    grad,  # points to the first row's
    rows,  # int64 [TILE_M]: of grad, all valid
    grad_stride,
    packed,  # points to the matrix
    absmax,
    group_scales,
    offset,
    scale_map,
    matrix_block,  # number of the matrix's first block
    first,
    end,  # of the rows of W to sum over
    out_features,
    row_bytes,
    row_blocks,
    column_tile,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    DTYPE: tl.constexpr,
    PORTABLE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BYTES: tl.constexpr,
    WARPS: tl.constexpr,
):
    """W^T grad^T for one tile: two fp32 [BYTES, TILE_M], of even and odd columns (int8: all of them, and zeros)."""
    high_sum = tl.zeros((BYTES, TILE_M), tl.float32)
    low_sum = tl.zeros((BYTES, TILE_M), tl.float32)
    BLOCKS: tl.constexpr = _blocks_in(BYTES * columns_per_byte(FORMAT), BLOCK_SIZE, FORMAT)
    column_byte = column_tile * BYTES + tl.arange(0, BYTES)
    first_block = 0 if FORMAT == "int8" else column_tile * BYTES * 2 // BLOCK_SIZE
    block = first_block + tl.arange(0, BLOCKS)
    for start in range(first, end, TILE_N):
        n = start + tl.arange(0, TILE_N)
        n64 = n.to(tl.int64)
        # Masked rows and columns weigh 0, whatever they hold.
        mask = (n[:, None] < out_features) & (column_byte[None, :] < row_bytes)
        codes = tl.load(packed + n64[:, None] * row_bytes + column_byte[None, :], mask=mask, other=0)
        operand = tl.load(grad + rows[:, None] * grad_stride + n[None, :], mask=n[None, :] < out_features, other=0.0)
        scale = decode_scales(
            absmax,
            group_scales,
            offset,
            scale_map,
            matrix_block + n64[:, None] * row_blocks + block[None, :],
            (n[:, None] < out_features) & (block[None, :] < row_blocks),
            DOUBLE_QUANT,
        )
        codes = _to_lanes(codes, TILE_N, BYTES, WARPS)
        if FORMAT == "int8":
            scale = _over_columns(scale * (1 / 127), TILE_N, BLOCKS, BYTES, WARPS)
            high = round_to(codes.to(tl.int8, bitcast=True).to(tl.float32) * scale, DTYPE)
        elif PORTABLE or DTYPE == tl.float32:
            high, low = decode_codes(codes, FORMAT, tl.float32, PORTABLE)
            scale = _over_columns(scale, TILE_N, BLOCKS, BYTES, WARPS)
            high, low = round_to(high * scale, DTYPE), round_to(low * scale, DTYPE)
        else:
            scale_high = round_to(scale, DTYPE)
            scale_low = rest_of(scale, scale_high).to(DTYPE)
            scale_high = _over_columns(scale_high, TILE_N, BLOCKS, BYTES, WARPS)
            scale_low = _over_columns(scale_low, TILE_N, BLOCKS, BYTES, WARPS)
            high, low = tl.inline_asm_elementwise(
                _asm(FORMAT, DTYPE),
                "=r,=r,=r,=r,r,r,r,r,r",
                [codes, scale_high, scale_low],
                dtype=_both(DTYPE),
                is_pure=True,
                pack=4,
            )
        high_sum = transposed_dot(high, operand, high_sum)
        if FORMAT != "int8":
            low_sum = transposed_dot(low, operand, low_sum)
    return high_sum, low_sum


@triton.jit
def _two_bf16(values):
    """As ``rounding.in_two_bf16``, but two values for every product: an infinity or NaN is the low one, beside 1.

    The third does not fit the registers next to 128 rows of grad; with these two ptxas spills in linear's int8 tiles.
    """
    high = round_to(values, tl.bfloat16).to(tl.float32)
    held = high - high == 0
    low = tl.where(held, values - high, values)
    high = tl.where(held, high, tl.clamp(values, -1.0, 1.0))
    return round_to(high, tl.bfloat16), round_to(low, tl.bfloat16)


@triton.jit
def add_product(a, b, total, DTYPE: tl.constexpr):
    """total + a^T b^T of fp32 factors; next to 16-bit DTYPEs from bf16 parts, which leave out 3 * 2^-16 of it.

    (fp16's range would not hold the low parts of small numbers.)
    """
    if DTYPE == tl.float32:
        return transposed_dot(a, b, total)
    else:
        a_high, a_low = _two_bf16(a)
        b_high, b_low = _two_bf16(b)
        total = transposed_dot(a_low, b_high, total)
        total = transposed_dot(a_high, b_low, total)
        return transposed_dot(a_high, b_high, total)


@triton.jit
def _load_lora_a(lora_a, column, in_features, rank, r, TILE_R: tl.constexpr, BYTES: tl.constexpr, WARPS: tl.constexpr):
    mask = (r[:, None] < rank) & (column[None, :] < in_features)
    a = tl.load(lora_a + r[:, None].to(tl.int64) * in_features + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return _to_lanes(a, TILE_R, BYTES, WARPS)


@triton.jit
def add_lora(
    high_sum,
    low_sum,
    grad_t,  # [rows, rank]
    rows,  # int64 [TILE_M]: of grad_t, all valid
    lora_a,  # points to a matrix [rank, in_features]
    rank,
    summed,
    in_features,
    column_tile,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    BYTES: tl.constexpr,
    WARPS: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """The same accumulators with lora_a^T grad_t^T added, over the first ``summed`` of ``rank`` rows of lora_a."""
    PER_BYTE: tl.constexpr = columns_per_byte(FORMAT)
    column = (column_tile * BYTES + tl.arange(0, BYTES)) * PER_BYTE
    for start in tl.range(0, summed, TILE_R, num_stages=1):
        r = start + tl.arange(0, TILE_R)
        b = tl.load(grad_t + rows[:, None] * rank + r[None, :], mask=r[None, :] < rank, other=0.0).to(tl.float32)
        even = _load_lora_a(lora_a, column, in_features, rank, r, TILE_R, BYTES, WARPS)
        high_sum = add_product(even, b, high_sum, DTYPE)
        if PER_BYTE == 2:
            odd = _load_lora_a(lora_a, column + 1, in_features, rank, r, TILE_R, BYTES, WARPS)
            low_sum = add_product(odd, b, low_sum, DTYPE)
    return high_sum, low_sum


@triton.jit
def in_columns(high_sum, low_sum, FORMAT: tl.constexpr, TILE_M: tl.constexpr, BYTES: tl.constexpr, WARPS: tl.constexpr):
    """The tile of grad W, fp32 [TILE_M, columns], from the two accumulators."""
    high_sum = _from_lanes(tl.trans(high_sum), TILE_M, BYTES, WARPS)
    if FORMAT == "int8":
        return high_sum
    else:
        low_sum = _from_lanes(tl.trans(low_sum), TILE_M, BYTES, WARPS)
        return tl.reshape(tl.join(high_sum, low_sum), (TILE_M, 2 * BYTES))
