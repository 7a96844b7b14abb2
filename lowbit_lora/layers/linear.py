"""LoRA on linear layers, whose weight may be dense or quantized."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit import QuantizedTensor

from ..config import QLoRAConfig, QuantizationType
from ..dense import FrozenLinear, frozen_linear
from .adapted_weight import AdaptedWeight
from .base import DEFAULT, Adapter, LoRABaseLayer, RowAdapters, without_autocast


class LoRALinear(LoRABaseLayer):
    """nn.Linear, or transformers' Conv1D, with a frozen weight, dense or quantized, plus LoRA.

    Args:
        linear: the layer to adapt, which becomes ``base_layer``.
        rank, lora_alpha, lora_dropout, use_rslora: of an adapter "default", which is active; see
            :class:`~lowbit_lora.LoraConfig`. A rank of None adds no adapter.
        lora_dtype: of the factors.
        freeze: stop the training of the weight and the bias of ``linear``.

    Raises:
        TypeError: ``linear`` is not such a layer.
        ValueError: rank, lora_alpha or lora_dropout out of range.
    """

    def __init__(
        self,
        linear: nn.Module,
        *,
        rank: int | None = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype = torch.float32,
        freeze: bool = True,
    ):
        _check_linear(linear)
        super().__init__(linear)
        #: Whether the weight is [in, out], as Conv1D's.
        self.is_transposed = not isinstance(linear, nn.Linear)
        sizes = linear.weight.shape if self.is_transposed else (linear.in_features, linear.out_features)
        self.in_features, self.out_features = sizes
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        if rank is not None:
            self.add_adapter(DEFAULT, Adapter(rank, lora_alpha, lora_dropout, use_rslora), lora_dtype)
            self.set_active([DEFAULT])
        if freeze:
            linear.requires_grad_(False)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is a linear layer: also a subclass, if it computes what its base class does.

        The projection of nn.MultiheadAttention's output is none: it is not called, its weight is read.
        """
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return False
        if isinstance(module, nn.Linear):
            return type(module).forward in (nn.Linear.forward, FrozenLinear.forward)
        return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"

    def _new_factors(self, rank: int, **options) -> dict[str, nn.Module | nn.Parameter]:
        down = nn.Linear(self.in_features, rank, bias=False, **options)
        return {"lora_A": down, "lora_B": nn.Linear(rank, self.out_features, bias=False, **options)}

    def factors(self, name: str | None = None) -> tuple[nn.Parameter, nn.Parameter]:
        """``(A [rank, in], B [out, rank])`` of an adapter; of the only active one if ``name`` is None."""
        name = self._only_active() if name is None else name
        modules = self._modules  # directly: nn.Module's own look-up costs 1 us for each name
        return modules["lora_A"]._modules[name].weight, modules["lora_B"]._modules[name].weight

    def delta(self, name: str) -> torch.Tensor:
        """scaling * B A of an adapter in fp32, in the weight's shape; differentiable in A and B."""
        lora_a, lora_b = self.factors(name)
        delta = self.adapters[name].scaling * (lora_b.float() @ lora_a.float())
        return delta.T if self.is_transposed else delta

    @property
    def weight(self) -> torch.Tensor:
        """W + scaling * B A, for code that reads the weight of a layer instead of calling the layer."""
        return self.merged_weight() if torch.compiler.is_compiling() else AdaptedWeight(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of input (under autocast, in the autocast dtype)."""
        base = self._modules["base_layer"]
        if self.rows is not None:
            return self._each_row_with_its_adapter(input, self.rows)
        if not self.active or self.merged:
            return base(input)
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"input: expected a last dimension of in_features={self.in_features}, got {tuple(input.shape)}"
            )
        if len(self.active) > 1 and self.training and any(self.adapters[name].lora_dropout for name in self.active):
            return self._each_with_its_dropout(input)
        weight, bias = base.weight, base.bias
        lora_a, lora_b, scaling, dropout = self._together()
        if isinstance(weight, QuantizedTensor) and not self.is_transposed:
            return lowbit.lora_linear(input, weight, lora_a, lora_b, scaling, bias, dropout, self.training)
        y = base(input) if self.is_transposed else frozen_linear(input, weight, bias)
        dropped = F.dropout(input, dropout, self.training)
        with without_autocast(input.device):
            # LoRA in the adapter's own precision, as on a quantized base.
            t = F.linear(dropped.to(lora_a.dtype), lora_a)
            return y + (scaling * F.linear(t, lora_b)).to(y.dtype)

    def _together(self) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        """``(A, B, scaling, dropout)`` of the active adapters as if they were one, with their ranks side by side."""
        if len(self.active) == 1:
            (name,) = self.active
            adapter = self.adapters[name]
            return *self.factors(name), adapter.scaling, adapter.lora_dropout
        factors = {name: self.factors(name) for name in self.active}
        lora_b = torch.cat([self.adapters[name].scaling * b for name, (_, b) in factors.items()], 1)
        return torch.cat([a for a, _ in factors.values()]), lora_b, 1.0, 0.0

    def _each_row_with_its_adapter(self, input: torch.Tensor, rows: RowAdapters) -> torch.Tensor:
        """One product with the base for all rows, and one grouped product with each factor of the adapters."""
        y = self.base_layer(input)
        tokens = input.reshape(-1, self.in_features)
        index = rows.index.repeat_interleave(len(tokens) // max(1, len(rows.index)))
        order = index.argsort(stable=True)
        ends = torch.bincount(index, minlength=len(rows.names)).cumsum(0).to(torch.int32)
        dropped = self._dropped_by_row(tokens, index, rows.names) if self.training else tokens
        with without_autocast(input.device):
            lora_a, lora_b = self._stacked(rows.names)
            delta = lowbit.grouped_matmul(lowbit.grouped_matmul(dropped[order], lora_a, ends), lora_b, ends)
            return y + torch.empty_like(delta).index_copy(0, order, delta).view(y.shape).to(y.dtype)

    def _stacked(self, names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """``(A [adapters, rank, in], scaling * B [adapters, out, rank])``, with zeros up to the largest rank.

        A name that this layer has no adapter of, such as that of the base, stands for zeros.
        """
        known = [self.adapters.get(name) for name in names]
        rank = max((adapter.rank for adapter in known if adapter), default=1)
        nothing = torch.zeros(rank, self.in_features, device=self.base_layer.weight.device)
        stack_a, stack_b = [], []
        for name, adapter in zip(names, known, strict=True):
            if adapter is None:
                stack_a.append(nothing)
                stack_b.append(nothing.new_zeros(self.out_features, rank))
                continue
            lora_a, lora_b = self.factors(name)
            missing = rank - adapter.rank
            stack_a.append(F.pad(lora_a.float(), (0, 0, 0, missing)))
            stack_b.append(F.pad(adapter.scaling * lora_b.float(), (0, missing)))
        return torch.stack(stack_a), torch.stack(stack_b)

    def _dropped_by_row(self, tokens: torch.Tensor, index: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        chances = [self.adapters[name].lora_dropout if name in self.adapters else 0.0 for name in names]
        if not any(chances):
            return tokens
        chance = torch.tensor(chances, device=tokens.device)[index, None]
        kept = torch.rand(tokens.shape, device=tokens.device) >= chance
        return tokens * (kept / (1 - chance)).to(tokens.dtype)

    def _each_with_its_dropout(self, input: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(input)
        for name in self.active:
            adapter, (lora_a, lora_b) = self.adapters[name], self.factors(name)
            dropped = F.dropout(input, adapter.lora_dropout, True)
            with without_autocast(input.device):
                t = F.linear(dropped.to(lora_a.dtype), lora_a)
                y = y + (adapter.scaling * F.linear(t, lora_b)).to(y.dtype)
        return y


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
        self._quantize(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), **options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> "QLoRALinear":
        """A layer on a quantized copy of ``linear``, which is not changed; ``options`` are those of the constructor.

        Raises:
            TypeError: ``linear`` is not an nn.Linear, or its dtype is not float32, float16 or bfloat16.
            ValueError: an option out of range, or NaN or inf in the weight.
        """
        _check_linear(linear)
        layer = cls.__new__(cls)
        layer._quantize(copy.deepcopy(linear), **options)
        return layer

    def _quantize(
        self,
        linear: nn.Linear,
        quantization: QuantizationType | str = QuantizationType.NF4,
        double_quant: bool = True,
        block_size: int = 64,
        scale: str = "absmax",
        **lora: Any,
    ) -> None:
        stored = QLoRAConfig(quantization=quantization, double_quant=double_quant, block_size=block_size, scale=scale)
        super().__init__(lowbit.quantize_(linear, stored.spec, scale=scale), **lora)


def _check_linear(linear: Any) -> None:
    if not (isinstance(linear, nn.Linear) or (isinstance(linear, nn.Module) and LoRALinear.takes(linear))):
        raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
    if linear.weight.numel() == 0:
        raise ValueError(f"linear: expected at least one weight, got shape {tuple(linear.weight.shape)}")
