"""A weight that has changed, quantized again, and how much of its change is left then."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..tensor import QuantizedTensor
from .curvature import Curvature
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
        weight_cosine: between the weight that was wanted and the decoded one.
    """

    name: str
    cosine: float
    norm_ratio: float
    weight_cosine: float = 1.0


def search_quantizer(
    values: torch.Tensor, old: QuantizedTensor, importance: torch.Tensor | None = None
) -> QuantizedTensor:
    """The values in the old weight's format, with the scales of the smallest error.

    ``importance``: the mean squares of the inputs, one for each column as it is stored, to weight it by.
    """
    is_transposed = old.stored.transposed
    matrix = values.to(old.dtype)
    matrix = matrix.transpose(-1, -2).contiguous() if is_transposed else matrix
    is_searched = old.spec.record.scales.double_quant
    new = quantize_to(matrix, old.spec, "search", importance) if is_searched else quantize_to(matrix, old.spec)
    return new.transpose(-1, -2) if is_transposed else new


def inputs_quantizer(inputs: torch.Tensor, is_transposed: bool = False) -> Quantizer:
    """A quantizer for one layer that leaves little error in its outputs for these ``inputs`` [..., k].

    ``is_transposed``: the layer's weight is [k, out], not [out, k].
    """
    flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
    curvature = Curvature(flat.T @ flat)

    def quantizer(values: torch.Tensor, old: QuantizedTensor) -> QuantizedTensor:
        matrix = values.T.contiguous() if is_transposed else values
        new = quantize_to(matrix, old.spec, codes="descent", hessian=curvature).to(old.dtype)
        return new.transpose(-1, -2) if is_transposed else new

    return quantizer


def requantize(
    name: str, old: QuantizedTensor, before: torch.Tensor, change: torch.Tensor, quantizer: Quantizer
) -> tuple[QuantizedTensor, Survival]:
    """``before`` (the old weight decoded, fp32) plus a change of it, quantized again, and how much of it is left.

    A weight that does not change keeps its bytes.
    """
    if not change.any():
        return old, Survival(name, 1.0, 1.0)
    wanted = before + change
    new = quantizer(wanted, old)
    decoded = new.dequantize(torch.float32)
    got = decoded - before
    ratio = float(got.norm() / change.norm())
    return new, Survival(name, _cosine(change, got), ratio, _cosine(wanted, decoded))


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    product = one.norm() * other.norm()
    return float((one * other).sum() / product) if product > 0 else 0.0


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
