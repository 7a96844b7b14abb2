"""Which modules of a model a config means: the targets of LoRA and the modules to save."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .config import LoraConfig
from .layers import Adapted, LoRALinear, layer_class

ALL_LINEAR = "all-linear"
_MAX_LISTED = 30


#: The names under which wrappers hold a module: of torch.compile, FSDP and torch's checkpoint wrapper.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``module``, and it, with each of its names.

    The names are without those that wrappers (compile, DDP, FSDP, checkpointing) put in. What holds adapters stands for
    its base; nothing inside it has a name.
    """
    yield name, module
    if isinstance(module, Adapted):
        return
    is_ddp = isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    for key, child in module._modules.items():
        if child is not None:
            wrapped = key in _WRAPPED or (is_ddp and key == "module")
            yield from walk(child, name if wrapped else f"{name}.{key}" if name else key)


def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module below ``model`` with its names; a shared module has several, the first is canonical."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in walk(model):
        if name:
            names.setdefault(module, []).append(name)
    return names


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """What holds adapters in a model, by canonical name: also what is nested in another's place."""
    found = {names[0]: module for module, names in module_names(model).items() if isinstance(module, Adapted)}
    for name, module in list(found.items()):
        found |= {f"{name}.{key}": inner for key, inner in module.nested().items()}
    return found


def find_targets(
    model: nn.Module,
    config: LoraConfig,
    excluded: set[nn.Module],
    heads: set[nn.Module],
    *,
    may_be_missing: bool = False,
) -> dict[nn.Module, str]:
    """The layers that get LoRA, with their canonical names.

    Args:
        config: target_modules, exclude_modules, layers_to_transform and layers_pattern count.
        excluded: modules that never are targets (those to save).
        heads: layers that "all-linear" leaves out.
        may_be_missing: an entry of a list may match nothing, if another does.

    Raises:
        ValueError: the pattern, or one entry of a list, matches nothing, or is no regular expression.
        TypeError: a matched module is of a kind that LoRA is not for.
    """
    wanted = config.target_modules
    names = {module: all_names for module, all_names in module_names(model).items() if module not in excluded}
    linears = {module: all_names for module, all_names in names.items() if LoRALinear.takes(base_of(module))}
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        targets = {module: all_names[0] for module, all_names in linears.items() if base_of(module) not in heads}
        if not targets:
            raise ValueError(f"target_modules: 'all-linear' matches nothing; {_what_there_is(linears)}")
    else:
        targets = {}
        for pattern in [wanted] if isinstance(wanted, str) else wanted:
            matches = _matcher("target_modules", wanted if isinstance(wanted, str) else [pattern])
            found = {m: all_names[0] for m, all_names in names.items() if any(map(matches, all_names))}
            if not found and not (may_be_missing and not isinstance(wanted, str)):
                raise ValueError(f"target_modules: {pattern!r} matches nothing; {_what_there_is(linears)}")
            targets |= found
        if not targets and not config.target_parameters:
            raise ValueError(f"target_modules: {wanted!r} matches nothing; {_what_there_is(linears)}")
    targets = _narrowed(targets, config) if targets else {}
    for module, name in targets.items():
        if layer_class(base_of(module)) is None:
            raise TypeError(
                "target_modules: expected layers such as torch.nn.Linear, embeddings, convolutions and "
                f"torch.nn.MultiheadAttention, but {name!r} is a {type(module).__name__}; {_what_there_is(linears)}"
            )
    return targets


def find_parameters(
    model: nn.Module, config: LoraConfig, excluded: set[nn.Module], *, may_be_missing: bool = False
) -> dict[nn.Module, tuple[str, list[str]]]:
    """The modules of the parameters that get LoRA: module -> (its canonical name, the parameters' names in its order).

    Args:
        config: target_parameters counts.
        excluded: modules that never are targets (those to save).
        may_be_missing: an entry may match nothing.

    Raises:
        ValueError: an entry matches nothing.
    """
    modules = {module: names for module, names in module_names(model).items() if module not in excluded}
    here = {  # (module, parameter's name) -> all names of the parameter
        (module, key): [f"{name}.{key}" for name in names]
        for module, names in modules.items()
        for key, parameter in base_of(module)._parameters.items()
        if parameter is not None
    }
    chosen = set()
    for entry in config.target_parameters or ():
        found = {place for place, names in here.items() if any(map(_suffix(entry), names))}
        if not found and not may_be_missing:
            stacks = {(m, key): names for (m, key), names in here.items() if base_of(m)._parameters[key].dim() == 3}
            what = _what_there_is(stacks, "stack of experts' weights")
            raise ValueError(f"target_parameters: {entry!r} matches nothing; {what}")
        chosen |= found
    targets: dict[nn.Module, tuple[str, list[str]]] = {}
    for module, key in [place for place in here if place in chosen]:
        targets.setdefault(module, (modules[module][0], []))[1].append(key)
    return targets


