"""Which modules of a model a config means: the targets of LoRA and the modules to save."""

import re

from torch import nn

ALL_LINEAR = "all-linear"
_MAX_LISTED = 30


def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module below ``model`` with its names; a shared module has several, the first is canonical."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names.setdefault(module, []).append(name)
    return names


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is exactly nn.Linear. A subclass may compute something else with its weight."""
    return type(module) is nn.Linear


def find_targets(
    model: nn.Module, wanted: str | list[str], excluded: set[nn.Module], heads: set[nn.Module]
) -> dict[nn.Module, str]:
    """The layers that get LoRA, with their canonical names.

    Args:
        wanted: names or dotted suffixes, a regular expression for the whole name, or "all-linear".
        excluded: modules that never are targets (those to save).
        heads: layers that "all-linear" leaves out.

    Raises:
        ValueError: the pattern, or one entry of the list, matches nothing, or is no regular expression.
        TypeError: a matched module is not an nn.Linear.
    """
    names = {module: all_names for module, all_names in module_names(model).items() if module not in excluded}
    linears = {module: all_names for module, all_names in names.items() if is_plain_linear(module)}
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        targets = {module: all_names[0] for module, all_names in linears.items() if module not in heads}
        if not targets:
            raise ValueError(f"target_modules: 'all-linear' matches nothing; {_what_there_is(linears)}")
        return targets

    targets = {}
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        matches = _regex(pattern) if isinstance(wanted, str) else _suffix(pattern)
        found = {m: all_names[0] for m, all_names in names.items() if any(map(matches, all_names))}
        if not found:
            raise ValueError(f"target_modules: {pattern!r} matches nothing; {_what_there_is(linears)}")
        targets |= found
    for module, name in targets.items():
        if not is_plain_linear(module):
            raise TypeError(
                f"target_modules: expected layers of type torch.nn.Linear, but {name!r} is a "
                f"{type(module).__name__}; {_what_there_is(linears)}"
            )
    return targets


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


def _regex(pattern: str):
    try:
        return re.compile(pattern).fullmatch
    except re.error as error:
        raise ValueError(f"target_modules: expected a regular expression, got {pattern!r} ({error})") from error


def _what_there_is(linears: dict[nn.Module, list[str]]) -> str:
    # Layers repeat: their names without the numbers say the same in a few lines.
    short = sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", names[0]) for names in linears.values()})
    if not short:
        return "the model has no torch.nn.Linear layer"
    more = f" and {len(short) - _MAX_LISTED} more" if len(short) > _MAX_LISTED else ""
    return f"what could be matched (* stands for a number): {', '.join(short[:_MAX_LISTED])}{more}"
