"""From sums over tokens to quantized weights."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowbit import QuantizedTensor, WeightSpec
from lowbit.checks import named_errors
from lowbit.lowrank import residual_factors
from lowbit.quantizers import Curvature
from lowbit.quantizers.quantize import quantize_to

from .statistics import Group, Squares

METHODS = ("sequential", "static", "scale")
#: Times that factors for what quantization takes away are found; after each but the last the rest is quantized again.
ROUNDS = 2


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
    """A quantized weight [out, in], how it was chosen, and the losses that :class:`~.report.LayerReport` names.

    ``start``: the first factors (A, B) that go with it, if it gets some.
    """

    quantized: QuantizedTensor
    absmax: float
    search: float
    final: float
    chosen: str
    start: tuple[torch.Tensor, torch.Tensor] | None = None


def quantize_layers(
    group: Group | Squares, settings: Settings, prefix: str, ranks: dict[str, int]
) -> dict[str, Result]:
    """Quantize the weights of a group, by name.

    Args:
        prefix: what errors put before a name.
        ranks: of the factors that each weight gets, 0 for none.
    """
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
            result, target = Result(searched, *losses, losses[1], "weighted search"), weight
            options = {"scale": "search", "importance": diagonal}
            if curvature is not None:
                if goal.pull is not None and ridged is not None and settings.shift:
                    target = weight + settings.shift * torch.cholesky_solve(goal.pull, ridged).T
                options = {"codes": "descent", "hessian": curvature, "sweeps": settings.sweeps}
                descended = quantize_to(target, settings.spec, **options)
                loss = goal.loss(descended.dequantize())
                if loss <= losses[1]:
                    result = Result(descended, *losses, loss, "descent")
            if ranks[name]:
                result = with_start(
                    result,
                    target,
                    ranks[name],
                    Curvature(torch.diag(diagonal), settings.damping) if curvature is None else curvature,
                    store=functools.partial(quantize_to, spec=settings.spec, **options),
                    loss=goal.loss,
                )
        results[name] = result
    return results


def with_start(
    result: Result,
    target: torch.Tensor,
    rank: int,
    curvature: Curvature,
    store: Callable[[torch.Tensor], QuantizedTensor],
    loss: Callable[[torch.Tensor], float],
) -> Result:
    """The result with factors for what it lacks of the target [out, in], quantized again for what these leave of it.

    Of all rounds the best one counts; where none is better than the result alone, that is returned.

    Args:
        curvature: by which the factors are chosen.
        store: quantizes.
        loss: of a decoded weight.
    """
    found, quantized = [result], result.quantized
    for remaining in reversed(range(ROUNDS)):
        decoded = quantized.dequantize(torch.float32)
        lora_a, lora_b = residual_factors(target - decoded, curvature.damped, rank)
        product = lora_b @ lora_a
        final, chosen = loss(decoded + product), f"{result.chosen}, rank {rank}"
        found.append(Result(quantized, result.absmax, result.search, final, chosen, (lora_a, lora_b)))
        if remaining:
            quantized = store(target - product)
    return min(found, key=lambda one: one.final)


def _ridged(group: Group, settings: Settings) -> torch.Tensor | None:
    """The factor by which weights move towards those that make up for what the outputs lack; None: there is none.

    These minimise |W' x - (W x + d)|^2 + ridge |W' - W|^2 over the tokens.
    """
    ridged = group.hessian.clone()
    ridged.diagonal().add_(settings.ridge * ridged.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(ridged)
    return None if failed else factor
