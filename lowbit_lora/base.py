"""What an adapter's file keeps of the base: by what to know it again, and what training has changed in it."""

import warnings
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import nn

from lowbit import QuantizedTensor

from . import hf
from .layers import Adapted, LoRABaseLayer, SavedModule
from .targets import base_of, module_names, walk

#: Buffers of more elements are no statistics.
_LARGE = 2**22


def fingerprint(model: nn.Module, saved: Container[str]) -> dict[str, Any]:
    """The base's name, its config's shape, and a few values of weights that adapters leave alone, ready for JSON.

    ``saved``: names of tensors that are in the adapter's file themselves.
    """
    weights = [(name, w) for name, w in _dense_weights(model, adapted=False).items() if name not in saved]
    chosen = {round(part / 4 * (len(weights) - 1)) for part in range(5)} if weights else ()
    return {
        "name": hf.described(model),
        "config": hf.shape_of_config(model),
        "weights": {weights[index][0]: _corners(weights[index][1]) for index in sorted(chosen)},
    }


def _dense_weights(model: nn.Module, *, adapted: bool) -> dict[str, torch.Tensor]:
    """The base's weights whose values can be read, by name; with those of modules that adapters change or without.

    Biases are left out, which may have trained.
    """
    found = {}
    for name, module in walk(model):
        if adapted or not isinstance(module, Adapted):
            for key, weight in base_of(module)._parameters.items():
                readable = weight is not None and not isinstance(weight, QuantizedTensor) and not weight.is_meta
                if readable and "bias" not in key and weight.is_floating_point() and weight.numel():
                    found[f"{name}.{key}" if name else key] = weight
    return {name: weight for name, weight in found.items() if not hasattr(weight, "full_tensor")}  # sharded


def _corners(weight: torch.Tensor) -> list[float]:
    """The first four values and the last four, with four digits."""
    first, last = (weight[0], weight[-1]) if weight.dim() > 1 else (weight, weight)
    values = torch.cat([first.detach().reshape(-1)[:4], last.detach().reshape(-1)[-4:]])
    return [float(f"{value:.4g}") for value in values.tolist()]


def warn_of_another_base(model: nn.Module, saved: dict[str, Any], folder: str) -> None:
    """Warn if the base differs from that of the file. A base in 16 bits is none that differs."""
    own, weights = hf.shape_of_config(model), _dense_weights(model, adapted=True)
    differing = [
        f"{key} is {value} there and {own[key]} here"
        for key, value in saved.get("config", {}).items()
        if own.get(key, value) != value
    ]
    for name, values in saved.get("weights", {}).items():
        if name in weights and not _close(_corners(weights[name]), values):
            differing.append(f"{name} has other values")
    if differing:
        warnings.warn(
            f"{folder}: the adapter was trained on {saved.get('name')}, and this base, {hf.described(model)}, is "
            f"another: {'; '.join(differing)}",
            stacklevel=4,
        )


def _close(values: list[float], saved: list[float]) -> bool:
    pairs = zip(values, saved, strict=False)
    return len(values) == len(saved) and all(abs(one - other) <= 1e-6 + 0.01 * abs(other) for one, other in pairs)


def base_keys(module: nn.Module, name: str = "", key: str = "") -> Iterator[tuple[str, str]]:
    """``(name, key)`` of each parameter and buffer of the base: its name without adapters, and its key with them."""
    if isinstance(module, Adapted):
        for own, child in module._modules.items():  # the base, or a nested layer that holds it
            if child is module.base or isinstance(child, Adapted) and child.base is module.base:
                yield from base_keys(child, name, f"{key}{own}.")
        return
    for own in (*module._parameters, *module._buffers):
        yield name + own, key + own
    for own, child in module._modules.items():
        if child is not None:
            yield from base_keys(child, f"{name}{own}.", f"{key}{own}.")


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's buffers that training may move (batch norm's statistics), by name.

    Those of modules to save are none of them, nor large ones: some layers keep their weights in buffers.
    """
    found: dict[torch.Tensor, str] = {}
    for name, module in walk(model):
        if not isinstance(module, Adapted):
            for key, buffer in module._buffers.items():
                kept = buffer is not None and key not in module._non_persistent_buffers_set
                if kept and buffer.numel() <= _LARGE and not buffer.is_meta:
                    found.setdefault(buffer, f"{name}.{key}" if name else key)
    return {name: buffer for buffer, name in found.items()}


def moved_buffers(model: nn.Module, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base's buffers that are not what they were at the start (up to a cast, if the model was cast)."""
    found = {}
    for name, buffer in buffers_of(model).items():
        if name in start and not torch.equal(start[name].to(buffer), buffer):
            found[name] = buffer
    return found


def of_base(model: nn.Module, parts: dict[str, Adapted]) -> dict[str, torch.Tensor]:
    """What the file of an adapter may hold of the base itself, by PEFT's keys without their prefix.

    That is, its buffers and the tables of embeddings that have LoRA, which PEFT adds.
    """
    ends = {base_of(module) for module in (hf.input_embedding(model), hf.output_embedding(model)) if module is not None}
    tables = {
        f"{name}.base_layer.weight": part.base.weight
        for name, part in parts.items()
        if isinstance(part, LoRABaseLayer) and part.base in ends and not isinstance(part.base.weight, QuantizedTensor)
    }
    return buffers_of(model) | tables


def warn_of_other_base(values: dict[str, torch.Tensor], base: dict[str, torch.Tensor], file: str) -> None:
    """Warn if what a file holds of the base is not what the model has, which a further adapter does not change."""
    other = [key for key, tensor in base.items() if key in values and not torch.equal(values[key].to(tensor), tensor)]
    if other:
        warnings.warn(
            f"{file}: the adapter was trained on other values of {', '.join(other)}; the model keeps its own, which "
            "its first adapter uses too",
            stacklevel=3,
        )


def whole_embeddings(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the embedding and of the output layer, by PEFT's keys; none of those that are modules to save."""
    modules = {module: names[0] for module, names in module_names(model).items()}
    found = {}
    for module in (hf.input_embedding(model), hf.output_embedding(model)):
        if module in modules and not isinstance(module, SavedModule):
            inner = ".base_layer" if isinstance(module, LoRABaseLayer) else ""
            for key, tensor in base_of(module).state_dict().items():
                decoded = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
                found[f"{modules[module]}{inner}.{key}"] = decoded
    return found
