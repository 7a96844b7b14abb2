"""Which tensors of a model's base an adapter's file may hold."""

import warnings

import torch
from torch import nn

from lowbit import QuantizedTensor, models
from lowbit.adapted import Adapted, base_of, buffers_of, changed, module_names

from .layers import LoRABaseLayer, SavedModule


def of_base(model: nn.Module, parts: dict[str, Adapted]) -> dict[str, torch.Tensor]:
    """What an adapter's file may hold of the base itself: buffers, and tables of embeddings with LoRA, as PEFT adds."""
    ends = {base_of(module) for module in models.embeddings(model)}
    tables = {
        f"{name}.base_layer.weight": part.base.weight
        for name, part in parts.items()
        if isinstance(part, LoRABaseLayer) and part.base in ends and not isinstance(part.base.weight, QuantizedTensor)
    }
    return buffers_of(model) | tables


def warn_of_other_base(values: dict[str, torch.Tensor], base: dict[str, torch.Tensor], file: str) -> None:
    """Warn if what a file holds of the base is not what the model has, which a further adapter does not change."""
    other = changed(values, base)
    if other:
        warnings.warn(
            f"{file}: the adapter was trained on other values of {', '.join(other)}; the model keeps its own, which "
            "its first adapter uses too",
            stacklevel=3,
        )


def whole_embeddings(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the embedding and of the output layer, decoded; none of those that are modules to save."""
    names = module_names(model)
    found = {}
    for module in models.embeddings(model):
        if module in names and not isinstance(module, SavedModule):
            stem = names[module][0] + (".base_layer" if isinstance(module, LoRABaseLayer) else "")
            for key, tensor in base_of(module).state_dict().items():
                found[f"{stem}.{key}"] = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
    return found
