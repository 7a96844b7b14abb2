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
    curvature = Curvature(group.hessian, settings.damping) if isinstance(group, Group) else None
    diagonal = group.diagonal if curvature is None else curvature.diagonal
    ridged = _ridged(group, settings) if curvature is not None else None
    results = {}
    for name, weight in group.layers.items():
        goal = group.goal(name)
        with named_errors(f"{prefix}{name}"):
            absmax = quantize_to(weight, settings.spec)
            searched = quantize_to(weight, settings.spec, "search", diagonal)
            losses = [goal.loss(candidate.dequantize()) for candidate in (absmax, searched)]
            results[name] = Result(searched, *losses, losses[1], "weighted search")
            if curvature is None:
                continue
            target = weight
            if goal.pull is not None and ridged is not None and settings.shift:
                target = weight + settings.shift * torch.cholesky_solve(goal.pull, ridged).T
            options = {"codes": "descent", "hessian": curvature, "sweeps": settings.sweeps}
            descended = quantize_to(target, settings.spec, **options)
            loss = goal.loss(descended.dequantize())
            if loss <= losses[1]:
                results[name] = Result(descended, *losses, loss, "descent")
    return results


def _ridged(group: Group, settings: Settings) -> torch.Tensor | None:
    """The factor by which weights move towards those that make up for what the outputs lack; None: there is none.

    These minimise |W' x - (W x + d)|^2 + ridge |W' - W|^2 over the tokens.
    """
    ridged = group.hessian.clone()
    ridged.diagonal().add_(settings.ridge * ridged.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(ridged)
    return None if failed else factor
