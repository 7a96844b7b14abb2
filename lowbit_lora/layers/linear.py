"""LoRA on linear layers, whose weight may be dense or quantized."""

import copy
import functools
from typing import Any

import torch
from torch import nn

from lowbit.adapted import adapted_linear, plus_products, plus_products_by_row
from lowbit.functional import check_sizes
from lowbit.modules import FrozenLinear, is_conv1d
from lowbit.quantizers.requantize import Quantizer, inputs_quantizer, search_quantizer

from .base import Adapter, LoRABaseLayer, stored


class LoRALinear(LoRABaseLayer):
    """nn.Linear, or transformers' Conv1D, with a frozen weight, dense or quantized, plus LoRA.

    The products with W and with the factors are one: in 16 bits their sum is rounded once.
    """

    base_type = nn.Linear

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Not the projection of nn.MultiheadAttention's output, which is not called: its weight is read."""
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return False
        if isinstance(module, nn.Linear):
            return type(module).forward in (nn.Linear.forward, FrozenLinear.forward)
        return is_conv1d(module)

    def _setup(self) -> None:
        #: 1 where the weight is [in, out], as Conv1D's.
        self.out_dim = int(not isinstance(self.base_layer, nn.Linear))
        self.out_features = self.base_layer.weight.shape[self.out_dim]
        self.in_features = self.base_layer.weight.shape[1 - self.out_dim]

    def _new_factors(self, adapter: Adapter, **options) -> dict[str, nn.Module | nn.Parameter]:
        return self._linear_factors((self.out_features, self.in_features), adapter.rank, adapter.lora_bias, **options)

    def forward(self, input: torch.Tensor | None = None, *, x: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of input (under autocast, in the autocast dtype)."""
        # x is what transformers' Conv1D calls its input.
        input = x if input is None else input
        if self.training and "input_squares" in self._buffers:
            self._count_squares(input)
        if self.rows is not None:
            return self._each_row_with_its_adapter(input)
        base = self._modules["base_layer"]
        if not self.active or self.merged:
            return base.forward(input)  # not the base itself, whose hooks are this layer's
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"input: expected a last dimension of in_features={self.in_features}, got {tuple(input.shape)}"
            )
        weight, factors = base.weight.T if self.out_dim else base.weight, []
        for name in self.active:
            own = self.addition(name)
            factors.append(own._replace(row_scale=self._magnitude_scale(name)) if self.adapters[name].use_dora else own)
        if "forward" in base.__dict__:  # of the instance, such as accelerate's hooks: it has to be called
            return plus_products(base.forward(input), input, weight, factors)
        return adapted_linear(input, weight, factors, base.bias)

    # ---- what a merge into the quantized weight can know of the inputs

    def track_input_squares(self, on: bool = True) -> None:
        """Keep the mean squares of the inputs seen in training mode, from now on, or keep them no longer.

        ``input_squares`` is then a buffer, fp32 [in_features], that no file holds. The pass over each input costs
        little beside the product.
        """
        if not on:
            self._buffers.pop("input_squares", None)
            self._buffers.pop("_rows_seen", None)
        elif "input_squares" not in self._buffers:
            device = self.stored_weight.device
            self.register_buffer("input_squares", torch.zeros(self.in_features, device=device), persistent=False)
            self.register_buffer("_rows_seen", torch.zeros((), device=device), persistent=False)

    @torch.no_grad()
    def _count_squares(self, input: torch.Tensor) -> None:
        rows = input.detach().reshape(-1, self.in_features)
        if not len(rows):
            return
        self._rows_seen += len(rows)
        squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square() / len(rows)
        self.input_squares += (squares - self.input_squares) * (len(rows) / self._rows_seen)

    def own_quantizer(self) -> Quantizer:
        """A search of scales, weighted by what the layer saw in training where it kept that."""
        is_by_inputs = not self.out_dim or self.stored_weight.stored.transposed
        if "input_squares" not in self._buffers or not self._rows_seen or not is_by_inputs:
            return search_quantizer
        return functools.partial(search_quantizer, importance=self.input_squares)

    def calibrated_quantizer(self, inputs: torch.Tensor) -> Quantizer:
        """A quantizer for :meth:`merge` that leaves little error in the outputs for ``inputs`` [..., in_features].

        Give ``minimum_cosine=-1`` with it: what is left of the outputs' change is not to be seen in the weight's.
        """
        return inputs_quantizer(inputs, bool(self.out_dim))

    def _each_row_with_its_adapter(self, input: torch.Tensor) -> torch.Tensor:
        """One product with the base for all rows, and one grouped product with each factor of the adapters."""
        y, names = self.base_layer.forward(input), self.rows.names
        factors = [self.addition(name) if name in self.adapters else None for name in names]
        if any(self.adapters[name].use_dora for name in self.adapters.keys() & set(names)):
            raise ValueError("adapter_names: expected adapters without DoRA, whose norms are of the whole weight")
        return plus_products_by_row(y, input, factors, self.rows)


class QLoRALinear(LoRALinear):
    """A LoRALinear on a random weight as nn.Linear's, which is stored in 4 bits or in 8.

    The first arguments are nn.Linear's; ``dtype`` is that of the bias and of the decoded weight: float32, float16 or
    bfloat16. The options are those of LoRABaseLayer and, of :class:`~lowbit_lora.QLoRAConfig`, quantization,
    double_quant, block_size and scale. An argument out of range is a TypeError or a ValueError.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, device=None, dtype=None, **options: Any
    ):
        check_sizes(in_features=in_features, out_features=out_features)
        linear = stored(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), options)
        super().__init__(linear, **options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> "QLoRALinear":
        """A layer on a quantized copy of ``linear``; options and errors are those of the constructor."""
        cls._check_base(linear)
        layer = cls.__new__(cls)
        quantized = stored(copy.deepcopy(linear), options)
        LoRALinear.__init__(layer, quantized, **options)
        return layer
