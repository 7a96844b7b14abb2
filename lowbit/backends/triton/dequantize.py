"""dequantize: packed codes to values of any of the three dtypes."""

import math

import torch
import triton
import triton.language as tl

from . import PORTABLE
from .constants import scale_map
from .decode import decode_codes, decode_scales
from .launch import launch
from .rounding import round_to

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def dequantize_kernel(
    packed,
    absmax,
    group_scales,
    offset,
    scale_map,
    out,
    numel,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    DTYPE: tl.constexpr,
    PORTABLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program decodes TILE packed bytes."""
    byte = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    codes = tl.load(packed + byte, mask=byte < (numel + 1) // 2, other=0)
    high, low = decode_codes(codes, FORMAT, tl.float32, PORTABLE)
    scale = decode_scales(
        absmax, group_scales, offset, scale_map, 2 * byte // BLOCK_SIZE, 2 * byte < numel, DOUBLE_QUANT
    )
    values = tl.reshape(tl.join(high * scale, low * scale), [2 * TILE])
    element = tl.program_id(0).to(tl.int64) * 2 * TILE + tl.arange(0, 2 * TILE)
    tl.store(out + element, round_to(values, DTYPE), mask=element < numel)


def dequantize(packed, absmax, group_scales, offset, format, block_size, shape, dtype) -> torch.Tensor:
    out = packed.new_empty(shape, dtype=dtype)
    tile = 1024
    launch(
        dequantize_kernel,
        (triton.cdiv(triton.cdiv(math.prod(shape), 2), tile),),
        packed,
        absmax,
        group_scales,
        offset,
        scale_map(packed.device),
        out,
        math.prod(shape),
        FORMAT=format,
        BLOCK_SIZE=block_size,
        DOUBLE_QUANT=group_scales is not None,
        DTYPE=_DTYPES[dtype],
        PORTABLE=PORTABLE,
        TILE=tile,
        num_warps=4,
    )
    return out
