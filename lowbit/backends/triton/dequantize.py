"""dequantize: packed codes to values of any of the three dtypes.

A thread loads 16 packed bytes, decodes them with the one scale they share and passes them on, so that the stores are
16 bytes wide and consecutive too.
"""

import torch
import triton
import triton.language as tl

from ... import format as fmt
from . import PORTABLE
from .constants import scale_map
from .decode import decode_codes, decode_scales
from .grid import ceil_div, int8_tile
from .launch import launch
from .operands import check_float, check_size, weight_of, wrong
from .rounding import DTYPES, round_to

_WARPS = 4
#: Packed bytes of a program: 16 in each load of a thread, and as many loads as leave room in the registers. More of
#: them share what a program does once (5.9 instructions per weight; with one load each 7.4).
_TILES = {torch.float32: 4096, torch.float16: 8192, torch.bfloat16: 8192}
_INT8_TILE = 8192
_INT8_UNIT = tl.constexpr(1 / fmt.INT8_MAX)


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
    scale = decode_scales(absmax, group_scales, offset, scale_map, block, piece < bytes_left, DOUBLE_QUANT)
    values = tl.join(high * scale[:, None], low * scale[:, None])
    element = tl.arange(0, 2 * TILE)
    tl.store(out + 2 * first + element, round_to(tl.reshape(values, [2 * TILE]), DTYPE), mask=element < left)


@triton.jit
def dequantize_int8_kernel(
    codes,
    absmax,
    out,
    rows,
    columns,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program decodes ROWS x COLUMNS codes, of which some may lie past the end."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    at = row[:, None] * columns + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    scale = tl.load(absmax + row, mask=row < rows, other=0.0)
    code = tl.load(codes + at, mask=mask, other=0).to(tl.int8, bitcast=True)
    values = code.to(tl.float32) * scale[:, None] * _INT8_UNIT
    tl.store(out + at, round_to(values, DTYPE), mask=mask)


def dequantize_out(packed, absmax, group_scales, offset, format, block_size, out) -> None:
    check_float("out", out.dtype)
    if not out.is_contiguous():
        raise wrong("out", "a contiguous tensor", f"strides {out.stride()}")
    packed, absmax, group_scales, offset, format, block_size = weight_of(
        out.shape, out, packed, absmax, group_scales, offset, format, block_size
    )
    numel, dtype = out.numel(), DTYPES[out.dtype]
    if numel == 0:
        return
    if format == "int8":
        rows, columns = fmt.row_shape(out.shape)
        tile_rows, tile_columns = int8_tile(columns, _INT8_TILE)
        launch(
            dequantize_int8_kernel,
            (ceil_div(rows, tile_rows), ceil_div(columns, tile_columns)),
            packed,
            absmax,
            out,
            rows,
            columns,
            DTYPE=dtype,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            num_warps=_WARPS,
        )
        return
    packed_bytes, tile = ceil_div(numel, 2), _TILES[out.dtype]
    launch(
        dequantize_kernel,
        (ceil_div(packed_bytes, tile),),
        packed,
        absmax,
        group_scales,
        offset,
        scale_map(packed.device),
        out,
        numel,
        packed_bytes,
        FORMAT=format,
        BLOCK_SIZE=block_size,
        DOUBLE_QUANT=group_scales is not None,
        DTYPE=dtype,
        PORTABLE=PORTABLE,
        TILE=tile,
        num_warps=_WARPS,
    )


def dequantize(packed, absmax, group_scales, offset, format, block_size, shape, dtype) -> torch.Tensor:
    check_float("dtype", dtype)
    for size in shape:
        check_size("shape", size)
    out = packed.new_empty(shape, dtype=dtype)
    dequantize_out(packed, absmax, group_scales, offset, format, block_size, out)
    return out
