"""The tensors of a model's base by the names that they have without adapters."""

from collections.abc import Iterator

import torch
from torch import nn

from .places import Adapted, base_of, walk

#: Buffers of more elements are no statistics.
_LARGE = 2**22


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


def weights_of(model: nn.Module, *, adapted: bool) -> dict[str, torch.Tensor]:
    """The base's parameters but biases, which may have trained; with or without those of modules with adapters."""
    found = {}
    for name, module in walk(model):
        if adapted or not isinstance(module, Adapted):
            for key, weight in base_of(module)._parameters.items():
                if weight is not None and "bias" not in key:
                    found[f"{name}.{key}".removeprefix(".")] = weight
    return found


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
                    found.setdefault(buffer, f"{name}.{key}".removeprefix("."))
    return {name: buffer for buffer, name in found.items()}


def changed(values: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those tensors that are not what ``values`` says (up to a cast, if the model was cast)."""
    return {
        key: tensor
        for key, tensor in tensors.items()
        if key in values and not torch.equal(values[key].to(tensor), tensor)
    }
