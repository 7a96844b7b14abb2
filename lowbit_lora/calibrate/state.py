"""What outlives a kill: the finished blocks of a run, and the hidden states that enter the next."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, MutableSequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lowbit.files.fingerprint import differences, fingerprint
from lowbit.files.replaced import replaced

from .report import LayerReport


class Tensors(MutableSequence):
    """A list of tensors, or of dictionaries of them, in memory or each in a file of a folder.

    Args:
        folder: or None for memory. No two lists have the same at a time.
        tensors: its first entries.
    """

    def __init__(self, folder: str | None, tensors: Iterable[Any] = ()):
        self._folder = None if folder is None else tempfile.mkdtemp(dir=folder)
        self._items: list = []
        self._count = 0
        self.extend(tensors)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index):
        item = self._items[index]
        return item if self._folder is None else torch.load(item, weights_only=True)

    def __setitem__(self, index, value) -> None:
        old = self._items[index]
        self._items[index] = self._kept(value)
        self._drop(old)

    def __delitem__(self, index) -> None:
        self._drop(self._items.pop(index))

    def insert(self, index, value) -> None:
        self._items.insert(index, self._kept(value))

    def _kept(self, value):
        if self._folder is None:
            return value
        path = os.path.join(self._folder, f"{self._count}.pt")
        self._count += 1
        torch.save(value, path)
        return path

    def _drop(self, item) -> None:
        if self._folder is not None:
            os.unlink(item)


class State:
    """The folder of a run that can go on after a kill; without a folder, nothing is kept.

    Args:
        folder: or None.
        about: what makes the run the same as another, ready for JSON.
        model: whose fingerprint is compared too.

    Raises:
        ValueError: the folder holds a run on another model, other data or with other settings.
    """

    def __init__(self, folder: str | None, about: dict[str, Any], model: nn.Module):
        self.folder = folder
        if folder is None:
            return
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "calibration.json")
        weights = dict(model.named_parameters())
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                saved = json.load(file)
            differing = [
                f"{key} is {saved['about'].get(key)!r} there and {value!r} here"
                for key, value in about.items()
                if saved["about"].get(key) != value
            ] + differences(model, weights, saved["model"])
            if differing:
                raise ValueError(f"resume: expected the folder of this run, or a new one, but {'; '.join(differing)}")
            return
        with replaced(path) as file:
            file.write(json.dumps({"about": about, "model": fingerprint(model, weights)}, indent=2).encode())

    def finished(self, chain: str) -> int:
        """How many blocks of the chain are done, so that the next can begin."""
        if self.folder is None:
            return 0
        count = 0
        while os.path.exists(self._path(chain, count, "block")):
            count += 1
        while count and not os.path.exists(self._path(chain, count, "hidden")):
            count -= 1
        return count

    def blocks(self, chain: str, count: int) -> Iterator[dict[str, Any]]:
        """What :meth:`save` was given for each of the first blocks."""
        for number in range(count):
            saved = torch.load(self._path(chain, number, "block"), weights_only=True)
            saved["rows"] = [LayerReport(**row | {"shape": tuple(row["shape"])}) for row in saved["rows"]]
            yield saved

    def hidden(self, chain: str, count: int) -> list[list[torch.Tensor]]:
        """The hidden states after so many blocks: of the dense model, and of the quantized one where there is one."""
        return torch.load(self._path(chain, count, "hidden"), weights_only=True)

    def save(self, chain: str, number: int, streams: list, **about: Any) -> None:
        """Keep a block and what it returned; each file is written beside and renamed.

        Args:
            streams: the hidden states after the block.
            about: what :class:`~.walk.Found` has, and "seconds".
        """
        if self.folder is None:
            return
        about["rows"] = [asdict(row) for row in about["rows"]]
        with replaced(self._path(chain, number, "block")) as file:
            torch.save(about, file)
        with replaced(self._path(chain, number + 1, "hidden")) as file:
            torch.save([list(stream) for stream in streams], file)
        before = self._path(chain, number, "hidden")
        if os.path.exists(before):
            os.unlink(before)

    def _path(self, chain: str, number: int, kind: str) -> str:
        return os.path.join(self.folder, f"{chain}.{number:04d}.{kind}")
