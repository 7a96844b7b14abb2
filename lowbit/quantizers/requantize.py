"""A weight that has changed, quantized again, and how much of its change is left then."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..tensor import QuantizedTensor
from .quantize import quantize_to

#: From a weight's new fp32 values and the old weight to the new quantized one.
Quantizer = Callable[[torch.Tensor, QuantizedTensor], QuantizedTensor]


@dataclass(frozen=True)
class Survival:
    """How much of the change of a weight is left once it is quantized again.

    Attributes:
        name: of the weight's layer.
        cosine: between the change that was wanted and the change of the decoded weight; 1 is all of it.
        norm_ratio: the norm of the change of the decoded weight, over that of the change that was wanted.
    """

    name: str
    cosine: float
    norm_ratio: float


def search_quantizer(values: torch.Tensor, old: QuantizedTensor) -> QuantizedTensor:
    """The values in the old weight's format, with the scales of the smallest error."""
    scale = "search" if old.spec.record.scales.double_quant else "absmax"
    return quantize_to(values.to(old.dtype), old.spec, scale)


def requantize(
    name: str, old: QuantizedTensor, before: torch.Tensor, change: torch.Tensor, quantizer: Quantizer
) -> tuple[QuantizedTensor, Survival]:
    """``before`` (the old weight decoded, fp32) plus a change of it, quantized again, and how much of it is left.

    A weight that does not change keeps its bytes.
    """
    if not change.any():
        return old, Survival(name, 1.0, 1.0)
    new = quantizer(before + change, old)
    got = new.dequantize(torch.float32) - before
    wanted_norm, got_norm = change.norm(), got.norm()
    product = wanted_norm * got_norm
    cosine = float((change * got).sum() / product) if product > 0 else 0.0
    return new, Survival(name, cosine, float(got_norm / wanted_norm))


def check_survivals(survivals: list[Survival], minimum_cosine: float) -> None:
    """ValueError if a cosine is smaller: less is left of a change than that. The worst layers are named."""
    lost = sorted((s for s in survivals if s.cosine < minimum_cosine), key=lambda s: s.cosine)
    if lost:
        worst = ", ".join(f"{s.name} (cosine {s.cosine:.2f}, norm ratio {s.norm_ratio:.2f})" for s in lost[:3])
        raise ValueError(
            f"minimum_cosine: expected a cosine of at least {minimum_cosine} between a weight's change and what is "
            f"left of it, got less in {len(lost)} of {len(survivals)} layers: {worst}. Keep the weights dense "
            "(into='dense'), or lower minimum_cosine"
        )
