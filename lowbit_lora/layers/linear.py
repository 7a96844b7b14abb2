"""LoRA on linear layers, whose weight may be dense or quantized."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lowbit.adapted import AdaptedWeight, Factors, adapted_linear, plus_products, products_by_row
from lowbit.functional import without_autocast
from lowbit.modules import FrozenLinear

from .base import Adapter, LoRABaseLayer, check_sizes, stored


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
        if self.rows is not None:
            return self._each_row_with_its_adapter(input)
        base = self._modules["base_layer"]
        if not self.active or self.merged:
            return base.forward(input)  # not the base itself, whose hooks are this layer's
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"input: expected a last dimension of in_features={self.in_features}, got {tuple(input.shape)}"
            )
        with_dora = [name for name in self.active if self.adapters[name].use_dora]
        factors = [self.addition(name) for name in self.active if name not in with_dora]
        if len(self.active) == 1 and with_dora and not self.addition(with_dora[0]).dropout:
            y = self._magnified(input, with_dora[0])
            return y if base.bias is None else y + base.bias.to(y.dtype)
        if "forward" in base.__dict__:  # of the instance, such as accelerate's hooks: it has to be called
            y, bias = base.forward(input), self._plus_biases(None, self.active)
            y = plus_products(y if bias is None else y + bias.to(y.dtype), input, factors)
        else:
            y = self._multiplied(input, factors, self._plus_biases(base.bias, self.active))
        for name in with_dora:
            dropped = F.dropout(input, self.adapters[name].lora_dropout, self.training)
            y = y + (self._magnified(dropped, name) - self._multiplied(dropped, []))
        return y

    def _multiplied(
        self, input: torch.Tensor, factors: list[Factors], bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = self.base_layer.weight
        return adapted_linear(input, weight.T if self.out_dim else weight, factors, bias)

    def _magnified(self, input: torch.Tensor, name: str) -> torch.Tensor:
        """magnitude / norm * (W + scaling * B A) input: DoRA without the bias and dropout."""
        z = self._multiplied(input, [self.addition(name)._replace(dropout=0.0)])
        with without_autocast(input.device):
            return (z * self._magnitude_scale(name)).to(z.dtype)

    def _each_row_with_its_adapter(self, input: torch.Tensor) -> torch.Tensor:
        """One product with the base for all rows, and one grouped product with each factor of the adapters."""
        y, names = self.base_layer.forward(input), self.rows.names
        known = [name for name in names if name in self.adapters]
        if any(self.adapters[name].use_dora for name in known):
            raise ValueError("adapter_names: expected adapters without DoRA, whose norms are of the whole weight")
        index = self.rows.spread(len(input))
        if not known:
            return y
        tokens = input.reshape(-1, self.in_features)
        index = index.repeat_interleave(len(tokens) // max(1, len(input)))
        with without_autocast(input.device):
            delta = products_by_row(tokens, [self.addition(n) if n in known else None for n in names], index)
            if any(self.adapters[name].lora_bias for name in known):
                nothing = delta.new_zeros(self.out_features)
                biases = [self._plus_biases(nothing, [name] if name in known else []) for name in names]
                delta = delta + torch.stack(biases)[index]
            return y + delta.view(y.shape).to(y.dtype)


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
        self, in_features: int, out_features: int, bias: bool = True, *, device=None, dtype=None, **options: Any
    ):
        check_sizes(in_features=in_features, out_features=out_features)
        linear, options = stored(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), options)
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
