"""Quantized weights for a model's merged adapters, chosen by what its layers see of data."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowbit import QuantizedTensor
from lowbit.adapted import adapted_modules

from ..layers import LoRABaseLayer
from . import inputs
from .model import checked_settings, choose, split_options
from .report import CalibrationReport


def calibrate_merged(
    model: nn.Module, batches: Iterable, method: str = "sequential", *, progress: bool = True, **options: Any
) -> tuple[dict[nn.Parameter, QuantizedTensor], CalibrationReport]:
    """4-bit weights for W + B A of each layer whose active adapters change its quantized weight W.

    They are chosen as :func:`lowbit_lora.calibrate` does, so that the result computes what the model does with its
    active adapters. Blocks are merged one at a time. The model stays as it is.

    Args:
        model: with adapters; evaluated in fp32.
        batches, method, progress: as for :func:`lowbit_lora.calibrate`.
        options: its damping, sweeps, shift, ridge, tokens_at_once and activations.

    Returns:
        The new weights by the old ones, each stored as the old one is, and what was done.

    Raises:
        TypeError, ValueError, MemoryError, OSError: as for :func:`lowbit_lora.calibrate`; no adapter changes a weight
            in 4 bits; such weights are not all stored alike.
    """
    layers = _layers(model)
    names = {layer.stored_weight: f"{name}.{layer.weight_name}" for name, layer in layers.items()}
    specs = {weight.spec for weight in names}
    if len(specs) > 1:
        stored = ", ".join(sorted(spec.text for spec in specs))
        raise ValueError(f"batches: expected adapted weights that are all stored alike, got {stored}")
    own, rest = split_options(options)
    settings = checked_settings(method, specs.pop(), **own)
    unknown = rest.keys() - {"tokens_at_once", "activations"}
    if unknown:
        raise TypeError(f"options: expected those of lowbit_lora.calibrate, got {', '.join(sorted(unknown))}")
    checked = inputs.checked(model, batches)
    report = CalibrationReport.of(method, checked)
    by_weight = {layer.stored_weight: layer for layer in layers.values()}

    def merged(weight: nn.Parameter) -> torch.Tensor:
        return by_weight[weight].merged_values(by_weight[weight].active)

    found = choose(model, names, checked, settings, report, merged, progress=progress, **rest)
    report.note_unplaced()
    return {old: found.weights[name].to(old.dtype) for old, name in names.items()}, report


def _layers(model: nn.Module) -> dict[str, LoRABaseLayer]:
    """The layers to quantize again, by name; not those that share a weight, which may become different ones."""
    layers = {
        name: part
        for name, part in adapted_modules(model).items()
        if isinstance(part, LoRABaseLayer) and isinstance(part.stored_weight, QuantizedTensor)
    }
    owners = Counter(layer.stored_weight for layer in layers.values())
    changed = {
        name: layer
        for name, layer in layers.items()
        if owners[layer.stored_weight] == 1 and layer.active and layer.changes(layer.active)
    }
    if not changed:
        got = f"{len(layers)} of which none is changed" if layers else "no adapted layer with such a weight"
        raise ValueError(f"into: expected active adapters that change weights stored in 4 bits, got {got}")
    return changed
