"""Operations on the adapters of a model: their names, their tensors, and weighted sums of them."""

import dataclasses
import math

import torch
from torch import nn

from lowbit.lowrank import combine, is_decomposing

from . import hf
from .base import moved_buffers, of_base, warn_of_other_base, whole_embeddings
from .config import LoraConfig, QLoRAConfig
from .files import PREFIX, fit
from .layers import LoRABaseLayer, LoRAExperts, TrainedTokens
from .targets import adapted_modules, base_of, module_names
from .wrap import adapter_of, trainable_biases


def check_new_name(name: str, configs: dict[str, LoraConfig]) -> None:
    """An error unless ``name`` can be that of a new adapter: of a submodule and of a folder."""
    if not isinstance(name, str):
        raise TypeError(f"adapter: expected a name, got {name!r}")
    if name in configs:
        raise ValueError(f"adapter: expected a new name, got {name!r}, which is there")
    if not name or any(character in name for character in "./\\"):
        raise ValueError(f"adapter: expected a name without dots and slashes, got {name!r}")


def tensors_of(model: nn.Module, name: str, bias: str = "none") -> dict[str, torch.Tensor]:
    """What an adapter's file holds, by PEFT's keys without their prefix; the tensors are the model's own."""
    tensors: dict[str, torch.Tensor] = dict(trainable_biases(model, bias))
    for module_name, part in adapted_modules(model).items():
        tensors |= {f"{module_name}.{key}": tensor for key, tensor in part.adapter_tensors(name).items()}
    return tensors


