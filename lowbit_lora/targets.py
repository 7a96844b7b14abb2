"""Which modules of a model get LoRA, which are stored in 4 bits, and which train whole."""

import re
from collections.abc import Callable

from torch import nn

from . import hf
from .config import LoraConfig


def linear_names(model: nn.Module) -> list[str]:
    """Names of all nn.Linear modules. Subclasses are left out: their owners use them in ways of their own."""
    return [name for name, module in _named_modules(model) if type(module) is nn.Linear]


def modules_to_save(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the modules that train in full precision: those of the config and a classification head.

    Raises:
        ValueError: a name of the config matches no module.
    """
    names = [name for name, _ in _named_modules(model) if name]
    found = [head for head in hf.classification_heads(model) if not _targeted_by_name(head, config)]
    for entry in config.modules_to_save or []:
        matches = [name for name in names if _has_suffix(name, entry)]
        if not matches:
            # PEFT writes both usual head names whatever the model has: not an error if one of them is there.
            if entry in ("classifier", "score") and found:
                continue
            raise ValueError(f"modules_to_save: {entry!r} matches no module; there are {_listing(names)}")
        found += matches
    return list(dict.fromkeys(found))


def lora_targets(model: nn.Module, config: LoraConfig, saved: list[str]) -> list[str]:
    """Names of the linear layers that get LoRA.

    Raises:
        ValueError: target_modules, or one of its entries, matches no linear layer; the message lists them.
    """
    candidates = [name for name in linear_names(model) if not _within(name, saved)]
    targets = config.target_modules
    if targets == "all-linear":
        head = hf.output_embedding(model)
        modules = dict(_named_modules(model))
        found = [name for name in candidates if modules[name] is not head]
        if not found:
            raise ValueError("target_modules: 'all-linear' matches nothing, the model has no nn.Linear to adapt")
        return found
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"target_modules: {targets!r} is not a regular expression: {error}") from error
        return _matched(model, candidates, targets, lambda name: pattern.fullmatch(name) is not None)
    found = []
    for entry in targets:
        found += _matched(model, candidates, entry, lambda name, entry=entry: _has_suffix(name, entry))
    return [name for name in candidates if name in set(found)]


def quantized_names(model: nn.Module, saved: list[str], targets: list[str]) -> list[str]:
    """Names of the linear layers to store in 4 bits: all but the modules to save and the output embedding."""
    head = hf.output_embedding(model)
    modules = dict(_named_modules(model))
    return [
        name
        for name in linear_names(model)
        if name in targets or not (_within(name, saved) or modules[name] is head)
    ]


def _named_modules(model: nn.Module):
    return model.named_modules(remove_duplicate=False)


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _within(name: str, roots: list[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def _targeted_by_name(name: str, config: LoraConfig) -> bool:
    return not isinstance(config.target_modules, str) and name in config.target_modules


def _matched(model: nn.Module, candidates: list[str], entry: str, match: Callable[[str], bool]) -> list[str]:
    found = [name for name in candidates if match(name)]
    if found:
        return found
    others = [f"{name} ({type(module).__name__})" for name, module in _named_modules(model) if name and match(name)]
    but = f", only {_listing(others)}, which cannot be adapted" if others else ""
    raise ValueError(
        f"target_modules: {entry!r} matches no nn.Linear{but}; expected among the names or suffixes of "
        f"{_listing(candidates)}"
    )


def _listing(names: list[str], most: int = 60) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
