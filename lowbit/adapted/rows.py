"""What is chosen for single rows: an adapter for each row of a batch, and other values for some rows of a weight."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.rows import Groups
from ..tensor import QuantizedTensor


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
        inverse = sorted(range(len(numbers)), key=order.__getitem__)
        sizes = [numbers.count(number) for number in range(len(names))]
        ends = torch.tensor([*itertools.accumulate(sizes)], dtype=torch.int32, device=device)
        index, *orders = torch.tensor([numbers, order, inverse], dtype=torch.int64, device=device)
        return cls(names, index, Groups(sizes, ends, *orders))

    def spread(self, first: int) -> torch.Tensor:
        """The index for an input whose first dimension is the batch, or a multiple of it (beams, tokens) in its order.

        Raises:
            ValueError: ``first`` is no multiple of the number of rows.
        """
        rows = len(self.index)
        if first % max(1, rows):
            raise ValueError(
                f"adapter_names: expected inputs with {rows} rows, one for each name, or a multiple, got {first}"
            )
        return self.index.repeat_interleave(first // max(1, rows))

    def chosen(self, first: int) -> Iterator[tuple[str, torch.Tensor]]:
        """``(name, its rows, int64)`` of each adapter that has rows in such an input; errors as in :meth:`spread`."""
        index = self.spread(first)
        for number, name in enumerate(self.names):
            rows = (index == number).nonzero().squeeze(1)
            if len(rows):
                yield name, rows

    def joined(self, first: int, compute: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The rows that ``compute`` makes for each adapter in such an input, from its name and its rows, in order."""
        y = None
        for name, rows in self.chosen(first):
            part = compute(name, rows)
            if not isinstance(part, torch.Tensor):
                raise TypeError(
                    f"adapter_names: expected modules to save that return a tensor, got a {type(part).__name__}"
                )
            y = part.new_empty(first, *part.shape[1:]) if y is None else y
            y = y.index_copy(0, rows, part)
        return y


def with_rows(
    module: nn.Module, input: torch.Tensor, y: torch.Tensor, index: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """The output ``y`` of an embedding or a linear layer, with other values for some rows of its weight.

    Args:
        module: nn.Embedding, whose rows may be multiplied by an ``embed_scale``, or nn.Linear.
        input: what gave ``y``.
        index: int64 [n], the rows of the weight.
        values: [n, features], theirs; differentiable.
    """
    if isinstance(module, nn.Linear):
        logits = F.linear(input, values.to(input.dtype))
        return y.index_copy(-1, index, (logits if module.bias is None else logits + module.bias[index]).to(y.dtype))
    same = input[..., None] == index
    own = F.embedding(same.int().argmax(-1), values) * getattr(module, "embed_scale", 1.0)
    return torch.where(same.any(-1, keepdim=True), own.to(y.dtype), y)


def weight_with_rows(weight: torch.Tensor, rows: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """A dense copy of a weight, dense or quantized, in its dtype, with the values of each ``(index, values)`` in it."""
    copied = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.clone()
    for index, values in rows:
        copied.index_copy_(0, index, values.to(copied.dtype))
    return copied
