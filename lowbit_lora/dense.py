"""Products with the dense, frozen 16-bit weights that a wrapped model keeps, such as ``lm_head``, on a CPU.

Without bf16 instructions torch's bf16 product on a CPU is several times slower than its fp32 one, and the one with a
transposed weight, which the backward needs, hundreds of times (docs/performance.md): one ``lm_head`` would take longer
than all quantized layers together. Here such products are computed in fp32, a piece of the weight at a time.
"""

import functools
import platform

import torch
import torch.nn.functional as F
from torch import nn

from lowbit import QuantizedTensor
from lowbit.ops.linear import rows

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
#: Weights widened to fp32 at a time: 16 MB of them.
_PIECE = 2**22
#: From so many rows on the forward is faster in fp32 too, although the weight has to be widened first.
_MANY_ROWS = 16


@functools.cache
def _slow_in_16_bits() -> bool:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear(x, weight, bias)``; where the weight is frozen and torch is slow, computed in fp32 and rounded once.

    Differentiable in x and bias. x [..., in], weight [out, in], bias [out] or None; returns [..., out] in x's dtype.
    """
    if (
        weight.dtype in _SIXTEEN_BITS
        and x.dtype == weight.dtype
        and weight.device.type == "cpu"
        and not weight.requires_grad
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and _slow_in_16_bits()
    ):
        return _FrozenLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        x_rows = rows(x)
        if len(x_rows) < _MANY_ROWS:
            return F.linear(x, weight, bias)
        wide = x_rows.float()
        y = x.new_empty(len(x_rows), len(weight))
        for piece in _pieces(weight):
            y[:, piece] = F.linear(wide, weight[piece].float(), None if bias is None else bias[piece].float())
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight = ctx.weight
        needs_x, _, needs_bias = ctx.needs_input_grad
        grad_rows = rows(grad)
        grad_x = grad_bias = None
        if needs_x:
            total = grad.new_zeros(len(grad_rows), weight.shape[1], dtype=torch.float32)
            for piece in _pieces(weight):
                total.addmm_(grad_rows[:, piece].float(), weight[piece].float())
            grad_x = total.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])
        if needs_bias:
            grad_bias = grad_rows.sum(0, dtype=torch.float32).to(grad.dtype)
        return grad_x, None, grad_bias


def _pieces(weight: torch.Tensor) -> list[slice]:
    """Slices of a weight's rows, about _PIECE weights each."""
    out_features, in_features = weight.shape
    step = max(1, _PIECE // max(1, in_features))
    return [slice(start, start + step) for start in range(0, out_features, step)]


class FrozenLinear(nn.Linear):
    """An nn.Linear whose weight is frozen; what :func:`adopt` makes of those a wrapped model keeps."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return frozen_linear(input, self.weight, self.bias)


def adopt(model: nn.Module) -> None:
    """Turn each plain nn.Linear with a frozen 16-bit weight into a FrozenLinear, in place: weights stay tied."""
    for module in model.modules():
        if type(module) is not nn.Linear or isinstance(module.weight, QuantizedTensor):  # which has kernels of its own
            continue
        if module.weight.dtype in _SIXTEEN_BITS and not module.weight.requires_grad:
            module.__class__ = FrozenLinear


def release(model: nn.Module) -> None:
    """Turn each FrozenLinear back into an nn.Linear."""
    for module in model.modules():
        if type(module) is FrozenLinear:
            module.__class__ = nn.Linear
