"""LoRA's own products, for what no op with a weight computes: LoRA beside a dense weight, or beside an output that is
there already, and on dropped x.

On a GPU they are ops that read activations in their own dtype, without a copy in fp32; t is fp32.
:class:`lowbit.ops.linear.Product` calls them where there are kernels, below autograd. :func:`down` and :func:`up` are
differentiable, and torch's products elsewhere.
"""

import torch

from .. import backends
from .linear import Product
from .record import Op, is_traced, without_backward


def factor_namespace(x: torch.Tensor) -> str:
    """The namespace whose kernels multiply x by LoRA's factors; "" where torch's products do."""
    is_native = backends.selected() in (None, "native") and x.device.type in backends.native.DEVICE_TYPES
    return backends.NAMESPACES["native"] if is_native else ""


def down(x: torch.Tensor, factor: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """t = scale x factor^T: x [..., k], factor [r, k], t [..., r] in fp32 or the wider of both dtypes.

    Differentiable in both. Autocast has to be off. Unlike F.linear on casts, it saves x in x's own dtype.
    """
    if is_traced():  # by torch's own functions, each of which knows its gradient
        return Product("", ()).matmul(x, factor, scale)
    return _Down.apply(x, factor, scale, Product(factor_namespace(x), ()))


def up(t: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """t factor^T in ``dtype``: t [..., r], factor [n, r]. Differentiable in both. Autocast has to be off."""
    if is_traced():
        return Product("", ()).up(t, factor, dtype)
    return _Up.apply(t, factor, dtype, Product(factor_namespace(t), ()))


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor, scale, product):
        ctx.save_for_backward(x, factor)
        ctx.scale, ctx.product = scale, product
        return product.matmul(x, factor, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, factor = ctx.saved_tensors
        grad_x = ctx.product.up(grad, factor.T, x.dtype, ctx.scale) if ctx.needs_input_grad[0] else None
        grad_factor = ctx.product.outer(grad, x, ctx.scale).to(factor.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_factor, None, None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, factor, dtype, product):
        ctx.save_for_backward(t, factor)
        ctx.product = product
        return product.up(t, factor, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        t, factor = ctx.saved_tensors
        product, grad = ctx.product, ctx.product.once_in_fp32(grad)
        grad_t = product.matmul(grad, factor.T).to(t.dtype) if ctx.needs_input_grad[0] else None
        grad_factor = product.outer(grad, t).to(factor.dtype) if ctx.needs_input_grad[1] else None
        return grad_t, grad_factor, None, None


def _fake_lora_down(x, factor, scale):
    return x.new_empty([*x.shape[:-1], factor.shape[0]], dtype=torch.float32)


def _fake_lora_up(t, factor, bias, scale, dtype):
    return t.new_empty([*t.shape[:-1], factor.shape[0]], dtype=dtype)


def _fake_lora_outer(wide, low, scale, is_transposed):
    sizes = [wide.shape[-1], low.shape[-1]]
    return low.new_empty(sizes[::-1] if is_transposed else sizes)


OPS = (
    Op(
        "lora_down(Tensor x, Tensor factor, float scale) -> Tensor",
        _fake_lora_down,
        without_backward("lora_down", (0, 1)),
    ),
    Op(
        "lora_up(Tensor t, Tensor factor, Tensor? bias, float scale, ScalarType dtype) -> Tensor",
        _fake_lora_up,
        without_backward("lora_up", (0, 1, 2)),
    ),
    Op(
        "lora_outer(Tensor wide, Tensor low, float scale, bool is_transposed) -> Tensor",
        _fake_lora_outer,
        without_backward("lora_outer", (0, 1)),
    ),
)
