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
    """fp32 as a sum of two bf16: |values - high - low| <= 2^-16 |values|; and high without infinities.

    These have no low part, and a factor whose low part is 0 must not make NaN of them.
    """
    high = round_to(values, tl.bfloat16)
    whole = high.to(tl.float32)
    finite = whole - whole == 0
    low = round_to(tl.where(finite, values - whole, 0.0), tl.bfloat16)
    return high, low, round_to(tl.where(finite, whole, 0.0), tl.bfloat16)
