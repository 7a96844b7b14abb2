"""dequantize: packed codes to values of any of the three dtypes.

A thread loads 16 packed bytes, decodes them with the one scale they share and passes them on, so that the stores are
16 bytes wide and consecutive too.
"""

import torch
import triton
import triton.language as tl

from ... import format as fmt
from . import PORTABLE
from .decode import DTYPES, INT8_UNIT, decode_codes, decode_scales, round_to
from .launch import launch
from .operands import check_float, check_size, weight_of, wrong
from .shapes import DEQUANTIZE_ROWS_TILE, DEQUANTIZE_TILE, WARPS, ceil_div, rows_tile


@triton.jit
def dequantize_kernel(
    packed,
    absmax,
    group_scales,
    offset,
    scale_map,
    out,
    numel,
    packed_bytes,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    DTYPE: tl.constexpr,
    PORTABLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program decodes TILE packed bytes, in pieces of 16: no block is shorter than a piece."""
    first = tl.program_id(0).to(tl.int64) * TILE
    # 32 bits are enough from here on.
    left = tl.minimum(numel - 2 * first, 2 * TILE).to(tl.int32)
    bytes_left = tl.minimum(packed_bytes - first, TILE).to(tl.int32)
    piece = tl.arange(0, TILE // 16) * 16
    byte = piece[:, None] + tl.arange(0, 16)[None, :]
    codes = tl.load(packed + first + byte, mask=byte < bytes_left, other=0)
    high, low = decode_codes(codes, FORMAT, tl.float32, PORTABLE)
    block = (first + piece) // (BLOCK_SIZE // 2)
    scales = (absmax, group_scales, offset, scale_map)
    scale = decode_scales(scales, block, piece < bytes_left, DOUBLE_QUANT)
    values = tl.join(high * scale[:, None], low * scale[:, None])
    element = tl.arange(0, 2 * TILE)
    tl.store(out + 2 * first + element, round_to(tl.reshape(values, [2 * TILE]), DTYPE), mask=element < left)


@triton.jit
def dequantize_int8_kernel(
    codes, absmax, out, rows, columns, DTYPE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):
    """Each program decodes TILE_ROWS x TILE_COLUMNS codes, of which some may lie past the end."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    at = row[:, None] * columns + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    scale = tl.load(absmax + row, mask=row < rows, other=0.0)
    values = tl.load(codes + at, mask=mask, other=0).to(tl.float32) * scale[:, None] * INT8_UNIT
    tl.store(out + at, round_to(values, DTYPE), mask=mask)


def dequantize_out(packed, absmax, group_scales, offset, spec, out) -> None:
    check_float("out", out.dtype)
    if not out.is_contiguous():
        raise wrong("out", "a contiguous tensor", f"strides {out.stride()}")
    weight = weight_of(out.shape, out, packed, absmax, group_scales, offset, spec)
    numel, dtype = out.numel(), DTYPES[out.dtype]
    if numel == 0:
        return
    codes, absmax, *others = weight.operands()
    if weight.spec.record.scales.per_row:
        rows, columns = fmt.row_shape(out.shape)
        tile_rows, tile_columns = rows_tile(columns, DEQUANTIZE_ROWS_TILE)
        tile = {"TILE_ROWS": tile_rows, "TILE_COLUMNS": tile_columns, "num_warps": WARPS}
        grid = (ceil_div(rows, tile_rows), ceil_div(columns, tile_columns))
        launch(dequantize_int8_kernel, grid, codes, absmax, out, rows, columns, DTYPE=dtype, **tile)
        return
    packed_bytes, tile = ceil_div(numel, 2), DEQUANTIZE_TILE[out.dtype]
    launch(
        dequantize_kernel,
        (ceil_div(packed_bytes, tile),),
        *(codes, absmax, *others, out, numel, packed_bytes),
        **weight.constants(),
        DTYPE=dtype,
        PORTABLE=PORTABLE,
        TILE=tile,
        num_warps=WARPS,
    )


def dequantize(packed, absmax, group_scales, offset, spec, shape, dtype) -> torch.Tensor:
    check_float("dtype", dtype)
    for size in shape:
        check_size("shape", size)
    out = packed.new_empty(shape, dtype=dtype)
    dequantize_out(packed, absmax, group_scales, offset, spec, out)
    return out
