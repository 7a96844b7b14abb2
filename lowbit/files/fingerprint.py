"""By what to know a model again: its name, its config's shape, and a few values of its weights."""

from typing import Any

import torch
from torch import nn

from .. import models
from ..tensor import QuantizedTensor


def fingerprint(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What tells ``model`` from others, ready for JSON: with values of five of these ``weights`` of it, by name.

    Weights whose values cannot be read (quantized, sharded, on meta) are passed over, here and in :func:`differences`.
    """
    named = [(name, weight) for name, weight in weights.items() if _is_readable(weight)]
    chosen = sorted({round(part / 4 * (len(named) - 1)) for part in range(5)}) if named else []
    return {
        "name": models.described(model),
        "config": models.shape_of_config(model),
        "weights": {name: _corners(weight) for name, weight in (named[index] for index in chosen)},
    }


def differences(model: nn.Module, weights: dict[str, torch.Tensor], saved: dict[str, Any]) -> list[str]:
    """In what a model differs from that of a fingerprint, for people. Values in 16 bits are none that differ."""
    own = models.shape_of_config(model)
    differing = [
        f"{key} is {value} there and {own[key]} here"
        for key, value in saved.get("config", {}).items()
        if own.get(key, value) != value
    ]
    for name, values in saved.get("weights", {}).items():
        if name in weights and _is_readable(weights[name]) and not _close(_corners(weights[name]), values):
            differing.append(f"{name} has other values")
    return differing


def _is_readable(weight: torch.Tensor) -> bool:
    if isinstance(weight, QuantizedTensor) or weight.is_meta or hasattr(weight, "full_tensor"):  # the last: sharded
        return False
    return weight.is_floating_point() and weight.numel() > 0


def _corners(weight: torch.Tensor) -> list[float]:
    """The first four values and the last four, with four digits."""
    first, last = (weight[0], weight[-1]) if weight.dim() > 1 else (weight, weight)
    values = torch.cat([first.detach().reshape(-1)[:4], last.detach().reshape(-1)[-4:]])
    return [float(f"{value:.4g}") for value in values.tolist()]


def _close(values: list[float], saved: list[float]) -> bool:
    pairs = zip(values, saved, strict=False)
    return len(values) == len(saved) and all(abs(one - other) <= 1e-6 + 0.01 * abs(other) for one, other in pairs)
