"""Which modules of a model a config means: the targets of LoRA and the modules to save."""

from collections.abc import Container

from torch import nn

from lowbit import models
from lowbit.adapted import Adapted, base_of, module_names, walk
from lowbit.lowrank import is_decomposing
from lowbit.names import check_patterns, find, narrowed, what_there_is

from .config import LoraConfig
from .layers import LoRABaseLayer, LoRALinear, layer_class


def lora_layers(parts: dict[str, Adapted]) -> dict[str, LoRABaseLayer]:
    """Those of the modules with adapters that have LoRA."""
    return {name: part for name, part in parts.items() if isinstance(part, LoRABaseLayer)}


def output_layers(model: nn.Module) -> set[nn.Module]:
    """The base of the layer that maps hidden states to the vocabulary, if there is one."""
    return {base_of(module) for module in [models.output_embedding(model)] if module is not None}


def is_all_linear(wanted: str | list[str]) -> bool:
    """Whether target_modules means every linear layer."""
    return isinstance(wanted, str) and wanted.lower() == "all-linear"


def find_targets(
    model: nn.Module, config: LoraConfig, excluded: set[nn.Module], heads: set[nn.Module], may_be_missing: bool
) -> dict[nn.Module, str]:
    """The layers that get LoRA, with their canonical names.

    Args:
        excluded: modules that never are targets (those to save).
        heads: layers that "all-linear" leaves out.
        may_be_missing: an entry of a list may match nothing, if another does.

    Raises:
        ValueError: see :func:`lowbit.names.find` and :func:`lowbit.names.narrowed`.
        TypeError: a matched module is of a kind that LoRA is not for.
    """
    wanted = config.target_modules
    places = {module: names for module, names in module_names(model).items() if module not in excluded}
    linears = {module: names[0] for module, names in places.items() if LoRALinear.takes(base_of(module))}
    hint = what_there_is(linears.values(), "torch.nn.Linear layer")
    if is_all_linear(wanted):
        targets = {module: name for module, name in linears.items() if base_of(module) not in heads}
    else:
        is_list = not isinstance(wanted, str)
        targets = find("target_modules", wanted, places, hint, wanted if may_be_missing and is_list else ())
    if not targets and (is_all_linear(wanted) or not config.target_parameters):
        raise ValueError(f"target_modules: {wanted!r} matches nothing; {hint}")
    if targets:
        targets = narrowed(targets, config.exclude_modules, config.layers_to_transform, config.layers_pattern or ())
    for module, name in targets.items():
        if layer_class(base_of(module)) is None:
            raise TypeError(
                "target_modules: expected layers such as torch.nn.Linear, embeddings, convolutions and "
                f"torch.nn.MultiheadAttention, but {name!r} is a {type(module).__name__}; {hint}"
            )
    return targets


def find_parameters(
    model: nn.Module, config: LoraConfig, excluded: set[nn.Module], may_be_missing: bool
) -> dict[nn.Module, tuple[str, list[str]]]:
    """The modules of the parameters that get LoRA: module -> (its canonical name, the parameters' names in its order).

    The arguments and errors are those of :func:`find_targets`, with target_parameters.
    """
    wanted = config.target_parameters or []
    modules = {module: names for module, names in module_names(model).items() if module not in excluded}
    places, stacks = {}, []  # (module, parameter's name) -> all names of the parameter
    for module, names in modules.items():
        for key, parameter in base_of(module)._parameters.items():
            if parameter is not None:
                places[module, key] = [f"{name}.{key}" for name in names]
                stacks += places[module, key][:1] if parameter.dim() == 3 else []
    hint = what_there_is(stacks, "stack of experts' weights")
    chosen = find("target_parameters", wanted, places, hint, wanted if may_be_missing else ())
    targets: dict[nn.Module, tuple[str, list[str]]] = {}
    for module, key in places:
        if (module, key) in chosen:
            targets.setdefault(module, (modules[module][0], []))[1].append(key)
    return targets


def find_saved(model: nn.Module, wanted: list[str], may_be_missing: Container[str] = ()) -> dict[nn.Module, str]:
    """The modules that train in full and are saved, outermost ones only, with their canonical names.

    Raises:
        ValueError: an entry outside ``may_be_missing`` matches nothing.
    """
    hint = f"the model's own parts are: {', '.join(name for name, _ in model.named_children())}"
    saved = find("modules_to_save", wanted, module_names(model), hint, may_be_missing)
    inner = {sub for module in saved for _, sub in walk(module) if sub is not module}
    return {module: name for module, name in saved.items() if module not in inner}


def check_found(config: LoraConfig, targets: dict[nn.Module, str], stacks: dict[nn.Module, tuple]) -> None:
    """ValueError if there is nothing to adapt, or a key of a pattern, or init_lora_weights, does not fit it."""
    if not targets and not stacks:
        raise ValueError(f"target_parameters: {config.target_parameters} match nothing")
    names = [*targets.values(), *(f"{name}.{key}" for name, keys in stacks.values() for key in keys)]
    for field in ("rank_pattern", "alpha_pattern"):
        check_patterns(field, getattr(config, field) or {}, names)
    without_weight = [*stacks, *(module for module in targets if not hasattr(base_of(module), "weight"))]
    if is_decomposing(config.init_lora_weights) and without_weight:
        raise ValueError(
            "init_lora_weights: expected one that leaves the base alone for target_parameters and "
            f"torch.nn.MultiheadAttention, got {config.init_lora_weights!r}"
        )
