"""Linear layers with LoRA, on a dense weight (LoRALinear) or a quantized one (QLoRALinear).

As in loralib, the names are the protocol: parameters whose name starts with ``lora_`` are the adapter.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit.tensor import state_keys

from .config import QuantizationType, check_lora_options, check_quantization, lora_scaling
from .dense import frozen_linear


class LoRABaseLayer(nn.Module):
    """What all LoRA layers share: ``lora_A`` [rank, in], ``lora_B`` [out, rank], scaling and dropout."""

    def _add_lora(self, rank, lora_alpha, lora_dropout, use_rslora, lora_dtype, device) -> None:
        check_lora_options(rank, lora_alpha, lora_dropout)
        self.rank = rank
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.scaling = lora_scaling(rank, lora_alpha, use_rslora)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=lora_dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, dtype=lora_dtype, device=device))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """A uniform as nn.Linear's weight, B zero: the layer starts out as its base."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def base_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The frozen weight, decoded, [out, in], in ``dtype`` (default: its own)."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain nn.Linear with weight W + scaling * B A, summed in fp32 and rounded once to W's dtype."""
        merged = self.base_weight(torch.float32) + self.scaling * (self.lora_B.float() @ self.lora_A.float())
        return _plain_linear(merged.to(self.weight.dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"rank={self.rank}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        )


def _plain_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


class LoRALinear(LoRABaseLayer):
    """nn.Linear with a frozen dense weight, plus LoRA. Takes over the weight and bias of ``linear``.

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
    ):
        super().__init__()
        _check_linear_module(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._add_lora(rank, lora_alpha, lora_dropout, use_rslora, lora_dtype, linear.weight.device)
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def base_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.weight.detach() if dtype is None else self.weight.detach().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of x W^T."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected a last dimension of in_features={self.in_features}, got {tuple(x.shape)}")
        base = frozen_linear(x, self.weight, self.bias)
        dropped = F.dropout(x, self.lora_dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):
            # LoRA in the adapter's own precision, as QLoRALinear computes it.
            t = F.linear(dropped.to(self.lora_A.dtype), self.lora_A)
            return base + (self.scaling * F.linear(t, self.lora_B)).to(base.dtype)


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is stored in 4 bits, or in int8.

    The pieces of the weight are buffers that move between devices but are never cast: ``.half()`` or
    ``.to(torch.bfloat16)`` change bias and LoRA only. ``state_dict()`` has them under bitsandbytes' names. Those of
    int8 do not say the weight's dtype: a layer that loads them keeps its own.
    """

    _PARTS = ("weight_packed", "weight_absmax", "weight_group_scales", "weight_offset")
    #: What quantized_weight made last; valid while its parts are the buffers.
    _quantized: lowbit.QuantizedTensor | None = None

    def __init__(self, quantized: lowbit.QuantizedTensor, bias: torch.Tensor | None = None):
        super().__init__()
        self._set_quantized(quantized)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quantization: QuantizationType | str = QuantizationType.NF4,
        double_quant: bool = True,
        block_size: int = 64,
    ) -> "QuantizedLinear":
        """A layer with the weight of ``linear`` stored in 4 bits; ``linear`` is not changed.

        Raises:
            TypeError, ValueError: as :meth:`QLoRALinear.from_linear`.
        """
        return cls(_quantize_weight(linear, quantization, double_quant, block_size), linear.bias)

    def _set_quantized(self, quantized: lowbit.QuantizedTensor) -> None:
        self.out_features, self.in_features = quantized.shape
        self.weight_dtype = quantized.dtype
        self.format = quantized.format
        self.block_size = quantized.block_size
        for name, part in zip(self._PARTS, quantized.parts(), strict=True):
            self.register_buffer(name, part, persistent=False)
        self._quantized = None

    @property
    def quantized_weight(self) -> lowbit.QuantizedTensor:
        """The weight, [out_features, in_features]; shares the buffers' memory."""
        if torch.compiler.is_compiling():
            return self._make_quantized()
        # Making one costs more than a small product. Whoever moves or loads a layer puts other tensors in its buffers.
        made, buffers = self._quantized, self._buffers
        if (
            made is None
            or made.packed is not buffers["weight_packed"]
            or made.absmax is not buffers["weight_absmax"]
            or made.group_scales is not buffers["weight_group_scales"]
            or made.offset is not buffers["weight_offset"]
        ):
            made = self._quantized = self._make_quantized()
        return made

    def _make_quantized(self) -> lowbit.QuantizedTensor:
        return lowbit.QuantizedTensor(
            *(getattr(self, name) for name in self._PARTS),
            shape=(self.out_features, self.in_features),
            dtype=self.weight_dtype,
            format=self.format,
            block_size=self.block_size,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_quantized"}

    @property
    def weight(self) -> lowbit.QuantizedTensor:
        """As :attr:`quantized_weight`: Hugging Face code asks ``layer.weight`` for its dtype and device."""
        return self.quantized_weight

    def base_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded weight, [out, in], in ``dtype`` (default: that of the weight that was quantized)."""
        return self.quantized_weight.dequantize(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in x's dtype (under autocast, in the autocast dtype)."""
        return lowbit.linear(x, self.quantized_weight, self.bias)

    def merge(self) -> nn.Linear:
        """A plain nn.Linear with the decoded weight."""
        return _plain_linear(self.base_weight(), self.bias)

    def _apply(self, fn, recurse=True):
        parts = {name: self._buffers[name] for name in self._PARTS}
        super()._apply(fn, recurse)
        for name, part in parts.items():
            applied = self._buffers[name]
            if part is not None and applied.dtype != part.dtype:  # a cast, perhaps with a move: keep the move
                self._buffers[name] = part.to(applied.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.quantized_weight.state_dict(prefix + "weight"))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        name = prefix + "weight"
        own = state_keys(state_dict, name)
        if own:
            try:
                loaded = lowbit.QuantizedTensor.from_state_dict(state_dict, name, int8_dtype=self.weight_dtype)
                if loaded.shape != (self.out_features, self.in_features):
                    raise ValueError(
                        f"expected shape {(self.out_features, self.in_features)}, got {tuple(loaded.shape)}"
                    )
                self._set_quantized(_copy_to(loaded, self.weight_packed.device))
            except (ValueError, TypeError) as error:
                errors.append(f"{name}: {error}")
        elif strict:
            missing.append(name)
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"format={self.format}, block_size={self.block_size}"
        )


