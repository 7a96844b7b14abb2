"""Which modules of a model a config means: the targets of LoRA and the modules to save."""

import re

from torch import nn

from .config import LoraConfig
from .layers import LoRABaseLayer, LoRALinear, layer_class

ALL_LINEAR = "all-linear"
_MAX_LISTED = 30


def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module below ``model`` with its names; a shared module has several, the first is canonical.

    A layer that has LoRA stands for its base, whose inside has no names.
    """
    names: dict[nn.Module, list[str]] = {}
    wrapped: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if name and not any(name.startswith(prefix) for prefix in wrapped[-1:]):
            names.setdefault(module, []).append(name)
            if isinstance(module, LoRABaseLayer):
                wrapped.append(name + ".")
    return names


def find_targets(
    model: nn.Module, config: LoraConfig, excluded: set[nn.Module], heads: set[nn.Module]
) -> dict[nn.Module, str]:
    """The layers that get LoRA, with their canonical names.

    Args:
        config: target_modules, exclude_modules, layers_to_transform and layers_pattern count.
        excluded: modules that never are targets (those to save).
        heads: layers that "all-linear" leaves out.

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
            if not found:
                raise ValueError(f"target_modules: {pattern!r} matches nothing; {_what_there_is(linears)}")
            targets |= found
    targets = _narrowed(targets, config)
    for module, name in targets.items():
        if layer_class(base_of(module)) is None:
            raise TypeError(
                "target_modules: expected linear layers, embeddings and convolutions, such as torch.nn.Linear, but "
                f"{name!r} is a {type(module).__name__}; {_what_there_is(linears)}"
            )
    return targets


def base_of(module: nn.Module) -> nn.Module:
    """The base of a layer with LoRA; any other module itself."""
    return module.base_layer if isinstance(module, LoRABaseLayer) else module


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


def find_saved(model: nn.Module, wanted: list[str], may_be_missing: tuple[str, ...]) -> dict[nn.Module, str]:
    """The modules that train in full and are saved, outermost ones only, with their canonical names.

    Raises:
        ValueError: an entry outside ``may_be_missing`` matches nothing.
    """
    names = module_names(model)
    saved = {}
    for entry in wanted:
        found = {m: all_names[0] for m, all_names in names.items() if any(map(_suffix(entry), all_names))}
        if not found and entry not in may_be_missing:
            top = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"modules_to_save: {entry!r} matches nothing; the model's own parts are: {top}")
        saved |= found
    inner = {sub for module in saved for sub in module.modules() if sub is not module}
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


def _what_there_is(linears: dict[nn.Module, list[str]]) -> str:
    # Layers repeat: their names without the numbers say the same in a few lines.
    short = sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", names[0]) for names in linears.values()})
    if not short:
        return "the model has no torch.nn.Linear layer"
    more = f" and {len(short) - _MAX_LISTED} more" if len(short) > _MAX_LISTED else ""
    return f"what could be matched (* stands for a number): {', '.join(short[:_MAX_LISTED])}{more}"
