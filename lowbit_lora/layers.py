"""Linear layers with LoRA. A layer wraps its base, whose weight may be dense or quantized, and keeps PEFT's names."""

import contextlib
import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

import lowbit
from lowbit import QuantizedTensor

from .config import QLoRAConfig, QuantizationType, check_lora_options, lora_scaling
from .dense import frozen_linear

#: The name of the adapter, as PEFT calls one that was given no name.
ADAPTER = "default"


class LoRABaseLayer(nn.Module):
    """What all LoRA layers share: ``base_layer``, and ``lora_A.default`` and ``lora_B.default``, the factors.

    The rank, the scaling and the dropout of the adapter are attributes. For other code the layer looks like its base:
    ``weight``, ``bias`` and the sizes are there.
    """

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features

    def _add_lora(self, rank, lora_alpha, lora_dropout, use_rslora, lora_dtype) -> None:
        check_lora_options(rank, lora_alpha, lora_dropout)
        self.rank = rank
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.scaling = lora_scaling(rank, lora_alpha, use_rslora)
        options = {"bias": False, "dtype": lora_dtype, "device": self.base_layer.weight.device}
        self.lora_A = nn.ModuleDict({ADAPTER: nn.Linear(self.in_features, rank, **options)})
        self.lora_B = nn.ModuleDict({ADAPTER: nn.Linear(rank, self.out_features, **options)})
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Fill A as nn.Linear's weight and B with zeros, so that the layer computes what its base does."""
        lora_a, lora_b = self.factors()
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        nn.init.zeros_(lora_b)

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """``(A [rank, in], B [out, rank])``."""
        modules = self._modules  # directly: nn.Module's own look-up costs 1 us for each name
        return modules["lora_A"]._modules[ADAPTER].weight, modules["lora_B"]._modules[ADAPTER].weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias."""
        return self.base_layer.bias

    @property
    def weight(self) -> torch.Tensor:
        """W + scaling * B A, for code that reads the weight of a layer instead of calling the layer."""
        return self.merged_weight() if torch.compiler.is_compiling() else AdaptedWeight(self)

    def base_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The frozen weight W, decoded, in ``dtype`` (default: its own)."""
        weight = self.base_layer.weight.detach()
        if isinstance(weight, QuantizedTensor):
            return weight.dequantize(dtype)
        return weight if dtype is None else weight.to(dtype)

    def merged_weight(self) -> torch.Tensor:
        """W + scaling * B A, summed in fp32 and rounded once to W's dtype; differentiable in A and B."""
        weight, (lora_a, lora_b) = self.base_layer.weight, self.factors()
        with _without_autocast(weight.device):
            merged = self.base_weight(torch.float32) + self.scaling * (lora_b.float() @ lora_a.float())
            return merged.to(weight.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Put the merged weight, which is dense, into the base layer; returns the base layer."""
        self.base_layer.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        return self.base_layer

    def extra_repr(self) -> str:
        return f"rank={self.rank}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"


class AdaptedWeight(torch.Tensor):
    """The ``weight`` of a LoRA layer: W + scaling * B A, computed when a torch function takes it.

    Some models read a layer's weight instead of calling the layer (Mamba's ``dt_proj``). They get the adapted weight,
    through which A and B are trained. T5 only asks for its dtype, which computes nothing. The fused inference paths of
    torch's transformer layers decline a tensor with torch functions of its own, and call the layer. Dropout is not
    applied.
    """

    @staticmethod
    def __new__(cls, layer: LoRABaseLayer):
        weight = layer.base_layer.weight
        self = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        self.layer = layer
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _MEMORY:
            raise RuntimeError(
                "weight: expected the layer to be called, but its memory was asked for, which LoRA is not in; leave "
                "the layer out of target_modules"
            )
        if func in _DESCRIPTION:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(cls, lambda weight: weight.layer.merged_weight(), (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"AdaptedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


_DESCRIPTION = {getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_cuda")}
_DESCRIPTION |= {getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "is_floating_point")}
_MEMORY = {getattr(torch.Tensor, name) for name in ("data_ptr", "storage", "untyped_storage")}


class LoRALinear(LoRABaseLayer):
    """nn.Linear with a frozen weight, dense or quantized, plus LoRA.

    Args:
        linear: the layer to adapt, which becomes ``base_layer``.
        rank, lora_alpha, lora_dropout, use_rslora: see :class:`~lowbit_lora.LoraConfig`.
        lora_dtype: of the factors.
        freeze: stop the training of the weight and the bias of ``linear``.

    Raises:
        TypeError: ``linear`` is not an nn.Linear.
        ValueError: rank, lora_alpha or lora_dropout out of range.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        rank: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype = torch.float32,
        freeze: bool = True,
    ):
        _check_linear(linear)
        super().__init__(linear, linear.in_features, linear.out_features)
        self._add_lora(rank, lora_alpha, lora_dropout, use_rslora, lora_dtype)
        if freeze:
            linear.requires_grad_(False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of input (under autocast, in the autocast dtype)."""
        base, (lora_a, lora_b) = self._modules["base_layer"], self.factors()
        weight, bias = base.weight, base.bias
        if isinstance(weight, QuantizedTensor):
            return lowbit.lora_linear(
                input, weight, lora_a, lora_b, self.scaling, bias, self.lora_dropout, self.training
            )
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"input: expected a last dimension of in_features={self.in_features}, got {tuple(input.shape)}"
            )
        y = frozen_linear(input, weight, bias)
        dropped = F.dropout(input, self.lora_dropout, self.training)
        with _without_autocast(input.device):
            # LoRA in the adapter's own precision, as on a quantized base.
            t = F.linear(dropped.to(lora_a.dtype), lora_a)
            return y + (self.scaling * F.linear(t, lora_b)).to(y.dtype)


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
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
    if linear.weight.numel() == 0:
        raise ValueError(f"linear: expected at least one weight, got shape {tuple(linear.weight.shape)}")


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    # torch.autocast knows no meta device.
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
