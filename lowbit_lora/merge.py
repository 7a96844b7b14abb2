"""Merging adapters into the base for good, into dense weights or into quantized ones."""

import warnings
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm

from lowbit import QuantizedTensor
from lowbit.adapted import Adapted, adapted_modules
from lowbit.modules import decoded_weights, replace_modules, replace_weights
from lowbit.quantizers.requantize import Quantizer, Survival, check_survivals

from .layers import LoRABaseLayer, SavedModule, TrainedTokens


@torch.no_grad()
def merge_all(
    model: nn.Module,
    names: Iterable[str],
    decode: bool,
    safe: bool,
    dtype: torch.dtype | None,
    quantizer: Quantizer | None,
    minimum_cosine: float,
) -> list[Survival]:
    """Put the base back in the place of each module with adapters, with these adapters merged in.

    See :meth:`lowbit_lora.LoraModel.merge_and_unload` for the rest. Returns, with a quantizer, what is left of the
    change of each layer. Where it raises an error, nothing has changed.

    ``decode``: decode the quantized weights of all other layers too. A shared one becomes a shared dense one.
    """
    names = tuple(names)
    parts = adapted_modules(model)
    merged: dict[Adapted, dict[str, torch.Tensor]] = {}
    trained: dict[torch.Tensor, torch.Tensor] = {}  # of modules to save: what tied ones share, they share afterwards
    survivals: list[Survival] = []
    for name, part in tqdm(parts.items(), "Merging", leave=False, disable=None):
        tensors = {} if isinstance(part, TrainedTokens) and part.tied_to else part.merged_tensors(names)
        if safe and not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"{name}: expected finite merged weights, got NaN or inf")
        if isinstance(part, SavedModule) and tensors:
            sources = part.adapter_tensors(part.check_active(names)[0])
            tensors = {key: trained.setdefault(sources[key], tensor) for key, tensor in tensors.items()}
        elif isinstance(part, LoRABaseLayer) and part.weight_name in tensors:
            if quantizer is not None and isinstance(part.stored_weight, QuantizedTensor):
                tensors[part.weight_name], survival = part.requantized(names, quantizer, name)
                survivals.append(survival)
            elif dtype is not None:
                tensors[part.weight_name] = nn.Parameter(tensors[part.weight_name].to(dtype), requires_grad=False)
        merged[part] = tensors
    for part in merged:
        if isinstance(part, TrainedTokens) and part.tied_to:
            merged[part] = merged[part.tied_to]
    check_survivals(survivals, minimum_cosine)
    bases = {inner for part in parts.values() for inner in part.base.modules()}
    others = [p for m in model.modules() if m not in bases for p in m._parameters.values()]
    decode = decode and quantizer is None
    dense_weights = decoded_weights(p for p in others if decode and isinstance(p, QuantizedTensor))
    _warn_of_untying(model, merged)
    for part, tensors in merged.items():
        _put(part.base, tensors)
    replace_weights(model, dense_weights)
    replace_modules(model, {part: part.base for part in merged})
    return survivals


def _put(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Let a module hold these parameters and buffers, given by their dotted names."""
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        owner = module.get_submodule(owner)
        (owner._buffers if key in owner._buffers else owner._parameters)[key] = tensor


def _warn_of_untying(model: nn.Module, merged: dict[Adapted, dict[str, torch.Tensor]]) -> None:
    """Warn of each weight that a layer with LoRA shares with another module."""
    owners = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, part in adapted_modules(model).items():
        if isinstance(part, LoRABaseLayer) and merged[part] and owners[part.base._parameters.get(part.weight_name)] > 1:
            warnings.warn(
                f"{name}.{part.weight_name} is tied to that of another layer; merging unties them. Set "
                "config.tie_word_embeddings = False before saving the merged model",
                stacklevel=5,
            )