class QLoRALinear(QuantizedLinear, LoRABaseLayer):
    """A linear layer with its frozen weight in 4 bits, plus trainable LoRA.

    The constructor starts from a random weight as nn.Linear's; :meth:`from_linear` from a trained one.

    Args:
        in_features, out_features, bias, device: as nn.Linear.
        rank, lora_alpha, lora_dropout, use_rslora: see :class:`~lowbit_lora.LoraConfig`.
        quantization, double_quant, block_size: see :class:`~lowbit_lora.QLoRAConfig`.
        dtype: of the bias and of the decoded weight; float32, float16 or bfloat16.
        lora_dtype: of lora_A and lora_B.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        quantization: QuantizationType | str = QuantizationType.NF4,
        double_quant: bool = True,
        block_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lora_dtype: torch.dtype = torch.float32,
    ):
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {size!r}")
        check_lora_options(rank, lora_alpha, lora_dropout)
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        quantized = _quantize_weight(linear, quantization, double_quant, block_size)
        self._build(quantized, linear, rank, lora_alpha, lora_dropout, use_rslora, lora_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        quantization: QuantizationType | str = QuantizationType.NF4,
        double_quant: bool = True,
        block_size: int = 64,
        lora_dtype: torch.dtype = torch.float32,
        quantized: lowbit.QuantizedTensor | None = None,
    ) -> "QLoRALinear":
        """A layer with the weight of ``linear`` stored in 4 bits, its bias shared; ``linear`` is not changed.

        ``quantized``, where given, is that weight already in 4 bits (two layers that share one weight).

        Raises:
            TypeError: ``linear`` is not an nn.Linear, or its dtype is not float32, float16 or bfloat16.
            ValueError: an option out of range, or NaN or inf in the weight.
        """
        check_lora_options(rank, lora_alpha, lora_dropout)
        _check_linear_module(linear)
        if quantized is None:
            quantized = _quantize_weight(linear, quantization, double_quant, block_size)
        layer = cls.__new__(cls)
        layer._build(quantized, linear, rank, lora_alpha, lora_dropout, use_rslora, lora_dtype)
        return layer

    def _build(self, quantized, linear, rank, lora_alpha, lora_dropout, use_rslora, lora_dtype) -> None:
        QuantizedLinear.__init__(self, quantized, linear.bias)
        self._add_lora(rank, lora_alpha, lora_dropout, use_rslora, lora_dtype, linear.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in x's dtype (under autocast, in the autocast dtype)."""
        parameters = self._parameters  # directly: nn.Module's look-up takes 1 us for each
        try:
            lora_a, lora_b, bias = parameters["lora_A"], parameters["lora_B"], parameters["bias"]
        except KeyError:  # no bias, or parametrized
            lora_a, lora_b, bias = self.lora_A, self.lora_B, self.bias
        return lowbit.lora_linear(
            x, self.quantized_weight, lora_a, lora_b, self.scaling, bias, self.lora_dropout, self.training
        )

    def merge(self) -> nn.Linear:
        return LoRABaseLayer.merge(self)

    def extra_repr(self) -> str:
        return f"{LoRABaseLayer.extra_repr(self)}, format={self.format}, block_size={self.block_size}"


def _copy_to(quantized: lowbit.QuantizedTensor, device: torch.device) -> lowbit.QuantizedTensor:
    """A copy that shares no memory with the state dict; for a meta layer, the state dict's own tensors."""
    parts = quantized.parts()
    if device.type != "meta":
        parts = tuple(None if part is None else part.to(device, copy=True) for part in parts)
    return lowbit.QuantizedTensor(
        *parts,
        shape=quantized.shape,
        dtype=quantized.dtype,
        format=quantized.format,
        block_size=quantized.block_size,
    )


def _quantize_weight(linear, quantization, double_quant, block_size) -> lowbit.QuantizedTensor:
    _check_linear_module(linear)
    format = check_quantization(quantization).value
    return lowbit.quantize(linear.weight, format=format, block_size=block_size, double_quant=double_quant)


def _check_linear_module(linear: Any) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
    if linear.weight.numel() == 0:
        raise ValueError(f"linear: expected at least one weight, got shape {tuple(linear.weight.shape)}")
