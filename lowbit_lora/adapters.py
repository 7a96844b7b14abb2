"""Several adapters on one model: adding one to layers that have LoRA, and to layers that have none yet."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from . import dense, hf
from .combine import combine
from .config import LoraConfig, QLoRAConfig
from .conversion import adapter_of, new_layer, spelled_out, swap
from .layers import Adapter, LoRABaseLayer
from .targets import base_of, check_patterns, find_targets


def layer_names(model: nn.Module) -> list[str]:
    """The canonical names of the layers with LoRA."""
    return [name for name, module in model.named_modules() if isinstance(module, LoRABaseLayer)]


def parameters(layer: LoRABaseLayer) -> Iterator[nn.Parameter]:
    """The factors of all adapters of a layer."""
    for name in layer.adapters:
        yield from layer.factors(name)


def check_not_merged(layer: LoRABaseLayer) -> None:
    """ValueError if adapters are merged into the base of a layer."""
    if layer.merged:
        raise ValueError(f"adapters: expected none that is merged, got {', '.join(layer.merged)}; unmerge first")


def check_new_name(name: str, configs: dict[str, LoraConfig]) -> None:
    """An error unless ``name`` can be that of a new adapter: of a submodule and of a folder."""
    if not isinstance(name, str):
        raise TypeError(f"adapter: expected a name, got {name!r}")
    if name in configs:
        raise ValueError(f"adapter: expected a new name, got {name!r}, which is there")
    if not name or any(character in name for character in "./\\"):
        raise ValueError(f"adapter: expected a name without dots and slashes, got {name!r}")


def add(model: nn.Module, name: str, config: LoraConfig, configs: dict[str, LoraConfig]) -> LoraConfig:
    """Add an adapter to the layers that a config names; returns the config with its targets spelled out.

    Raises:
        ValueError, TypeError: see :meth:`lowbit_lora.LoraModel.add_adapter`. Nothing has changed then.
    """
    check_new_name(name, configs)
    first = next(iter(configs.values()))
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected a LoraConfig, got {type(config).__name__}")
    if isinstance(config, QLoRAConfig) and (not isinstance(first, QLoRAConfig) or config.spec != first.spec):
        stored = first.spec if isinstance(first, QLoRAConfig) else "a dense base"
        raise ValueError(f"config: expected how the base is stored ({stored}), got {config.spec}; take a LoraConfig")
    if config.modules_to_save or config.bias != "none":
        raise ValueError(
            "config: expected no modules_to_save and bias='none' in a further adapter, got "
            f"modules_to_save={config.modules_to_save} and bias={config.bias!r}: the model has one set, the first's"
        )
    saved = {m for entry in first.modules_to_save or [] for m in model.get_submodule(entry).modules()}
    head = hf.output_embedding(model)
    targets = find_targets(model, config, saved, {base_of(head)} if head is not None else set())
    check_patterns(config, list(targets.values()))
    fresh = {module: new_layer(module) for module in targets if not isinstance(module, LoRABaseLayer)}
    added = []
    try:
        for module, layer_name in targets.items():
            layer = fresh.get(module, module)
            layer.add_adapter(name, adapter_of(config, layer_name), init=config.init_lora_weights)
            added.append(layer)
            for parameter in layer.factors(name):
                parameter.requires_grad_(False)
        swap(model, fresh)
    except BaseException:
        for layer in added:
            layer.delete_adapter(name)
        raise
    dense.adopt(model)
    return dataclasses.replace(config, target_modules=spelled_out(config, targets))


@torch.no_grad()
def add_weighted(
    layers: dict[str, LoRABaseLayer], names: list[str], weights: list[float], new: str, config: LoraConfig, **options
) -> LoraConfig:
    """Add an adapter that stands for several to each layer that has one of them; returns its config.

    A layer without an adapter leaves that out of its sum. ``options`` are those of :func:`lowbit_lora.combine.combine`.

    Raises:
        ValueError, TypeError: see there; the layer is named. Nothing has changed then.
    """
    made = {}
    for layer_name, layer in layers.items():
        own = [(name, weight) for name, weight in zip(names, weights, strict=True) if name in layer.adapters]
        if own:
            factors = [(*(f.flatten(1) for f in layer.factors(name)), layer.adapters[name].scaling) for name, _ in own]
            try:
                made[layer_name] = combine(factors, [weight for _, weight in own], **options)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{layer_name}: {error}") from error
    for layer_name, values in made.items():
        layer, rank = layers[layer_name], len(values[0])
        layer.add_adapter(new, Adapter(rank, rank))  # a scaling of 1
        for factor, value in zip(layer.factors(new), values, strict=True):
            factor.copy_(value.view(factor.shape))
            factor.requires_grad_(False)
    ranks = {name: len(lora_a) for name, (lora_a, _) in made.items()}
    rank = max(ranks.values())
    others = {name: value for name, value in ranks.items() if value != rank} or None
    plain = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    return LoraConfig(
        **plain
        | {
            "rank": rank,
            "lora_alpha": rank,
            "target_modules": sorted(made),
            "rank_pattern": others,
            "alpha_pattern": others,
            "task_type": config.task_type,
        }
    )


def unwrap(model: nn.Module, names: Iterable[str]) -> None:
    """Put the base back in the place of layers without adapters."""
    layers = [model.get_submodule(name) for name in names]
    swap(model, {layer: layer.base_layer for layer in layers if not layer.adapters})
