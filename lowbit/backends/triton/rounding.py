"""fp32 to fewer bits, rounded to nearest, ties to even."""

import torch
import triton
import triton.language as tl

from . import INTERPRETED

#: The dtypes of products and of decoded weights, as kernels call them.
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def round_to(values, DTYPE: tl.constexpr):
    """fp32 ``values`` in DTYPE. Triton's interpreter would cut them off for bf16: it gets them rounded already."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(values == values, rounded, bits)  # a NaN stays one
        return (rounded & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)
    return values.to(DTYPE)


@triton.jit
def in_two_bf16(values):
    """fp32 as a sum of two bf16: |values - high - low| <= 2^-16 |values|.

    An infinity or NaN is the low part, beside 1 with its sign: high high + high low + low high is then what the product
    of the values is. As the high part it would make NaN of a low part of 0.
    """
    high = round_to(values, tl.bfloat16).to(tl.float32)
    held = high - high == 0
    low = tl.where(held, values - high, values)
    high = tl.where(held, high, tl.clamp(values, -1.0, 1.0))
    return round_to(high, tl.bfloat16), round_to(low, tl.bfloat16)
