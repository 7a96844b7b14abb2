"""Tiles: how many there are and of what size, in which order, and the expert that a tile of rows belongs to."""

import triton
import triton.language as tl

#: Tiles of rows that are numbered one after the other for the same columns: their programs run at the same time, and
#: what they read of W comes from the L2 cache but for the first.
_BAND = tl.constexpr(8)


@triton.jit
def tile_position(tile, row_tiles, column_tiles):
    """(row tile, column tile) of tile number ``tile``."""
    band = tile // (_BAND * column_tiles) * _BAND
    rows = tl.minimum(row_tiles - band, _BAND)
    within = tile % (_BAND * column_tiles)
    return band + within % rows, within // rows


@triton.jit
def expert_of_tile(row_tile, expert_ends, experts, tokens, TILE_M: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, its first row in the tile, the end of its rows); an expert of ``experts`` or more: no such tile.

    Each expert's rows are cut into tiles of TILE_M of their own, so one without rows has none. How many there are in
    all only the device knows: ceil(rows / TILE_M) + experts are enough. EXPERTS: ``experts`` or more, a power of two.
    Ends that are out of order or past the ``tokens`` rows leave rows out, but nothing is read or written past them.
    """
    index = tl.arange(0, EXPERTS)
    ends = tl.load(expert_ends + index, mask=index < experts, other=0)
    begins = tl.load(expert_ends + index - 1, mask=(index < experts) & (index > 0), other=0)
    ends = tl.minimum(tl.maximum(ends, 0), tokens)
    begins = tl.minimum(tl.maximum(begins, 0), tokens)
    tiles = tl.cdiv(tl.maximum(ends - begins, 0), TILE_M)
    last_tile = tl.cumsum(tl.where(index < experts, tiles, 0), 0)
    before = last_tile <= row_tile
    expert = tl.sum(before.to(tl.int32), 0)
    first_tile = tl.max(tl.where(before, last_tile, 0), 0)
    begin = tl.sum(tl.where(index == expert, begins, 0), 0)
    end = tl.sum(tl.where(index == expert, ends, 0), 0)
    return expert, begin.to(tl.int64) + (row_tile - first_tile).to(tl.int64) * TILE_M, end


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv, which kernels may call too, takes 5 us of Python for it, and so does its next_power_of_2."""
    return -(-a // b)


def next_power_of_2(number: int) -> int:
    """The smallest that is at least ``number`` (and 1)."""
    return 1 << max(number - 1, 0).bit_length()


def row_tile_count(rows: int, experts: int, tile_m: int) -> int:
    """An upper bound: each expert's last tile may be short."""
    return min(ceil_div(rows, tile_m) + experts, rows)


def int8_tile(columns: int, elements: int) -> tuple[int, int]:
    """(rows, columns) that a program takes of an int8 weight at a time: a piece of one long row, or several short rows.

    ``elements``: of the tile, a power of two of at least 64.
    """
    width = min(elements, max(64, next_power_of_2(columns)))
    return elements // width, width
