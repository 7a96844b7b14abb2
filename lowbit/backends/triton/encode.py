"""What the kernels that choose codes share: magnitudes, the search for the nearest code, and packing.

The rank of x among the 15 sorted midpoints takes four comparisons: each chooses what the next compares with, by
selections of constants. No branch, and nothing is looked up in memory.
"""

import triton
import triton.language as tl

from ... import format as fmt

_MIDPOINTS, _CODE_OF_RANK, _VALUE_OF_RANK = {}, {}, {}
for _format in fmt.CODEBOOKS:
    _midpoints, _codes = fmt.thresholds(_format)
    _MIDPOINTS[_format] = tuple(_midpoints.tolist())
    _CODE_OF_RANK[_format] = tuple(_codes.tolist())
    _VALUE_OF_RANK[_format] = tuple(fmt.codebook(_format)[_codes.int()].tolist())
_TABLES = tl.constexpr({"midpoint": _MIDPOINTS, "code": _CODE_OF_RANK, "value": _VALUE_OF_RANK})
TINY_ABSMAX = tl.constexpr(fmt.TINY_ABSMAX)


@triton.constexpr_function
def _entry(table, format, index):
    return _TABLES.value[table][format][index]


@triton.constexpr_function
def _is_sorted(format):
    """Whether a rank is its own code."""
    return _TABLES.value["code"][format] == tuple(range(16))


@triton.constexpr_function
def _codes_of_8_ranks(format, first):
    """Their codes as the nibbles of an int32, the first rank's lowest."""
    word = sum(code << 4 * i for i, code in enumerate(_TABLES.value["code"][format][first : first + 8]))
    return word - (1 << 32) if word >> 31 else word


@triton.jit
def _one_of_4(bit1, bit0, TABLE: tl.constexpr, FORMAT: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """The entry FIRST + STEP * (2 * bit1 + bit0)."""
    return tl.where(
        bit1,
        tl.where(bit0, _entry(TABLE, FORMAT, FIRST + 3 * STEP), _entry(TABLE, FORMAT, FIRST + 2 * STEP)),
        tl.where(bit0, _entry(TABLE, FORMAT, FIRST + STEP), _entry(TABLE, FORMAT, FIRST)),
    )


@triton.jit
def _one_of_8(bit2, bit1, bit0, TABLE: tl.constexpr, FORMAT: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    # Not two calls of _one_of_4: Triton's interpreter takes its time over each call.
    return tl.where(
        bit2,
        tl.where(
            bit1,
            tl.where(bit0, _entry(TABLE, FORMAT, FIRST + 7 * STEP), _entry(TABLE, FORMAT, FIRST + 6 * STEP)),
            tl.where(bit0, _entry(TABLE, FORMAT, FIRST + 5 * STEP), _entry(TABLE, FORMAT, FIRST + 4 * STEP)),
        ),
        tl.where(
            bit1,
            tl.where(bit0, _entry(TABLE, FORMAT, FIRST + 3 * STEP), _entry(TABLE, FORMAT, FIRST + 2 * STEP)),
            tl.where(bit0, _entry(TABLE, FORMAT, FIRST + STEP), _entry(TABLE, FORMAT, FIRST)),
        ),
    )


@triton.jit
def rank_bits(x, FORMAT: tl.constexpr):
    """How many midpoints fp32 ``x`` is above (NaN: none), as four truth values, the highest bit first."""
    bit3 = x > _entry("midpoint", FORMAT, 7)
    bit2 = x > tl.where(bit3, _entry("midpoint", FORMAT, 11), _entry("midpoint", FORMAT, 3))
    bit1 = x > _one_of_4(bit3, bit2, "midpoint", FORMAT, 1, 4)
    bit0 = x > _one_of_8(bit3, bit2, bit1, "midpoint", FORMAT, 0, 2)
    return bit3, bit2, bit1, bit0


@triton.jit
def nearest_value(x, FORMAT: tl.constexpr):
    """The codebook's value that the code of fp32 ``x`` stands for."""
    bit3, bit2, bit1, bit0 = rank_bits(x, FORMAT)
    return tl.where(
        bit3,
        _one_of_8(bit2, bit1, bit0, "value", FORMAT, 8, 1),
        _one_of_8(bit2, bit1, bit0, "value", FORMAT, 0, 1),
    )


@triton.jit
def code_of(x, FORMAT: tl.constexpr):
    """The code, int32, of fp32 ``x`` in units of its block's scale."""
    bit3, bit2, bit1, bit0 = rank_bits(x, FORMAT)
    rank = (bit2.to(tl.int32) * 4 + bit1.to(tl.int32) * 2) + bit0.to(tl.int32)
    if _is_sorted(FORMAT):
        return rank + bit3.to(tl.int32) * 8
    else:
        codes = tl.where(bit3, _codes_of_8_ranks(FORMAT, 8), _codes_of_8_ranks(FORMAT, 0))
        return (codes >> (4 * rank)) & 15


@triton.jit
def encode_pairs(x, FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32 ``x`` [ROWS, COLUMNS] to packed uint8 [ROWS, COLUMNS // 2]."""
    high, low = tl.split(tl.reshape(code_of(x, FORMAT), [ROWS, COLUMNS // 2, 2]))
    return (high << 4 | low).to(tl.uint8)


@triton.jit
def largest_magnitude(x):
    """fp32 [rows, columns] to the largest |x| of each row. As integers, which puts NaN on top."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def raised(absmax):
    """absmax, or 1e-38 if that is more; NaN stays."""
    return tl.where(absmax < TINY_ABSMAX, TINY_ABSMAX, absmax)
