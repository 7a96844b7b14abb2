"""Checks of arguments: an error names the argument, what was expected and what was given. Most return the argument."""

import contextlib
import math
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Context that puts ``where`` before the text of a TypeError or ValueError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


def check_switch(name: str, value: Any) -> bool:
    """``value``; TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def check_count(name: str, value: Any) -> int:
    """``value``; TypeError/ValueError unless it is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def check_positive(name: str, value: Any) -> float:
    """``value``; TypeError/ValueError unless it is a finite number above 0."""
    _check_number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return value


def check_probability_below_1(name: str, value: Any) -> float:
    """``value``; TypeError/ValueError unless it is a number in [0, 1)."""
    _check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value!r}")
    return value


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """``value``; ValueError unless it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def check_names(name: str, value: Any) -> list[str]:
    """``value`` as a list, sorted if it was a set; TypeError unless it holds strings that are not empty."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a list of names, got {value!r}")
    names = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    if not all(isinstance(entry, str) and entry for entry in names):
        raise TypeError(f"{name}: expected a list of non-empty strings, got {names!r}")
    return names


def check_indices(name: str, value: Any) -> list[int]:
    """``value``, an int or several, as a list; ValueError unless all are at least 0."""
    numbers = [value] if isinstance(value, int) else list(value)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise ValueError(f"{name}: expected numbers from 0 on, got {numbers!r}")
    return numbers


def check_one_or_more_names(name: str, value: Any) -> list[str] | None:
    """A name, or several, as a list; None for an empty one. TypeError for anything else."""
    names = [value] if isinstance(value, str) and value else value or []
    return check_names(name, names) or None


def check_names_or_pattern(name: str, value: Any) -> str | list[str]:
    """A string, which is a regular expression, as it is; else what :func:`check_names` makes of it."""
    return value if isinstance(value, str) else check_names(name, value or [])


def check_by_name(check_value: Callable[[str, Any], Any], name: str, value: Any) -> dict[str, Any] | None:
    """A dictionary from names to numbers, of which ``check_value`` checks each; None for an empty one.

    Raises:
        TypeError: it is no dictionary.
    """
    if not isinstance(value or {}, dict):
        raise TypeError(f"{name}: expected a dictionary from names of layers to numbers, got {value!r}")
    return {key: check_value(f"{name}[{key!r}]", number) for key, number in (value or {}).items()} or None


def check_new_name(what: str, name: Any, taken: Container[str]) -> None:
    """TypeError/ValueError unless ``name`` can be that of a new submodule, and of a folder; ``what``: of what thing."""
    if not isinstance(name, str):
        raise TypeError(f"{what}: expected a name, got {name!r}")
    if name in taken:
        raise ValueError(f"{what}: expected a new name, got {name!r}, which is there")
    if not name or any(character in name for character in "./\\"):
        raise ValueError(f"{what}: expected a name without dots and slashes, got {name!r}")
