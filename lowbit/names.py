"""Names of a model's modules and parameters: without those of wrappers, found by what a user wrote, and in errors."""

import re
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, TypeVar

from torch import nn

Place = TypeVar("Place")

#: The names under which wrappers hold a module: of torch.compile, FSDP and torch's checkpoint wrapper.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_MAX_LISTED = 30


def walk(module: nn.Module, leaves: type | tuple = (), name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``module``, and it, with each of its names; none below a module of the classes ``leaves``.

    The names are without those that wrappers (compile, DDP, FSDP, checkpointing) put in.
    """
    yield name, module
    if isinstance(module, leaves):
        return
    is_ddp = isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    for key, child in module._modules.items():
        if child is not None:
            wrapped = key in _WRAPPED or (is_ddp and key == "module")
            yield from walk(child, leaves, name if wrapped else f"{name}.{key}" if name else key)


def all_names(named: Iterable[tuple[str, nn.Module]]) -> dict[nn.Module, list[str]]:
    """Each module with all of its names, without that of the model itself, which is empty."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in named:
        if name:
            names.setdefault(module, []).append(name)
    return names


def first_names(named: Iterable[tuple[str, nn.Module]]) -> dict[nn.Module, str]:
    """Each module once, with its first name."""
    first: dict[nn.Module, str] = {}
    for name, module in named:
        first.setdefault(module, name)
    return first


def has_suffix(name: str, entry: str) -> bool:
    """Whether ``entry`` is ``name``, or what follows one of its dots."""
    return name == entry or name.endswith(f".{entry}")


def ends_with_pattern(name: str, pattern: str) -> bool:
    """Whether a regular expression matches all of ``name``, or all that follows one of its dots."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def block_number(name: str, lists: Iterable[str] = ()) -> int | None:
    """The first number in a layer's name, or the first that follows one of ``lists``: of the block that it is in."""
    before = "|".join(re.escape(entry) for entry in lists) or "[^.]+"
    found = re.match(rf"(?:.*?\.)??(?:{before})\.(\d+)\.", name)
    return int(found[1]) if found else None


def matcher(argument: str, wanted: str | list[str]) -> Callable[[str], bool]:
    """What tells whether a name is meant: by one regular expression for all of it, or by a list of names and suffixes.

    Raises:
        ValueError: no regular expression; ``argument`` is what the error calls it.
    """
    if not isinstance(wanted, str):
        return lambda name: any(has_suffix(name, entry) for entry in wanted)
    try:
        pattern = re.compile(wanted)
    except re.error as error:
        raise ValueError(f"{argument}: expected a regular expression, got {wanted!r} ({error})") from error
    return lambda name: pattern.fullmatch(name) is not None


def find(
    argument: str,
    wanted: str | list[str],
    places: dict[Place, list[str]],
    hint: str,
    may_be_missing: Container[str] = (),
) -> dict[Place, str]:
    """The places of which a name is meant, with the first name of each; ``wanted`` as in :func:`matcher`.

    Raises:
        ValueError: the regular expression, or an entry of the list outside ``may_be_missing``, matches nothing; the
            error ends in ``hint``.
    """
    found = {}
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        matches = matcher(argument, wanted if isinstance(wanted, str) else [entry])
        of_entry = {place: names[0] for place, names in places.items() if any(map(matches, names))}
        if not of_entry and entry not in may_be_missing:
            raise ValueError(f"{argument}: {entry!r} matches nothing; {hint}")
        found |= of_entry
    return found


def narrowed(
    found: dict[Place, str],
    exclude_modules: str | list[str] | None = None,
    layers_to_transform: Container[int] | None = None,
    layers_pattern: Iterable[str] = (),
) -> dict[Place, str]:
    """Those of the layers found that are not excluded (by names as in :func:`matcher`) and are in one of the blocks.

    Raises:
        ValueError: none is left, or none was excluded.
    """
    left = found
    if exclude_modules:
        excludes = matcher("exclude_modules", exclude_modules)
        left = {place: name for place, name in left.items() if not excludes(name)}
        if len(left) == len(found):
            raise ValueError(f"exclude_modules: {exclude_modules!r} matches none of {few(found.values())}")
    if layers_to_transform is not None:
        left = {p: name for p, name in left.items() if block_number(name, layers_pattern) in layers_to_transform}
    if not left:
        raise ValueError(
            f"target_modules: exclude_modules={exclude_modules} and layers_to_transform={layers_to_transform} leave "
            f"none of {few(found.values())}"
        )
    return left


def pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern, as in :func:`ends_with_pattern`, that ``name`` ends with; else ``default``."""
    return next((value for pattern, value in patterns.items() if ends_with_pattern(name, pattern)), default)


def check_patterns(argument: str, patterns: Iterable[str], names: list[str]) -> None:
    """ValueError if one of the patterns is no regular expression, or none of ``names`` ends with it."""
    for pattern in patterns:
        try:
            unused = not any(ends_with_pattern(name, pattern) for name in names)
        except re.error as error:
            raise ValueError(f"{argument}: expected names or regular expressions, got {pattern!r} ({error})") from error
        if unused:
            raise ValueError(f"{argument}: {pattern!r} matches none of the layers with LoRA: {few(names)}")


def few(names: Iterable[str]) -> str:
    """The first three names, and how many others there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def what_there_is(names: Iterable[str], kind: str) -> str:
    """A hint for errors: names that could have been meant, or that the model has none of this ``kind``."""
    # Layers repeat: their names without the numbers say the same in a few lines.
    short = sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in names})
    if not short:
        return f"the model has no {kind}"
    more = f" and {len(short) - _MAX_LISTED} more" if len(short) > _MAX_LISTED else ""
    return f"what could be matched (* stands for a number): {', '.join(short[:_MAX_LISTED])}{more}"
