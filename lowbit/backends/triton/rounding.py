"""fp32 to the dtype of a result, rounded to nearest, ties to even."""

import triton
import triton.language as tl

from . import INTERPRETED

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
