"""What stands in the place of a module that adapters change: which adapters it has, and which of them compute."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.ops.rows import Groups


@dataclass(frozen=True)
class RowAdapters:
    """Which adapter each row of a batch has, sorted once for all layers.

    Attributes:
        names: of the adapters, each once.
        index: for each row an index into them, int64 [batch].
        groups: the rows of each adapter.
    """

    names: tuple[str, ...]
    index: torch.Tensor
    groups: Groups

    @classmethod
    def of(cls, row_names: list[str], device: torch.device) -> "RowAdapters":
        """From a name for each row of the batch."""
        names = tuple(sorted(set(row_names)))
        numbers = [names.index(name) for name in row_names]
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        ends = list(itertools.accumulate(numbers.count(number) for number in range(len(names))))
        is_sorted = order == list(range(len(order)))
        index, ends_there, order = (
            torch.tensor(values, dtype=torch.int64, device=device) for values in (numbers, ends, order)
        )
        orders = (None, None) if is_sorted else (order, order.argsort())
        return cls(names, index, Groups(ends, ends_there.to(torch.int32), *orders))

    def spread(self, first: int) -> torch.Tensor:
        """The index for an input whose first dimension is the batch, or a multiple of it (beams, tokens) in its order.

        Raises:
            ValueError: ``first`` is no multiple of the number of rows.
        """
        if first % max(1, len(self.index)):
            raise ValueError(
                f"adapter_names: expected inputs with {len(self.index)} rows, one for each name, or a multiple, "
                f"got {first}"
            )
        return self.index.repeat_interleave(first // max(1, len(self.index)))


class Adapted(nn.Module):
    """A module in whose place adapters compute: a layer with LoRA, one that is trained whole, or one with new rows.

    For other code it looks like its base, whose attributes it shows.

    Attributes:
        adapters: name -> settings.
        active: names of the adapters that ``forward`` computes with; empty: it computes what the base does.
        merged: names of the adapters that are in the base's weight now.
        rows: where it is set, the adapter of each row of the input instead of the active ones.
    """

    def __init__(self):
        super().__init__()
        self.adapters: dict[str, Any] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.rows: RowAdapters | None = None

    def _parts(self) -> list[nn.ModuleDict | nn.ParameterDict]:
        """The dictionaries that hold what an adapter has, by its name."""
        raise NotImplementedError

    @property
    def base(self) -> nn.Module:
        """The module that adapters change."""
        raise NotImplementedError

    def current(self) -> nn.Module:
        """The module whose attributes this one shows as its own."""
        return self.base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})  # empty while it is unpickled
            if name.startswith("_") or not modules.keys() & {"base_layer", "original_module"}:
                raise
            return getattr(self.current(), name)

    def nested(self) -> dict[str, "Adapted"]:
        """What else holds adapters for parts of the same module, by PEFT's names below this one's."""
        return {}

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What an adapter's file holds for this module, by PEFT's keys below the module's name; empty without it."""
        raise NotImplementedError

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter; none where it has none here."""
        return [value for value in self.adapter_tensors(name).values() if isinstance(value, nn.Parameter)]

    def merged_tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """New tensors for the base, by their names in it, with which it computes what it does with these adapters."""
        raise NotImplementedError

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            ValueError: there is none of that name, or it is active or merged.
        """
        self._check_names([name])
        if name in self.active or name in self.merged:
            raise ValueError(f"adapter: expected one that is neither active nor merged, got {name!r}")
        del self.adapters[name]
        for parts in self._parts():
            if name in parts:
                del parts[name]

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name. Its parameters stay the same objects.

        Raises:
            ValueError: there is no ``old``, or there is a ``new``.
        """
        self._check_names([old])
        self._check_new(new)
        self.adapters = {new if name == old else name: adapter for name, adapter in self.adapters.items()}
        for parts in self._parts():
            if old in parts:
                parts[new] = parts[old]
                del parts[old]
        self.active = tuple(new if name == old else name for name in self.active)
        self.merged = tuple(new if name == old else name for name in self.merged)

    def set_active(self, names: Iterable[str]) -> None:
        """Make these adapters the active ones. Names of adapters that this module has not are passed over.

        Raises:
            ValueError: adapters are merged.
        """
        self.active = self.check_active(names)

    def check_active(self, names: Iterable[str]) -> tuple[str, ...]:
        """The adapters among ``names`` that this module has; an error where they cannot be active."""
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