def base_of(module: nn.Module) -> nn.Module:
    """The base of what holds adapters; any other module itself."""
    return module.base if isinstance(module, Adapted) else module


def _narrowed(targets: dict[nn.Module, str], config: LoraConfig) -> dict[nn.Module, str]:
    """The targets that exclude_modules and layers_to_transform leave; ValueError if those leave none."""
    left = targets
    if config.exclude_modules:
        excludes = _matcher("exclude_modules", config.exclude_modules)
        left = {module: name for module, name in left.items() if not excludes(name)}
        if len(left) == len(targets):
            raise ValueError(f"exclude_modules: {config.exclude_modules!r} matches none of {_few(targets.values())}")
    if config.layers_to_transform is not None:
        left = {m: name for m, name in left.items() if _block(name, config) in config.layers_to_transform}
    if not left:
        raise ValueError(
            f"target_modules: exclude_modules={config.exclude_modules} and layers_to_transform="
            f"{config.layers_to_transform} leave none of {_few(targets.values())}"
        )
    return left


def _block(name: str, config: LoraConfig) -> int | None:
    """The number of the block that a layer is in: the first in its name, or the first behind a layers_pattern."""
    lists = [re.escape(pattern) for pattern in config.layers_pattern or []]
    found = re.match(rf"(?:.*?\.)??(?:{'|'.join(lists) or '[^.]+'})\.(\d+)\.", name)
    return int(found[1]) if found else None


def pattern_value(patterns: dict, name: str, default):
    """The value of the first key of rank_pattern or alpha_pattern that matches a layer's name, else ``default``."""
    return next((value for key, value in patterns.items() if _ends_with(key, name)), default)


def check_patterns(config: LoraConfig, names: list[str]) -> None:
    """ValueError if a key of rank_pattern or alpha_pattern matches no layer that gets LoRA."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field) or {}:
            try:
                unused = not any(_ends_with(key, name) for name in names)
            except re.error as error:
                raise ValueError(f"{field}: expected names or regular expressions, got {key!r} ({error})") from error
            if unused:
                raise ValueError(f"{field}: {key!r} matches none of the layers with LoRA: {_few(names)}")


def _ends_with(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def find_saved(model: nn.Module, wanted: list[str], may_be_missing: tuple[str, ...] | None) -> dict[nn.Module, str]:
    """The modules that train in full and are saved, outermost ones only, with their canonical names.

    Raises:
        ValueError: an entry outside ``may_be_missing`` (None: any may be) matches nothing.
    """
    names = module_names(model)
    saved = {}
    for entry in wanted:
        found = {m: all_names[0] for m, all_names in names.items() if any(map(_suffix(entry), all_names))}
        if not found and may_be_missing is not None and entry not in may_be_missing:
            top = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"modules_to_save: {entry!r} matches nothing; the model's own parts are: {top}")
        saved |= found
    inner = {sub for module in saved for _, sub in walk(module) if sub is not module}
    return {module: name for module, name in saved.items() if module not in inner}


def _suffix(entry: str):
    return lambda name: name == entry or name.endswith("." + entry)


def _matcher(argument: str, wanted: str | list[str]):
    """What tells whether a name is meant: by one regular expression, or by a list of names and suffixes."""
    if not isinstance(wanted, str):
        matchers = [_suffix(entry) for entry in wanted]
        return lambda name: any(matches(name) for matches in matchers)
    try:
        return re.compile(wanted).fullmatch
    except re.error as error:
        raise ValueError(f"{argument}: expected a regular expression, got {wanted!r} ({error})") from error


def _few(names) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def _what_there_is(places: dict[Any, list[str]], kind: str = "torch.nn.Linear layer") -> str:
    # Layers repeat: their names without the numbers say the same in a few lines.
    short = sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", names[0]) for names in places.values()})
    if not short:
        return f"the model has no {kind}"
    more = f" and {len(short) - _MAX_LISTED} more" if len(short) > _MAX_LISTED else ""
    return f"what could be matched (* stands for a number): {', '.join(short[:_MAX_LISTED])}{more}"
