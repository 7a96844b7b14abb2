"""LoRA on linear layers, whose weight may be dense or quantized."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit.adapted import AdaptedWeight
from lowbit.functional import without_autocast
from lowbit.modules import FrozenLinear
from lowbit.ops.dense import frozen_linear
from lowbit.ops.rows import lora_by_row

from .adapted import RowAdapters
from .base import Adapter, LoRABaseLayer, stored


class LoRALinear(LoRABaseLayer):
    """nn.Linear, or transformers' Conv1D, with a frozen weight, dense or quantized, plus LoRA.

    The arguments and errors are those of :class:`LoRABaseLayer`. The products with W and with the factors are one: in
    16 bits their sum is rounded once.
    """

    base_type = nn.Linear

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether a module is a linear layer: also a subclass, if it computes what its base class does.

        The projection of nn.MultiheadAttention's output is none: it is not called, its weight is read.
        """
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return False
        if isinstance(module, nn.Linear):
            return type(module).forward in (nn.Linear.forward, FrozenLinear.forward)
        return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"

    @classmethod
    def _check_base(cls, module: nn.Module) -> None:
        if not (isinstance(module, nn.Module) and cls.takes(module)):
            super()._check_base(module)

    def _setup(self) -> None:
        #: 1 where the weight is [in, out], as Conv1D's.
        self.out_dim = int(not isinstance(self.base_layer, nn.Linear))
        self.out_features = self.base_layer.weight.shape[self.out_dim]
        self.in_features = self.base_layer.weight.shape[1 - self.out_dim]

    def _new_factors(self, adapter: Adapter, **options) -> dict[str, nn.Module | nn.Parameter]:
        down = nn.Linear(self.in_features, adapter.rank, bias=False, **options)
        return {"lora_A": down, "lora_B": nn.Linear(adapter.rank, self.out_features, adapter.lora_bias, **options)}

    @property
    def weight(self) -> torch.Tensor:
        """W + scaling * B A, for code that reads the weight of a layer instead of calling the layer."""
        return self.merged_weight() if torch.compiler.is_compiling() else AdaptedWeight(self)

    def forward(self, input: torch.Tensor | None = None, *, x: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of input (under autocast, in the autocast dtype).

        ``x`` is what transformers' Conv1D calls its input.
        """
        input = x if input is None else input
        base = self._modules["base_layer"]
        if self.rows is not None:
            return self._each_row_with_its_adapter(input, self.rows)
        if not self.active or self.merged:
            return base.forward(input)  # not the base itself, whose hooks are this layer's
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"input: expected a last dimension of in_features={self.in_features}, got {tuple(input.shape)}"
            )
        first = self.adapters[self.active[0]]
        if len(self.active) == 1 and not first.use_dora:
            return self._with_lora(input, *self.factors(self.active[0]), first.scaling, first.lora_dropout)
        if len(self.active) == 1 and not (self.training and first.lora_dropout):
            y = self._magnified(input, self.active[0])
            return y if base.bias is None else y + base.bias.to(y.dtype)
        return self._with_several(input)

    def _with_lora(self, input, lora_a, lora_b, scaling: float, dropout: float, with_bias: bool = True) -> torch.Tensor:
        """W input + scaling * B A dropout(input) + bias, in one product."""
        weight = self.base_layer.weight
        # accelerate's hooks, for one, are in a forward of the instance, which therefore has to be called.
        is_hooked = with_bias and "forward" in self.base_layer.__dict__
        bias = self._bias(self.active, None if is_hooked else self.base_layer.bias) if with_bias else None
        if not self.out_dim and not is_hooked:
            return lowbit.lora_linear(input, weight, lora_a, lora_b, scaling, bias, dropout, self.training)
        if not isinstance(weight, QuantizedTensor) and not is_hooked:
            return lowbit.lora_linear(input, weight.T, lora_a, lora_b, scaling, bias, dropout, self.training)
        y = self.base_layer.forward(input) if is_hooked else input @ weight
        with without_autocast(input.device):
            t = F.linear(F.dropout(input, dropout, self.training).to(lora_a.dtype), lora_a)
            y = y + (scaling * F.linear(t, lora_b)).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def _with_several(self, input: torch.Tensor) -> torch.Tensor:
        """The active adapters together. Those without DoRA and dropout are one, with their ranks side by side."""
        apart = [
            n for n in self.active if self.adapters[n].use_dora or (self.training and self.adapters[n].lora_dropout)
        ]
        together = [name for name in self.active if name not in apart]
        if together:
            factors = [self.factors(name) for name in together]
            scaled = [self.adapters[n].scaling * b for n, (_, b) in zip(together, factors, strict=True)]
            y = self._with_lora(input, torch.cat([a for a, _ in factors]), torch.cat(scaled, 1), 1.0, 0.0)
        else:
            y = self._without_lora(input, self._bias(self.active, self.base_layer.bias))
        for name in apart:
            adapter, (lora_a, lora_b) = self.adapters[name], self.factors(name)
            dropped = F.dropout(input, adapter.lora_dropout, self.training)
            if adapter.use_dora:
                y = y + (self._magnified(dropped, name) - self._without_lora(dropped, None))
            else:
                with without_autocast(input.device):
                    t = F.linear(dropped.to(lora_a.dtype), lora_a)
                    y = y + (adapter.scaling * F.linear(t, lora_b)).to(y.dtype)
        return y

    def _magnified(self, input: torch.Tensor, name: str) -> torch.Tensor:
        """magnitude / norm * (W + scaling * B A) input: DoRA without the bias."""
        z = self._with_lora(input, *self.factors(name), self.adapters[name].scaling, 0.0, with_bias=False)
        with without_autocast(input.device):
            return (z * (self.lora_magnitude_vector[name] / self.row_norms(name))).to(z.dtype)

    def _without_lora(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight = self.base_layer.weight
        if not self.out_dim:
            return frozen_linear(input, weight, bias)
        y = input @ weight
        return y if bias is None else y + bias.to(y.dtype)

    def _bias(self, names: tuple[str, ...], bias: torch.Tensor | None) -> torch.Tensor | None:
        """``bias`` and, times their scalings, those of B."""
        for name in names:
            if self.adapters[name].lora_bias:
                own = self.adapters[name].scaling * self.lora_B[name].bias
                bias = own if bias is None else bias + own
        return bias

    def _each_row_with_its_adapter(self, input: torch.Tensor, rows: RowAdapters) -> torch.Tensor:
        """One product with the base for all rows, and one grouped product with each factor of the adapters."""
        y = self.base_layer.forward(input)
        known = [self.adapters.get(name) for name in rows.names]
        if not any(known):
            return y
        if any(adapter and adapter.use_dora for adapter in known):
            raise ValueError("adapter_names: expected adapters without DoRA, whose norms are of the whole weight")
        tokens = input.reshape(-1, self.in_features)
        index = rows.index.repeat_interleave(rows.groups.tokens(tokens))
        dropped = self._dropped_by_row(tokens, index, known) if self.training else tokens
        with without_autocast(input.device):
            delta = lora_by_row(dropped, rows.groups, *self._factors_by_row(rows.names))
            if any(adapter and adapter.lora_bias for adapter in known):
                nothing = delta.new_zeros(self.out_features)
                delta = delta + torch.stack([self._own_bias(name, nothing) for name in rows.names])[index]
            return (y + delta.view(y.shape)).to(y.dtype)

    def _own_bias(self, name: str, nothing: torch.Tensor) -> torch.Tensor:
        adapter = self.adapters.get(name)
        return adapter.scaling * self.lora_B[name].bias.float() if adapter and adapter.lora_bias else nothing

    def _factors_by_row(self, names: tuple[str, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
        """The factors A and B and the scaling of each adapter, with zeros up to the largest rank.

        A name that this layer has no adapter of, such as that of the base, stands for zeros.
        """
        known = [self.adapters.get(name) for name in names]
        rank = max(adapter.rank for adapter in known if adapter)
        nothing = torch.zeros((), device=self.base_layer.weight.device)
        of_a, of_b = [], []
        for name, adapter in zip(names, known, strict=True):
            if adapter is None:
                lora_a, lora_b = nothing.expand(rank, self.in_features), nothing.expand(self.out_features, rank)
            else:
                lora_a, lora_b = self.factors(name)
                if adapter.rank < rank:
                    missing = rank - adapter.rank
                    lora_a, lora_b = F.pad(lora_a, (0, 0, 0, missing)), F.pad(lora_b, (0, missing))
            of_a.append(lora_a)
            of_b.append(lora_b)
        return of_a, of_b, [adapter.scaling if adapter else 0.0 for adapter in known]

    def _dropped_by_row(self, tokens: torch.Tensor, index: torch.Tensor, known: list[Adapter | None]) -> torch.Tensor:
        chances = [adapter.lora_dropout if adapter else 0.0 for adapter in known]
        if not any(chances):
            return tokens
        chance = torch.tensor(chances, device=tokens.device)[index, None]
        kept = torch.rand(tokens.shape, device=tokens.device) >= chance
        return tokens * (kept / (1 - chance)).to(tokens.dtype)


class QLoRALinear(LoRALinear):
    """A LoRALinear on a random weight as nn.Linear's, which is stored in 4 bits or in 8.

    Args:
        in_features, out_features, bias, device: as nn.Linear.
        dtype: of the bias and of the decoded weight; float32, float16 or bfloat16.
        options: quantization, double_quant, block_size and scale of :class:`~lowbit_lora.QLoRAConfig`; rank and the
            other arguments of :class:`LoRALinear`.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {size!r}")
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        linear, options = stored(linear, options)
        super().__init__(linear, **options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> "QLoRALinear":
        """A layer on a quantized copy of ``linear``, which is not changed; ``options`` are those of the constructor.

        Raises:
            TypeError: ``linear`` is not an nn.Linear, or its dtype is not float32, float16 or bfloat16.
            ValueError: an option out of range, or NaN or inf in the weight.
        """
        cls._check_base(linear)
        layer = cls.__new__(cls)
        quantized, options = stored(copy.deepcopy(linear), options)
        LoRALinear.__init__(layer, quantized, **options)
        return layer
