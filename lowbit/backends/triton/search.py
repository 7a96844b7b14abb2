"""search_scales: per block the signed scale with the least squared error; encode: codes for given scales.

A block's error is the sum of sixteen partial sums, each over every sixteenth element, added up as the format says: so
every backend chooses the same scale, bit for bit.
"""

import functools

import torch
import triton
import triton.language as tl

from ... import format as fmt
from .encode import TINY_ABSMAX, encode_pairs, largest_magnitude, nearest_value
from .grid import ceil_div
from .launch import launch
from .operands import check_float, check_format, checked, optional

_WARPS = 4
#: Blocks that a program searches, with four of each sixteen elements in a thread.
_BLOCKS = 32
#: Elements that a program encodes: a thread stores 16 bytes at a time, which are 32 codes.
_TILE = 4096
_FACTORS = tl.constexpr(len(fmt.SCALE_FACTORS))
_LARGEST_SEARCHED = tl.constexpr(fmt.LARGEST_SEARCHED)


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
    BLOCKS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Each program searches the scales of BLOCKS blocks, one factor after the other, 16 elements of each at a time."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    first = block[:, None] * BLOCK_SIZE + tl.arange(0, 16)[None, :]
    largest = tl.zeros([BLOCKS, 16], tl.int32)
    for j in range(0, BLOCK_SIZE, 16):
        largest = tl.maximum(largest, _load_16(weight, first + j, numel).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    absmax = largest_magnitude(largest.to(tl.float32, bitcast=True))
    inverse = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), absmax)[:, None]

    # Each column follows from the one 16 elements before it: a division for each would cost as much as all the rest.
    step = 16 % columns
    first_column = (first % columns).to(tl.int32)
    weighted = tl.zeros([BLOCKS, 16], tl.int32)
    if WEIGHTED:
        column = first_column
        for j in range(0, BLOCK_SIZE, 16):
            of_column = tl.load(importance + column, mask=first + j < numel, other=0.0)
            weighted = weighted | (of_column > 0).to(tl.int32)
            column = tl.where(column + step >= columns, column + step - columns, column + step)
    is_weighted = tl.max(weighted, axis=1)[:, None] > 0

    best = tl.full([BLOCKS], 1.0, tl.float32)
    least = tl.full([BLOCKS], float("inf"), tl.float32)
    for f in range(_FACTORS):
        factor = tl.load(factors + f)
        inverse_factor = tl.div_rn(1.0, factor)
        sums = tl.zeros([BLOCKS, 16], tl.float32)
        column = first_column
        for j in range(0, BLOCK_SIZE, 16):
            value = _load_16(weight, first + j, numel) * inverse
            error = value - nearest_value(value * inverse_factor, FORMAT) * factor
            squared = error * error
            if WEIGHTED:
                of_column = tl.load(importance + column, mask=first + j < numel, other=0.0)
                squared *= tl.where(is_weighted, of_column, 1.0)
                column = tl.where(column + step >= columns, column + step - columns, column + step)
            sums += squared
        total = tl.sum(tl.reshape(sums, [BLOCKS, 2, 8]), axis=1)
        total = tl.sum(tl.reshape(total, [BLOCKS, 2, 4]), axis=1)
        total = tl.sum(tl.reshape(total, [BLOCKS, 2, 2]), axis=1)
        total = tl.sum(total, axis=1)
        best = tl.where(total < least, factor, best)
        least = tl.where(total < least, total, least)
    searched = (absmax >= TINY_ABSMAX) & (absmax <= _LARGEST_SEARCHED)
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
    inverse = tl.where(tl.abs(scale) >= TINY_ABSMAX, tl.div_rn(tl.full([TILE // 32], 1.0, tl.float32), scale), 0.0)
    byte = (piece // 2)[:, None] + tl.arange(0, 16)[None, :]
    codes = encode_pairs(values * inverse[:, None], FORMAT, TILE // 32, 32)
    tl.store(packed + byte, codes, mask=byte < packed_bytes)


@functools.cache
def scale_factors(device: torch.device) -> torch.Tensor:
    """fp32 [36] on ``device``."""
    return torch.tensor(fmt.SCALE_FACTORS, dtype=torch.float32, device=device)


def search_scales(weight, importance, format, block_size) -> torch.Tensor:
    check_float("weight", weight.dtype)
    check_format(format, block_size, None)
    columns = weight.shape[-1] if weight.dim() else 1
    importance = optional("importance", importance, columns, weight)
    weight = weight.detach().contiguous()
    blocks = fmt.block_count(weight.numel(), block_size)
    scales = weight.new_empty([blocks], dtype=torch.float32)
    launch(
        search_scales_kernel,
        (ceil_div(blocks, _BLOCKS),),
        weight,
        None if importance is None else importance.detach().float(),
        scale_factors(weight.device),
        scales,
        weight.numel(),
        columns,
        FORMAT=format,
        BLOCK_SIZE=block_size,
        BLOCKS=_BLOCKS,
        WEIGHTED=importance is not None,
        num_warps=_WARPS,
    )
    return scales


def encode(weight, scales, format, block_size) -> torch.Tensor:
    check_float("weight", weight.dtype)
    check_format(format, block_size, None)
    scales = checked("scales", scales, fmt.block_count(weight.numel(), block_size), weight, torch.float32)
    weight = weight.detach().contiguous()
    packed = weight.new_empty([ceil_div(weight.numel(), 2)], dtype=torch.uint8)
    launch(
        encode_kernel,
        (ceil_div(weight.numel(), _TILE),),
        weight,
        scales,
        packed,
        weight.numel(),
        packed.numel(),
        FORMAT=format,
        BLOCK_SIZE=block_size,
        TILE=_TILE,
        num_warps=_WARPS,
    )
    return packed
