"""``lowbit.quantize``: a float weight to a QuantizedTensor."""

import math

import torch

from .. import backends
from ..format import WeightSpec, check_float_dtype
from ..tensor import QuantizedTensor
from . import search

#: How scales are found.
SCALES = ("absmax", "search")


def quantize(
    weight: torch.Tensor,
    *,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    scale: str = "absmax",
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Store ``weight`` in 4 bits: blocks of ``block_size`` elements of the row-major weight share one scale.

    In "int8" it takes 8 bits instead, and one fp32 scale a row (along the last dimension); block_size and double_quant
    are then ignored.

    Args:
        weight: float32, float16 or bfloat16, any shape; finite.
        format: "nf4", "fp4" or "int8".
        block_size: power of two, 32 to 4096.
        double_quant: store the scales in 8 bits (0.516 bytes a weight at block size 64; 0.563 without).
        scale: "absmax", the largest magnitude of each block, or "search": the signed scale among 36 around +-absmax
            that minimises the block's squared error; codes are chosen again for what double quantization makes of it.
            Any reader decodes it. Slower to quantize; the products are the same.
        importance: with "search", one number of at least 0 per input column (the last dimension): the squared errors'
            weights. The mean square of that activation over a few calibration batches is a good choice.

    Raises:
        TypeError: ``weight`` is not a tensor, or not of those dtypes.
        ValueError: another argument is out of range, or ``weight`` holds NaN or inf.

    Source: Dettmers et al., "QLoRA", 2023 (arXiv 2305.14314), and for int8 "LLM.int8()", 2022 (arXiv 2208.07339);
    the bytes are bitsandbytes 0.50's.
    """
    check_scale(scale, WeightSpec(format, block_size, double_quant))
    return quantize_to(weight, WeightSpec(format, block_size, double_quant), scale, importance)


def check_scale(scale: str, spec: WeightSpec) -> None:
    """ValueError unless ``scale`` is "absmax" or "search", and the spec's scales can be searched where asked."""
    if scale not in SCALES:
        raise ValueError(f"scale: expected 'absmax' or 'search', got {scale!r}")
    if scale == "search" and not spec.record.scales.double_quant:
        raise ValueError(
            f"scale: expected 'absmax' for format {spec.format!r}, whose scales are not searched, got 'search'"
        )


def quantize_to(
    weight: torch.Tensor, spec: WeightSpec, scale: str = "absmax", importance: torch.Tensor | None = None
) -> QuantizedTensor:
    """:func:`quantize` with a spec."""
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight: expected a torch.Tensor, got {type(weight).__name__}")
    if isinstance(weight, QuantizedTensor):
        raise TypeError(f"weight: expected a dense tensor, got {weight!r}; decode it first (weight.dequantize())")
    check_float_dtype("weight", weight.dtype)
    if importance is not None:
        if scale != "search":
            raise ValueError(f"importance: expected scale='search' with it, got scale={scale!r}")
        search.check_importance(importance, weight)

    op = getattr(torch.ops, backends.namespace_for(weight.device.type, backends.selected()))
    weight = weight.detach()
    encode = None
    if scale == "search":
        absmax, encode = search.search(op, weight, importance, spec)
    else:
        packed, absmax = op.quantize.default(weight, spec.text)
    offset = absmax.mean(dtype=torch.float64) if spec.double_quant and absmax.numel() else None
    # The kernels let NaN and inf through to absmax, and the mean does: finding them costs no pass over the weight.
    if not weight.is_meta and absmax.numel():
        scales = absmax if spec.record.scales.decode is None else spec.record.scales.decode(absmax)
        _check_finite(scales.amax() if offset is None else offset, weight)
    group_scales = None
    if spec.double_quant:
        offset = absmax.new_zeros(()) if offset is None else offset.float()
        absmax, group_scales = op.quantize_scales.default(absmax, offset)
    if encode is not None:
        packed = encode(absmax, group_scales, offset)
    return QuantizedTensor(packed, absmax, group_scales, offset, shape=weight.shape, dtype=weight.dtype, spec=spec)


def _check_finite(summary: torch.Tensor, weight: torch.Tensor) -> None:
    """ValueError unless ``summary`` is finite, which it is where all of ``weight`` is."""
    if math.isfinite(summary.item()):
        return
    flat = weight.reshape(-1)
    bad = (~torch.isfinite(flat)).nonzero()
    first = int(bad[0])
    raise ValueError(
        f"weight: expected finite values, got {bad.numel()} NaN or inf (the first is {flat[first].item()} at flat "
        f"index {first})"
    )
