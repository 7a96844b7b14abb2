"""The ``weight`` of a LoRA layer, for code that reads a layer's weight instead of calling the layer."""

import torch
from torch.utils._pytree import tree_map_only

from ..tensor import QuantizedTensor


def decoded(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A weight, dense or quantized, as a dense tensor in ``dtype`` (default: its own); the very one where that fits."""
    if isinstance(weight, QuantizedTensor):
        return weight.dequantize(dtype)
    return weight if dtype is None else weight.to(dtype)


class AdaptedWeight(torch.Tensor):
    """The ``weight`` of a LoRA layer: W + scaling * B A, computed when a torch function takes it.

    Some models read a layer's weight instead of calling the layer (Mamba's ``dt_proj``). They get the adapted weight,
    through which A and B are trained. T5 only asks for its dtype, which computes nothing. The fused inference paths of
    torch's transformer layers decline a tensor with torch functions of its own, and call the layer. Dropout is not
    applied.
    """

    @staticmethod
    def __new__(cls, layer: torch.nn.Module):
        weight = layer.base_layer.weight
        self = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        self.layer = layer
        return self

    def merged(self) -> torch.Tensor:
        """The dense sum, differentiable in A and B."""
        return self.layer.merged_weight()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _MEMORY:
            raise RuntimeError(
                "weight: expected the layer to be called, but its memory was asked for, which LoRA is not in; leave "
                "the layer out of target_modules (or the parameter out of target_parameters)"
            )
        if func in _DESCRIPTION:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(cls, lambda weight: weight.merged(), (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"AdaptedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


_DESCRIPTION = {getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_cuda")}
_DESCRIPTION |= {getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "is_floating_point")}
_MEMORY = {getattr(torch.Tensor, name) for name in ("data_ptr", "storage", "untyped_storage")}
