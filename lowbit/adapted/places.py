"""What stands in the place of a module that adapters change, and where a model has such places."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..names import all_names
from ..names import walk as walk_to
from .rows import RowAdapters


class Adapted(nn.Module):
    """A module in whose place adapters compute: a layer with LoRA, one that is trained whole, or one with new rows.

    For other code it looks like its base, whose attributes it shows.

    Attributes:
        adapters: name -> settings.
        active: names of the adapters that ``forward`` computes with; empty: it computes what the base does.
        merged: names of the adapters that are in the base's weight now.
        rows: where it is set, the adapter of each row of the input instead of the active ones.
    """

    base_name = "original_module"  # of the base, among the submodules

    def __init__(self, base: nn.Module):
        super().__init__()
        self.adapters: dict[str, Any] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.rows: RowAdapters | None = None
        setattr(self, self.base_name, base)

    def _parts(self) -> dict[str, nn.ModuleDict | nn.ParameterDict]:
        """The dictionaries that hold what an adapter has, by its name; by how PEFT's keys begin."""
        raise NotImplementedError

    @property
    def base(self) -> nn.Module:
        """The module that adapters change."""
        return self._modules[self.base_name]

    def current(self) -> nn.Module:
        """The module whose attributes this one shows as its own."""
        return self.base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})  # empty while it is unpickled
            if name.startswith("_") or self.base_name not in modules:
                raise
            return getattr(self.current(), name)

    def nested(self) -> dict[str, "Adapted"]:
        """What else holds adapters for parts of the same module, by PEFT's names below this one's."""
        return {}

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What an adapter's file holds for this module, by PEFT's keys below the module's name; empty without it."""
        found = {}
        for start, parts in self._parts().items():
            if name not in parts:
                continue
            if isinstance(parts[name], nn.Module):
                found |= parts[name].state_dict(prefix=f"{start}." if start else "", keep_vars=True)
            else:
                found[start] = parts[name]
        return found

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter; none where it has none here."""
        return [value for value in self.adapter_tensors(name).values() if isinstance(value, nn.Parameter)]

    def merged_tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """New tensors for the base, by their names in it, with which it computes what it does with these adapters."""
        raise NotImplementedError

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; a ValueError if there is none of that name, or if it is active or merged."""
        self._check_names([name])
        if name in self.active or name in self.merged:
            raise ValueError(f"adapter: expected one that is neither active nor merged, got {name!r}")
        del self.adapters[name]
        for parts in self._parts().values():
            if name in parts:
                del parts[name]

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name; a ValueError if there is no ``old``, or a ``new``. Parameters stay the same."""
        self._check_names([old])
        self._check_new(new)
        names = {name: name for name in self.adapters} | {old: new}
        self.adapters = {names[name]: adapter for name, adapter in self.adapters.items()}
        for parts in self._parts().values():
            if old in parts:
                parts[new] = parts[old]
                del parts[old]
        self.active = tuple(names[name] for name in self.active)
        self.merged = tuple(names[name] for name in self.merged)

    def set_active(self, names: Iterable[str]) -> None:
        """Make these adapters the active ones; errors as in :meth:`check_active`."""
        self.active = self.check_active(names)

    def check_active(self, names: Iterable[str]) -> tuple[str, ...]:
        """The adapters among ``names`` that this module has; a ValueError if these cannot be active together or now."""
        names = tuple(name for name in names if name in self.adapters)
        if self.merged and names != self.active:
            raise ValueError(f"adapters: expected none that is merged, got {', '.join(self.merged)}; unmerge first")
        return names

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.adapters:
                raise ValueError(f"adapter: expected one of {', '.join(self.adapters) or 'none'}, got {name!r}")

    def _check_new(self, name: str) -> None:
        if name in self.adapters:
            raise ValueError(f"adapter: expected a new name, got {name!r}, which is there")


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``model``, and it, with each of its names, as in :func:`lowbit.names.walk`.

    What holds adapters stands for its base; nothing inside it has a name.
    """
    return walk_to(model, Adapted)


def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module below ``model`` with its names; a shared module has several, the first is canonical."""
    return all_names(walk(model))


def with_nested(part: Adapted, name: str) -> dict[str, Adapted]:
    """What holds adapters in the place of a module of that name: ``part`` and what is nested in it."""
    return {name: part} | {f"{name}.{key}": inner for key, inner in part.nested().items()}


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """What holds adapters in a model, by canonical name; what is nested in another's place comes last."""
    found = {names[0]: module for module, names in module_names(model).items() if isinstance(module, Adapted)}
    for name, part in list(found.items()):
        found |= with_nested(part, name)
    return found


def base_of(module: nn.Module) -> nn.Module:
    """The base of what holds adapters; any other module itself."""
    return module.base if isinstance(module, Adapted) else module
