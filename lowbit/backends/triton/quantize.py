"""Codes and scales of a float weight: quantize (absmax scales and codes), quantize_scales (the scales in 8 bits),
search_scales (per block the signed scale with the least squared error), and encode (codes for given scales).

The rank of x among the 15 sorted midpoints takes four comparisons: each chooses what the next compares with, by
selections of constants. No branch, and nothing is looked up in memory.
"""

import functools

import torch
import triton
import triton.language as tl

from ... import format as fmt
from .decode import CODEBOOKS
from .launch import launch
from .operands import check_float, checked, optional, spec_of
from .shapes import GROUPS_TILE, QUANTIZE_ROWS_TILE, QUANTIZE_TILE, SEARCH_TILE, WARPS, ceil_div, rows_tile

_MIDPOINTS, _CODE_OF_RANK, _VALUE_OF_RANK = {}, {}, {}
for _format in CODEBOOKS:
    _midpoints, _codes = fmt.thresholds(_format)
    _MIDPOINTS[_format] = tuple(_midpoints.tolist())
    _CODE_OF_RANK[_format] = tuple(_codes.tolist())
    _VALUE_OF_RANK[_format] = tuple(fmt.codebook(_format)[_codes.int()].tolist())
_TABLES = tl.constexpr({"midpoint": _MIDPOINTS, "code": _CODE_OF_RANK, "value": _VALUE_OF_RANK})
_TINY_ABSMAX = tl.constexpr(fmt.TINY_ABSMAX)
_GROUP_SIZE = tl.constexpr(fmt.GROUP_SIZE)
_INT8_MAX = tl.constexpr(fmt.INT8_MAX)
#: Added and taken away again it rounds an fp32 number below 2^22 half to even.
_ROUNDING = tl.constexpr(1.5 * 2.0**23)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_FACTORS = tl.constexpr(len(fmt.SCALE_FACTORS))
_LARGEST_SEARCHED = tl.constexpr(fmt.LARGEST_SEARCHED)


@triton.constexpr_function
def _entry(table, format, index):
    return _TABLES.value[table][format][index]


@triton.constexpr_function
def _is_sorted(format):
    """Whether a rank is its own code."""
    return _TABLES.value["code"][format] == tuple(range(16))


@triton.constexpr_function
def _codes_of_8_ranks(format, first):
    """Return the codes of 8 ranks as the nibbles of an int32, the first rank's lowest."""
    word = sum(code << 4 * i for i, code in enumerate(_TABLES.value["code"][format][first : first + 8]))
    return word - (1 << 32) if word >> 31 else word


