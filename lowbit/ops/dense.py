"""Products with a dense, frozen matrix, and with its LoRA.

Without bf16 instructions torch's bf16 product on a CPU is several times slower than its fp32 one, and the one with a
transposed weight, which the backward needs, hundreds of times (docs/performance.md): one ``lm_head`` would take longer
than all quantized layers together. Here such products are computed in fp32, a piece of the matrix at a time.
"""

import functools
import platform

import torch
import torch.nn.functional as F

from .linear import Linear, Product, lora_linear_of, rows
from .record import is_traced

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
#: Weights widened to fp32 at a time: 16 MB of them.
_PIECE = 2**22
#: From so many rows on the forward is faster in fp32 too, although the weight has to be widened first.
_MANY_ROWS = 16


@functools.cache
def _slow_in_16_bits() -> bool:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _in_fp32(x: torch.Tensor, matrix: torch.Tensor) -> bool:
    return matrix.dtype in _SIXTEEN_BITS and x.dtype == matrix.dtype and x.device.type == "cpu" and _slow_in_16_bits()


class DenseProduct(Product):
    """How rows multiply one dense matrix [out, in] of any strides, which has no gradient.

    ``namespace``: whose kernels multiply by LoRA's factors, where it has some for the device; "" for torch's products.
    """

    def __init__(self, matrix: torch.Tensor, namespace: str = ""):
        super().__init__(namespace, ())
        self.matrix = matrix

    def has_lora_kernels(self, x: torch.Tensor) -> bool:
        """The op multiplies quantized weights only."""
        return False

    def forward(self, keyset, x, features, bias, t, lora_b, scaling) -> torch.Tensor:
        """x W^T + scaling t lora_b^T + bias; the sum of both products is rounded once."""
        matrix, x_rows = self.matrix, rows(x)
        if t is not None and self.has_factor_kernels(x):
            y = self.up(t, lora_b, x.dtype, scaling, bias)
            return rows(y).addmm_(x_rows, matrix.T).view(y.shape)
        added = None if t is None else F.linear(rows(t), lora_b.to(t.dtype)) * scaling
        if bias is not None:
            added = bias if added is None else added + bias
        if _in_fp32(x, matrix) and len(x_rows) >= _MANY_ROWS:
            wide, y = x_rows.float(), x.new_empty(len(x_rows), len(matrix))
            for piece in _pieces(matrix):
                part = F.linear(wide, matrix[piece].float())
                y[:, piece] = part if added is None else part.add_(added[..., piece])
        elif added is None:
            y = F.linear(x_rows, matrix)
        else:
            y = torch.addmm(added.to(x.dtype), x_rows, matrix.T)
        return y.view(*x.shape[:-1], len(matrix))

    def grad_input(self, grad, features, grad_t=None, lora_a=None) -> torch.Tensor:
        """grad W + grad_t lora_a."""
        matrix, grad_rows = self.matrix, rows(grad)
        if grad_t is not None and self.has_factor_kernels(grad):
            grad_x = self.up(grad_t, lora_a.transpose(0, 1), grad.dtype)
            return rows(grad_x).addmm_(grad_rows, matrix).view(grad_x.shape)
        added = None if grad_t is None else rows(grad_t) @ lora_a.to(grad_t.dtype)
        if _in_fp32(grad, matrix):
            total = grad.new_zeros(len(grad_rows), features, dtype=torch.float32) if added is None else added
            for piece in _pieces(matrix):
                total.addmm_(grad_rows[:, piece].float(), matrix[piece].float())
            grad_x = total.to(grad.dtype)
        elif added is None:
            grad_x = grad_rows @ matrix
        else:
            grad_x = torch.addmm(added.to(grad.dtype), grad_rows, matrix)
        return grad_x.view(*grad.shape[:-1], features)


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear(x, weight, bias)``; where the weight is frozen and torch is slow, computed in fp32 and rounded once.

    Differentiable in x and bias. x [..., in], weight [out, in], bias [out] or None; returns [..., out] in x's dtype.
    """
    if weight.requires_grad or torch.is_autocast_enabled("cpu") or is_traced() or not _in_fp32(x, weight):
        return F.linear(x, weight, bias)
    return Linear.apply(x, bias, None, None, DenseProduct(weight), None, len(weight), 1.0)


def lora_linear(namespace: str, x, weight, lora_a, lora_b, scaling: float, bias, t=None) -> torch.Tensor:
    """x W^T + scaling t lora_b^T + bias, with t = x lora_a^T where it is not given. Autocast has to be off.

    Differentiable in all operands. While the weight is frozen, only x (in its own dtype), t and the factors are saved.
    ``namespace`` as :class:`DenseProduct`'s.
    """
    product = DenseProduct(weight, namespace)
    if weight.requires_grad or is_traced():  # by torch's own functions, each of which knows its gradient
        product = DenseProduct(weight)
        t = product.matmul(x, lora_a) if t is None else t
        return product.forward(None, x, None, bias, t, lora_b, scaling)
    if t is None:
        return lora_linear_of(product, x, len(weight), bias, lora_a, lora_b, scaling)[0]
    return Linear.apply(x, bias, t, lora_b, product, None, len(weight), scaling)


def _pieces(matrix: torch.Tensor) -> list[slice]:
    """Slices of a matrix's rows, about _PIECE weights each."""
    out_features, in_features = matrix.shape
    step = max(1, _PIECE // max(1, in_features))
    return [slice(start, start + step) for start in range(0, out_features, step)]
