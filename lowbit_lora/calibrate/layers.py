"""From sums over tokens to quantized weights."""

from dataclasses import dataclass

import torch

from lowbit import QuantizedTensor, WeightSpec
from lowbit.checks import named_errors
from lowbit.quantizers import Curvature
from lowbit.quantizers.quantize import quantize_to

from .statistics import Group, Squares

METHODS = ("sequential", "static", "scale")


@dataclass(frozen=True)
class Settings:
    """How weights are chosen.

    Args:
        method: "sequential", "static" or "scale".
        spec: how each weight is stored.
        damping: added to the diagonal of Gram matrices, in units of its mean.
        sweeps: of the descent.
        shift: "sequential" goes this share of the way from the weight to the one that gives the dense model's outputs.
        ridge: what keeps that one near the weight, in units of the diagonal's mean.
    """

    method: str
    spec: WeightSpec
    damping: float = 0.1
    sweeps: int = 3
    shift: float = 0.5
    ridge: float = 1.0


@dataclass
class Result:
    """A quantized weight [out, in], how it was chosen, and the losses that :class:`~.report.LayerReport` names."""

    quantized: QuantizedTensor
    absmax: float
    search: float
    final: float
    chosen: str


def quantize_layers(group: Group | Squares, settings: Settings, prefix: str) -> dict[str, Result]:
    """Quantize the weights of a group, by name; ``prefix`` is what errors put before a name."""
    results = {}
    curvature = targets = None
    if isinstance(group, Group):
        curvature = Curvature(group.hessian, settings.damping)
        targets = shifted(group, settings)
    diagonal = group.diagonal if curvature is None else curvature.diagonal
    for name, weight in group.layers.items():
        with named_errors(f"{prefix}{name}"):
            absmax = quantize_to(weight, settings.spec)
            searched = quantize_to(weight, settings.spec, "search", diagonal)
            losses = [group.loss(name, candidate.dequantize()) for candidate in (absmax, searched)]
            final, chosen, loss = searched, "weighted search", losses[1]
            if curvature is not None:
                descended = quantize_to(
                    targets[name], settings.spec, codes="descent", hessian=curvature, sweeps=settings.sweeps
                )
                descended_loss = group.loss(name, descended.dequantize())
                if descended_loss <= loss:
                    final, chosen, loss = descended, "descent", descended_loss
        results[name] = Result(final, *losses, loss, chosen)
    return results


def shifted(group: Group, settings: Settings) -> dict[str, torch.Tensor]:
    """The weights [out, in] to quantize, by name: moved towards those that make up for what the outputs lack.

    The latter minimise |x W'^T - (x W^T + lack)|^2 + ridge |W' - W|^2 over the tokens.
    """
    scale = group.hessian.diagonal().mean()
    if not group.pull or not settings.shift or not bool(scale > 0):
        return group.layers
    ridged = group.hessian.clone()
    ridged.diagonal().add_(settings.ridge * scale)
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if failed:
        return group.layers
    return {
        name: weight + settings.shift * torch.cholesky_solve(group.pull[name], factor).T
        for name, weight in group.layers.items()
    }