@triton.jit
def _one_of_4(bit1, bit0, TABLE: tl.constexpr, FORMAT: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Return the entry FIRST + STEP * (2 * bit1 + bit0)."""
    return tl.where(
        bit1,
        tl.where(bit0, _entry(TABLE, FORMAT, FIRST + 3 * STEP), _entry(TABLE, FORMAT, FIRST + 2 * STEP)),
        tl.where(bit0, _entry(TABLE, FORMAT, FIRST + STEP), _entry(TABLE, FORMAT, FIRST)),
    )


@triton.jit
def _one_of_8(bit2, bit1, bit0, TABLE: tl.constexpr, FORMAT: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    # Not two calls of _one_of_4: each call costs time in Triton's interpreter.
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
    """Return how many midpoints fp32 ``x`` is above (NaN: none), as four truth values, the highest bit first."""
    bit3 = x > _entry("midpoint", FORMAT, 7)
    bit2 = x > tl.where(bit3, _entry("midpoint", FORMAT, 11), _entry("midpoint", FORMAT, 3))
    bit1 = x > _one_of_4(bit3, bit2, "midpoint", FORMAT, 1, 4)
    bit0 = x > _one_of_8(bit3, bit2, bit1, "midpoint", FORMAT, 0, 2)
    return bit3, bit2, bit1, bit0


@triton.jit
def nearest_value(x, FORMAT: tl.constexpr):
    """Return the codebook's value that the code of fp32 ``x`` stands for."""
    bit3, bit2, bit1, bit0 = rank_bits(x, FORMAT)
    return tl.where(
        bit3,
        _one_of_8(bit2, bit1, bit0, "value", FORMAT, 8, 1),
        _one_of_8(bit2, bit1, bit0, "value", FORMAT, 0, 1),
    )


@triton.jit
def code_of(x, FORMAT: tl.constexpr):
    """Return the code, int32, of fp32 ``x`` in units of its block's scale."""
    bit3, bit2, bit1, bit0 = rank_bits(x, FORMAT)
    rank = (bit2.to(tl.int32) * 4 + bit1.to(tl.int32) * 2) + bit0.to(tl.int32)
    if _is_sorted(FORMAT):
        return rank + bit3.to(tl.int32) * 8
    else:
        codes = tl.where(bit3, _codes_of_8_ranks(FORMAT, 8), _codes_of_8_ranks(FORMAT, 0))
        return (codes >> (4 * rank)) & 15


@triton.jit
def encode_pairs(x, FORMAT: tl.constexpr):
    """Return packed uint8 [rows, columns // 2] of fp32 ``x`` [rows, columns]."""
    high, low = tl.split(tl.reshape(code_of(x, FORMAT), [x.shape[0], x.shape[1] // 2, 2]))
    return (high << 4 | low).to(tl.uint8)


@triton.jit
def largest_magnitude(x):
    """Return the largest |x| of each row of fp32 [rows, columns], compared as integers, which puts NaN on top."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def raised(absmax):
    """Return absmax, or 1e-38 if that is more; NaN stays."""
    return tl.where(absmax < _TINY_ABSMAX, _TINY_ABSMAX, absmax)


@triton.jit
def quantize_kernel(
    weight,
    packed,
    absmax,
    first_block,
    blocks,
    numel,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Each program quantizes TILE blocks, from ``first_block`` on, of ``blocks`` in all.

    SHORT: only the short last block, by a division where full ones multiply by the reciprocal (the format says so).
    """
    block = first_block + tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    exists = block < blocks
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    mask = element < numel if SHORT else exists[:, None]
    values = tl.load(weight + element, mask=mask, other=0.0).to(tl.float32)
    largest = largest_magnitude(values)
    if SHORT:
        largest = raised(largest)
        scaled = tl.div_rn(values, tl.broadcast_to(largest[:, None], [TILE, BLOCK_SIZE]))
    else:
        scaled = values * tl.div_rn(tl.full([TILE], 1.0, tl.float32), raised(largest))[:, None]
    tl.store(absmax + block, largest, mask=exists)
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    stored = 2 * byte < numel if SHORT else exists[:, None]
    # x is not clamped to [-1, 1]: no code changes beyond the outermost midpoints.
    tl.store(packed + byte, encode_pairs(scaled, FORMAT), mask=stored)


@triton.jit
def quantize_int8_kernel(weight, codes, absmax, rows, columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """Each program quantizes TILE_ROWS rows, TILE_COLUMNS elements of each at a time.

    They are read twice, the second time from the cache.
    """
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    largest = tl.zeros([TILE_ROWS], tl.float32)
    for first in range(0, columns, TILE_COLUMNS):
        column = first + tl.arange(0, TILE_COLUMNS)
        mask = (row[:, None] < rows) & (column[None, :] < columns)
        values = tl.load(weight + row[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
        found = largest_magnitude(values).to(tl.int32, bitcast=True)
        largest = tl.maximum(largest.to(tl.int32, bitcast=True), found).to(tl.float32, bitcast=True)
    tl.store(absmax + row, largest, mask=row < rows)
    scale = tl.div_rn(tl.full([TILE_ROWS], 1.0, tl.float32), largest) * _INT8_MAX
    scale = tl.where(scale <= _LARGEST, scale, 0.0)  # neither infinite nor NaN
    for first in range(0, columns, TILE_COLUMNS):
        column = first + tl.arange(0, TILE_COLUMNS)
        mask = (row[:, None] < rows) & (column[None, :] < columns)
        at = row[:, None] * columns + column[None, :]
        scaled = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        rounded = (tl.where(scaled == scaled, scaled, 0.0) + _ROUNDING) - _ROUNDING
        tl.store(codes + at, rounded.to(tl.int32).to(tl.uint8), mask=mask)


@triton.jit
def quantize_scales_kernel(absmax, offset, code_table, codes, group_scales, blocks, TILE: tl.constexpr):
    """Each program encodes TILE groups of 256 scales."""
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    block = group[:, None] * _GROUP_SIZE + tl.arange(0, _GROUP_SIZE)[None, :]
    mask = block < blocks
    values = tl.where(mask, tl.load(absmax + block, mask=mask, other=0.0) - tl.load(offset), 0.0)
    group_scale = largest_magnitude(values)
    tl.store(group_scales + group, group_scale, mask=group * _GROUP_SIZE < blocks)
    scaled = values * tl.div_rn(tl.full([TILE], 1.0, tl.float32), group_scale)[:, None]
    # One of 65536 positions first; the two products round apart. NaN is in position 0.
    scaled = tl.where(scaled > -1.0, tl.where(scaled < 1.0, scaled, 1.0), -1.0)
    position = ((scaled + 1.0) * 32767.5 + 0.5).to(tl.int32)
    code = tl.load(code_table + position)
    tl.store(codes + block, tl.where(group_scale[:, None] == 0.0, 0, code).to(tl.uint8), mask=mask)


@triton.jit
def _load_16(weight, element, numel):
    return tl.load(weight + element, mask=element < numel, other=0.0).to(tl.float32)


@triton.jit
def search_scales_kernel(
    weight,
    importance,
    factors,
    scales,
    numel,
    columns,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program searches the scales of TILE blocks, one factor after the other, 16 elements of each at a time.

    A block's error is the sum of sixteen partial sums, each over every sixteenth element, added up as the format says:
    so every backend chooses the same scale, bit for bit. ``importance``: fp32 [columns] or None.
    """
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    first = block[:, None] * BLOCK_SIZE + tl.arange(0, 16)[None, :]
    largest = tl.zeros([TILE, 16], tl.int32)
    for j in range(0, BLOCK_SIZE, 16):
        largest = tl.maximum(largest, _load_16(weight, first + j, numel).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    absmax = largest_magnitude(largest.to(tl.float32, bitcast=True))
    inverse = tl.div_rn(tl.full([TILE], 1.0, tl.float32), absmax)[:, None]

    # Each column follows from the one 16 elements before it: a division for each would cost as much as all the rest.
    step = 16 % columns
    first_column = (first % columns).to(tl.int32)
    weighted = tl.zeros([TILE, 16], tl.int32)
    if importance is not None:
        column = first_column
        for j in range(0, BLOCK_SIZE, 16):
            of_column = tl.load(importance + column, mask=first + j < numel, other=0.0)
            weighted = weighted | (of_column > 0).to(tl.int32)
            column = tl.where(column + step >= columns, column + step - columns, column + step)
    is_weighted = tl.max(weighted, axis=1)[:, None] > 0

    best = tl.full([TILE], 1.0, tl.float32)
    least = tl.full([TILE], float("inf"), tl.float32)
    for f in range(_FACTORS):
        factor = tl.load(factors + f)
        inverse_factor = tl.div_rn(1.0, factor)
        sums = tl.zeros([TILE, 16], tl.float32)
        column = first_column
        for j in range(0, BLOCK_SIZE, 16):
            value = _load_16(weight, first + j, numel) * inverse
            error = value - nearest_value(value * inverse_factor, FORMAT) * factor
            squared = error * error
            if importance is not None:
                of_column = tl.load(importance + column, mask=first + j < numel, other=0.0)
                squared *= tl.where(is_weighted, of_column, 1.0)
                column = tl.where(column + step >= columns, column + step - columns, column + step)
            sums += squared
        total = tl.sum(tl.reshape(sums, [TILE, 2, 8]), axis=1)
        total = tl.sum(tl.reshape(total, [TILE, 2, 4]), axis=1)
        total = tl.sum(tl.reshape(total, [TILE, 2, 2]), axis=1)
        total = tl.sum(total, axis=1)
        best = tl.where(total < least, factor, best)
        least = tl.where(total < least, total, least)
    searched = (absmax >= _TINY_ABSMAX) & (absmax <= _LARGEST_SEARCHED)
    tl.store(scales + block, tl.where(searched, absmax * best, absmax), mask=block * BLOCK_SIZE < numel)


@triton.jit
def encode_kernel(
    weight,
    scales,
    packed,
    numel,
    packed_bytes,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program encodes TILE elements, in pieces of 32: no block is shorter. What is past the end is zero."""
    piece = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE // 32) * 32
    element = piece[:, None] + tl.arange(0, 32)[None, :]
    values = tl.load(weight + element, mask=element < numel, other=0.0).to(tl.float32)
    scale = tl.load(scales + piece // BLOCK_SIZE, mask=piece < numel, other=0.0)
    # The inverse of a smaller scale could overflow; what it decodes to is nearly zero, whatever the code.
    inverse = tl.where(tl.abs(scale) >= _TINY_ABSMAX, tl.div_rn(tl.full([TILE // 32], 1.0, tl.float32), scale), 0.0)
    byte = (piece // 2)[:, None] + tl.arange(0, 16)[None, :]
    codes = encode_pairs(values * inverse[:, None], FORMAT)
    tl.store(packed + byte, codes, mask=byte < packed_bytes)


@functools.cache
def _scale_code_table(device: torch.device) -> torch.Tensor:
    """Return the table of scales' codes, uint8 [65536] on ``device``: an entry is read per scale, not per weight."""
    return fmt.SCALE_CODE_TABLE.to(device)


@functools.cache
def _scale_factors(device: torch.device) -> torch.Tensor:
    """Return what a search multiplies absmax with, fp32 [36] on ``device``."""
    return torch.tensor(fmt.SCALE_FACTORS, dtype=torch.float32, device=device)


def _weight_of_floats(weight: torch.Tensor, spec: str, searched: bool) -> tuple[torch.Tensor, fmt.WeightSpec]:
    """Return (weight, contiguous; its spec), checked."""
    check_float("weight", weight.dtype)
    return weight.detach().contiguous(), spec_of(spec, searched)


def quantize(weight, spec) -> tuple[torch.Tensor, torch.Tensor]:
    weight, spec = _weight_of_floats(weight, spec, False)
    numel, blocks, block_size = weight.numel(), spec.scale_count(weight.shape), spec.block_size
    packed = weight.new_empty([spec.packed_size(numel)], dtype=torch.uint8)
    absmax = weight.new_empty([blocks], dtype=torch.float32)
    if spec.record.scales.per_row:
        columns = fmt.row_shape(weight.shape)[1]
        tile_rows, tile_columns = rows_tile(columns, QUANTIZE_ROWS_TILE)
        tile = {"TILE_ROWS": tile_rows, "TILE_COLUMNS": tile_columns, "num_warps": WARPS}
        launch(quantize_int8_kernel, (ceil_div(blocks, tile_rows),), weight, packed, absmax, blocks, columns, **tile)
        return packed, absmax
    full_blocks = numel // block_size
    for first, end, tile in ((0, full_blocks, QUANTIZE_TILE // block_size), (full_blocks, blocks, 1)):
        launch(
            quantize_kernel,
            (ceil_div(end - first, tile),),
            *(weight, packed, absmax, first, end, numel),
            FORMAT=spec.format,
            BLOCK_SIZE=block_size,
            TILE=tile,
            SHORT=first == full_blocks,
            num_warps=WARPS,
        )
    return packed, absmax


def quantize_scales(absmax, offset) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = checked("absmax", absmax, absmax.numel(), absmax, torch.float32)
    offset = checked("offset", offset, 1, absmax, torch.float32)
    codes = absmax.new_empty(absmax.shape, dtype=torch.uint8)
    group_scales = absmax.new_empty([fmt.block_count(absmax.numel(), fmt.GROUP_SIZE)])
    operands = (absmax, offset, _scale_code_table(absmax.device), codes, group_scales, absmax.numel())
    grid = (ceil_div(group_scales.numel(), GROUPS_TILE),)
    launch(quantize_scales_kernel, grid, *operands, TILE=GROUPS_TILE, num_warps=WARPS)
    return codes, group_scales


def search_scales(weight, importance, spec) -> torch.Tensor:
    weight, spec = _weight_of_floats(weight, spec, True)
    columns = fmt.row_shape(weight.shape)[1]
    importance = optional("importance", importance, columns, weight)
    importance = None if importance is None else importance.detach().float()
    scales = weight.new_empty([spec.scale_count(weight.shape)], dtype=torch.float32)
    operands = (weight, importance, _scale_factors(weight.device), scales, weight.numel(), columns)
    constants = {"FORMAT": spec.format, "BLOCK_SIZE": spec.block_size, "TILE": SEARCH_TILE}
    grid = (ceil_div(scales.numel(), SEARCH_TILE),)
    launch(search_scales_kernel, grid, *operands, **constants, num_warps=WARPS)
    return scales


def encode(weight, scales, spec) -> torch.Tensor:
    weight, spec = _weight_of_floats(weight, spec, True)
    scales = checked("scales", scales, spec.scale_count(weight.shape), weight, torch.float32)
    numel = weight.numel()
    packed = weight.new_empty([spec.packed_size(numel)], dtype=torch.uint8)
    constants = {"FORMAT": spec.format, "BLOCK_SIZE": spec.block_size, "TILE": QUANTIZE_TILE}
    grid = (ceil_div(numel, QUANTIZE_TILE),)
    launch(encode_kernel, grid, weight, scales, packed, numel, packed.numel(), **constants, num_warps=WARPS)
    return packed
