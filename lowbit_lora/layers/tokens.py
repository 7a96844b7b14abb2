"""Single rows of an embedding that train (``trainable_token_indices``), by PEFT's names."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from lowbit.adapted import Adapted, weight_with_rows, with_rows


class TrainedTokens(Adapted):
    """An embedding, or a layer tied to one, in which each adapter has its own values for some rows.

    The values are ``token_adapter.trainable_tokens_delta[adapter]`` [tokens, features]: the rows themselves, in fp32.
    The table is neither copied nor decoded. An output layer or another embedding (an encoder's and a decoder's) that is
    tied to the embedding takes its rows from there: from ``tied_to``, the embedding's TrainedTokens.
    """

    def __init__(self, module: nn.Module, tied_to: "TrainedTokens | None" = None):
        if not isinstance(module, nn.Embedding if tied_to is None else (nn.Embedding, nn.Linear)):
            raise TypeError(f"trainable_token_indices: expected a torch.nn.Embedding, got {type(module).__name__}")
        super().__init__(module)
        self.token_adapter = nn.Module()
        self.token_adapter.trainable_tokens_delta = nn.ParameterDict()
        self._tied_to = [tied_to] if tied_to else []  # in a list: not a submodule, whose parameters it would repeat

    @property
    def tied_to(self) -> "TrainedTokens | None":
        """The embedding's place, for a layer that is tied to it."""
        return self._tied_to[0] if self._tied_to else None

    @torch.no_grad()
    def add_adapter(self, name: str, indices: list[int]) -> None:
        """Add rows, which begin as the table's; a ValueError for an index out of range."""
        self._check_new(name)
        rows = self.base.num_embeddings
        wrong = [index for index in indices if not 0 <= index < rows]
        if wrong:
            raise ValueError(f"trainable_token_indices: expected indices from 0 to {rows - 1}, got {wrong}")
        weight = self.base.weight
        index = torch.tensor(sorted(set(indices)), device=weight.device)
        values = F.embedding(index, weight.detach()).float().clone()
        self.token_adapter.trainable_tokens_delta[name] = nn.Parameter(values)
        self.adapters[name] = index

    def _parts(self) -> dict[str, nn.ModuleDict | nn.ParameterDict]:
        return {"token_adapter.trainable_tokens_delta": self.token_adapter.trainable_tokens_delta}

    def check_active(self, names: Iterable[str]) -> tuple[str, ...]:
        names = super().check_active(names)
        indices = [index for name in names for index in self.adapters[name].tolist()]
        if len(set(indices)) < len(indices):
            raise ValueError(
                f"adapters: expected different trainable_token_indices in {', '.join(names)}, got the same"
            )
        return names

    def _rows(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``(indices [tokens], values [tokens, features])`` of an adapter."""
        values = self.token_adapter.trainable_tokens_delta[name]
        return self.adapters[name].to(values.device), values

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        owner = self.tied_to if self._tied_to else self
        y = self.original_module(input)
        if owner.rows is None:
            for name in owner.active:
                y = with_rows(self.original_module, input, y, *owner._rows(name))
            return y
        for name, rows in owner.rows.chosen(len(input)):
            if name in owner.adapters:
                own = with_rows(self.original_module, input[rows], y[rows], *owner._rows(name))
                y = y.index_copy(0, rows, own)
        return y

    @torch.no_grad()
    def merged_tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """A dense weight in which the adapters' rows are. That of a tied layer is its embedding's."""
        names = self.check_active(names)
        if not names:
            return {}
        weight = weight_with_rows(self.original_module.weight.detach(), [self._rows(name) for name in names])
        return {"weight": nn.Parameter(weight, requires_grad=False)}
