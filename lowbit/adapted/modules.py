"""Modules and parameters in whose place others compute: hooks that go along, and tensors that stand in for a while."""

import contextlib
import copy
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

#: Where nn.Module keeps the hooks of a module.
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks")
_HOOKS += ("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook")
#: One for each module, so that no thread finds or removes what another put there.
_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def standing_in(module: nn.Module, name: str, value: torch.Tensor) -> Iterator[None]:
    """Context in which ``module.name`` is ``value``. The registered parameter of that name stays what it is."""
    with _locks.setdefault(module, threading.RLock()):
        vars(module)[name] = value
        try:
            yield
        finally:
            del vars(module)[name]


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` call the hooks of ``source``: the very dictionaries, so that the hooks' handles go on working."""
    for name in _HOOKS:
        setattr(target, name, getattr(source, name))


def copy_with_hooks(module: nn.Module) -> nn.Module:
    """A deep copy, whose modules call the hooks of those they are copies of."""
    copied = copy.deepcopy(module)
    for source, target in zip(module.modules(), copied.modules(), strict=True):
        share_hooks(source, target)
    return copied


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with the floating-point tensors in it, also in tuples and lists, in this dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(cast_floats(item, dtype) for item in value)
    return value
