"""quantize: absmax scales and codes of a float weight; quantize_scales: the scales in 8 bits."""

import functools

import torch
import triton
import triton.language as tl

from ... import format as fmt
from .encode import encode_pairs, largest_magnitude, raised
from .grid import ceil_div, int8_tile
from .launch import launch
from .operands import check_float, check_format, checked

#: Elements of a program: a thread stores 16 bytes at a time, which are 32 codes.
_TILE = 4096
_WARPS = 4
_INT8_TILE = 4096
#: Groups of 256 scales of a program, 16 scales per thread.
_GROUPS = 8
_GROUP_SIZE = tl.constexpr(fmt.GROUP_SIZE)
_INT8_MAX = tl.constexpr(fmt.INT8_MAX)
#: Added and taken away again it rounds an fp32 number below 2^22 half to even.
_ROUNDING = tl.constexpr(1.5 * 2.0**23)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


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
    BLOCKS: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Each program quantizes BLOCKS blocks, from ``first_block`` on, of ``blocks`` in all.

    SHORT: only the short last block, by a division where full ones multiply by the reciprocal (the format says so).
    """
    block = first_block + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    exists = block < blocks
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    mask = element < numel if SHORT else exists[:, None]
    values = tl.load(weight + element, mask=mask, other=0.0).to(tl.float32)
    largest = largest_magnitude(values)
    if SHORT:
        largest = raised(largest)
        scaled = tl.div_rn(values, tl.broadcast_to(largest[:, None], [BLOCKS, BLOCK_SIZE]))
    else:
        scaled = values * tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), raised(largest))[:, None]
    tl.store(absmax + block, largest, mask=exists)
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    stored = 2 * byte < numel if SHORT else exists[:, None]
    # x is not clamped to [-1, 1]: beyond the outermost midpoints no code changes.
    tl.store(packed + byte, encode_pairs(scaled, FORMAT, BLOCKS, BLOCK_SIZE), mask=stored)


@triton.jit
def quantize_int8_kernel(weight, codes, absmax, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each program quantizes ROWS rows, COLUMNS elements of each at a time; the second reading comes from the cache."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row[:, None] < rows) & (column[None, :] < columns)
        values = tl.load(weight + row[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
        found = largest_magnitude(values).to(tl.int32, bitcast=True)
        largest = tl.maximum(largest.to(tl.int32, bitcast=True), found).to(tl.float32, bitcast=True)
    tl.store(absmax + row, largest, mask=row < rows)
    scale = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), largest) * _INT8_MAX
    scale = tl.where(scale <= _LARGEST, scale, 0.0)  # neither infinite nor NaN
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row[:, None] < rows) & (column[None, :] < columns)
        at = row[:, None] * columns + column[None, :]
        scaled = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        rounded = (tl.where(scaled == scaled, scaled, 0.0) + _ROUNDING) - _ROUNDING
        tl.store(codes + at, rounded.to(tl.int32).to(tl.uint8), mask=mask)


@triton.jit
def quantize_scales_kernel(absmax, offset, code_table, codes, group_scales, blocks, GROUPS: tl.constexpr):
    """Each program encodes GROUPS groups of 256 scales."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    block = group[:, None] * _GROUP_SIZE + tl.arange(0, _GROUP_SIZE)[None, :]
    mask = block < blocks
    values = tl.where(mask, tl.load(absmax + block, mask=mask, other=0.0) - tl.load(offset), 0.0)
    group_scale = largest_magnitude(values)
    tl.store(group_scales + group, group_scale, mask=group * _GROUP_SIZE < blocks)
    scaled = values * tl.div_rn(tl.full([GROUPS], 1.0, tl.float32), group_scale)[:, None]
    # One of 65536 positions first; the two products round apart. NaN is in position 0.
    scaled = tl.where(scaled > -1.0, tl.where(scaled < 1.0, scaled, 1.0), -1.0)
    position = ((scaled + 1.0) * 32767.5 + 0.5).to(tl.int32)
    code = tl.load(code_table + position)
    tl.store(codes + block, tl.where(group_scale[:, None] == 0.0, 0, code).to(tl.uint8), mask=mask)


@functools.cache
def scale_code_table(device: torch.device) -> torch.Tensor:
    """uint8 [65536] on ``device``: an entry is read per scale, not per weight."""
    return fmt.SCALE_CODE_TABLE.to(device)


def quantize(weight, format, block_size) -> tuple[torch.Tensor, torch.Tensor]:
    check_float("weight", weight.dtype)
    check_format(format, block_size, fmt.row_shape(weight.shape)[1])
    weight = weight.detach().contiguous()
    numel = weight.numel()
    if format == "int8":
        return _quantize_int8(weight)
    packed = weight.new_empty([ceil_div(numel, 2)], dtype=torch.uint8)
    absmax = weight.new_empty([fmt.block_count(numel, block_size)], dtype=torch.float32)
    full_blocks = numel // block_size
    for first, blocks, tile_blocks in (
        (0, full_blocks, _TILE // block_size),
        (full_blocks, absmax.numel(), 1),
    ):
        launch(
            quantize_kernel,
            (ceil_div(blocks - first, tile_blocks),),
            weight,
            packed,
            absmax,
            first,
            blocks,
            numel,
            FORMAT=format,
            BLOCK_SIZE=block_size,
            BLOCKS=tile_blocks,
            SHORT=first == full_blocks,
            num_warps=_WARPS,
        )
    return packed, absmax


def _quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = fmt.row_shape(weight.shape)
    codes = weight.new_empty([weight.numel()], dtype=torch.uint8)
    absmax = weight.new_empty([rows], dtype=torch.float32)
    tile_rows, tile_columns = int8_tile(columns, _INT8_TILE)
    launch(
        quantize_int8_kernel,
        (ceil_div(rows, tile_rows),),
        weight,
        codes,
        absmax,
        rows,
        columns,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        num_warps=_WARPS,
    )
    return codes, absmax


def quantize_scales(absmax, offset) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = checked("absmax", absmax, absmax.numel(), absmax, torch.float32)
    offset = checked("offset", offset, 1, absmax, torch.float32)
    groups = fmt.block_count(absmax.numel(), fmt.GROUP_SIZE)
    codes = absmax.new_empty(absmax.shape, dtype=torch.uint8)
    group_scales = absmax.new_empty([groups])
    launch(
        quantize_scales_kernel,
        (ceil_div(groups, _GROUPS),),
        absmax,
        offset,
        scale_code_table(absmax.device),
        codes,
        group_scales,
        absmax.numel(),
        GROUPS=_GROUPS,
        num_warps=_WARPS,
    )
    return codes, group_scales