def to_save(
    model: nn.Module, name: str, config: LoraConfig, start: dict[str, torch.Tensor], embeddings: bool = False
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The config and the tensors, by PEFT's keys without their prefix, of an adapter's files.

    ``start``: the base's buffers before training; those that have moved are saved. ``embeddings``: save the embedding
    and the output layer whole.

    Where the factors were taken out of a dense base (PiSSA, OLoRA), what is saved is the difference to the first ones:
    plain LoRA of twice the rank, which fits the base as it was.
    """
    tensors = moved_buffers(model, start) | (whole_embeddings(model) if embeddings else {})
    tensors = {key: _whole(key, tensor) for key, tensor in (tensors | tensors_of(model, name, config.bias)).items()}
    if not is_decomposing(config.init_lora_weights) or isinstance(config, QLoRAConfig):
        return config, tensors
    for layer_name, part in adapted_modules(model).items():
        if isinstance(part, LoRABaseLayer) and name in part.initial:
            (key_a, a), (key_b, b) = list(part.adapter_tensors(name).items())[:2]
            first_a, first_b = part.initial[name]
            tensors[f"{layer_name}.{key_a}"] = torch.cat([a.detach(), first_a.view(a.shape).to(a)])
            tensors[f"{layer_name}.{key_b}"] = torch.cat([b.detach(), -first_b.view(b.shape).to(b)], 1)
    doubled = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    factor = math.sqrt(2) if config.use_rslora else 2
    alphas = {key: factor * alpha for key, alpha in (config.alpha_pattern or {}).items()}
    config = dataclasses.replace(
        config,
        rank=2 * config.rank,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern=doubled or None,
        alpha_pattern=alphas or None,
        init_lora_weights="default",
    )
    return config, tensors


def _whole(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 has spread over ranks, gathered: all ranks have to ask. ValueError for one that cannot be."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    if ".lora_" in key and (tensor.numel() == 0 or (tensor.dim() < 2 and ("_A." in key or "_B.weight" in key))):
        raise ValueError(
            f"{key}: expected a whole parameter, got one rank's part of shape {tuple(tensor.shape)}; save inside "
            "FSDP.summon_full_params(model) or deepspeed.zero.GatheredParameters(...)"
        )
    return tensor


def with_saved_of_file(model: nn.Module, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> LoraConfig:
    """``config`` with those modules to save whose values are in an adapter's file.

    PEFT's files list ends of names ("classifier" also means "pre_classifier") and names that a model does not have, and
    may hold whole embeddings that no list names (``save_embedding_layers``).
    """
    keys = {key.removeprefix(PREFIX) for key in tensors}
    listed = tuple(config.modules_to_save or ())
    embeddings = {base_of(m) for m in (hf.input_embedding(model), hf.output_embedding(model)) if m is not None}
    saved = []
    for module, names in module_names(model).items():
        name = next((name for name in names if any(key.startswith(f"{name}.") for key in keys)), None)
        ends = name is not None and name.endswith(listed) and bool(listed)
        own = name is not None and {f"{name}.{key}" for key in base_of(module).state_dict()}
        if name and (ends or base_of(module) in embeddings) and own and own <= keys:
            saved.append(name)
    return dataclasses.replace(config, modules_to_save=saved or None)


@torch.no_grad()
def swap_values(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    old: LoraConfig,
    tensors: dict[str, torch.Tensor],
    file: str,
) -> None:
    """Put a saved adapter's values in the place of another's, in its memory.

    Its ranks may be smaller: the rest becomes zeros. Each layer's scaling stays, so that nothing that was captured with
    it (a CUDA graph) changes; B takes up the difference.

    Raises:
        ValueError: a module is missing or unexpected, or a rank is larger. Nothing has changed then.
    """
    expected = tensors_of(model, name, old.bias)
    shapes = dict(expected)
    values = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    scalings = {}
    for layer_name, part in adapted_modules(model).items():
        if not isinstance(part, LoRABaseLayer) or name not in part.adapters:
            continue
        for key, target in part.adapter_tensors(name).items():
            key, value = f"{layer_name}.{key}", values.get(f"{layer_name}.{key}")
            if value is not None and value.dim() == target.dim():
                if isinstance(part, LoRAExperts) and value.shape != target.shape:
                    raise ValueError(
                        f"{file}: {key}: expected the rank of adapter {name!r}, {part.adapters[name].rank}, by which "
                        f"the experts lie in it, got shape {tuple(value.shape)} for {tuple(target.shape)}"
                    )
                if any(size > space for size, space in zip(value.shape, target.shape, strict=True)):
                    raise ValueError(
                        f"{file}: {key}: expected at most the shape {tuple(target.shape)} of adapter {name!r}, whose "
                        f"memory it would take, got {tuple(value.shape)}"
                    )
                shapes[key] = value
        scalings[layer_name] = adapter_of(config, layer_name, part).scaling / part.adapters[name].scaling
    base = of_base(model, adapted_modules(model))
    fitting = fit(tensors, shapes, model, file, optional=base)
    warn_of_other_base(fitting, base, file)
    for key, target in expected.items():
        value = fitting[key]
        layer_name, _, kind = key.partition(".lora_")
        if kind.startswith(("B", "embedding_B")):
            value = value * scalings[layer_name]
        target.zero_()
        target[tuple(slice(size) for size in value.shape)].copy_(value)


@torch.no_grad()
def add_weighted(
    model: nn.Module, names: list[str], weights: list[float], new: str, saved_from: str | None = None, **options
) -> LoraConfig:
    """Add an adapter that stands for several to each layer that has one of them; returns its config.

    A layer without an adapter leaves that out of its sum. What is trained whole (modules to save, single rows) is
    copied from ``saved_from``, by default from the first of ``names`` that has it. ``options`` are those of
    :func:`lowbit.lowrank.combine`.

    Raises:
        ValueError, TypeError: see there; the layer is named. Nothing has changed then.
    """
    parts = adapted_modules(model)
    layers = {name: part for name, part in parts.items() if isinstance(part, LoRABaseLayer)}
    sources = {}
    for module_name, part in parts.items():
        owners = [name for name in ([saved_from] if saved_from else names) if name in part.adapters]
        if module_name in layers or not owners:
            continue
        sources[module_name] = owners[0]
    made = {}
    for layer_name, layer in layers.items():
        own = [(name, weight) for name, weight in zip(names, weights, strict=True) if name in layer.adapters]
        if own:
            if isinstance(layer, LoRAExperts):
                raise ValueError(f"{layer_name}: expected adapters without target_parameters to combine, as in PEFT")
            if any(layer.adapters[name].use_dora or layer.adapters[name].lora_bias for name, _ in own):
                raise ValueError(f"{layer_name}: expected adapters without DoRA and lora_bias to combine")
            factors = [(*(f.flatten(1) for f in layer.factors(name)), layer.adapters[name].scaling) for name, _ in own]
            try:
                made[layer_name] = combine(factors, [weight for _, weight in own], **options)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{layer_name}: {error}") from error
    for layer_name, values in made.items():
        layer, rank = layers[layer_name], len(values[0])
        dtype = next(factor.dtype for name in names if name in layer.adapters for factor in layer.factors(name))
        layer.add_adapter(new, layer.adapter_type(rank, rank), dtype)
        lora_a, lora_b = values
        for factor, value in zip(layer.factors(new), (lora_a, lora_b / layer.adapters[new].scaling), strict=True):
            factor.copy_(value.view(factor.shape))
            factor.requires_grad_(False)
    saved, rows = [], {}
    for module_name, source in sources.items():
        part = parts[module_name]
        if isinstance(part, TrainedTokens):
            rows[module_name] = part.adapters[source].tolist()
            part.add_adapter(new, rows[module_name])
        else:
            saved.append(module_name)
            part.add_adapter(new)
        for key, target in part.adapter_tensors(new).items():
            target.copy_(part.adapter_tensors(source)[key]).requires_grad_(False)
    # The config names an attention layer once, for both of its parts.
    nested = {f"{name}.{key}" for name, layer in layers.items() for key in layer.nested()}
    ranks = {name: len(lora_a) for name, (lora_a, _) in made.items() if name not in nested}
    rank = max(ranks.values())
    others = {name: value for name, value in ranks.items() if value != rank} or None
    return dataclasses.replace(
        LoraConfig(),
        rank=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=others,
        modules_to_save=saved or None,
        trainable_token_indices=rows or None,
    )
