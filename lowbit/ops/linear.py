"""Products with one frozen matrix, and the gradients of a product with its LoRA.

The two autograd functions serve a stack of experts too (``grouped.py``): they are written in terms of a
:class:`Product`, which says how a matrix multiplies, and hold no more for the backward than x, t and LoRA's factors.
Nothing of the dense weight's size is kept: the backward decodes the packed weight again.
"""

import functools
import math

import torch

from . import shared_input
from .record import WEIGHT, Op, below_autograd, is_traced, op_of, wants_gradient, without_backward

_cached_op = functools.cache(op_of)

#: Namespaces and device types whose ``lora_linear``, its backward and the ops of ``lora.py`` are kernels, rather than
#: made of other ops.
HAVE_LORA_KERNELS = {("lowbit", "cuda")}


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., n] as [rows, n]; unlike reshape(-1, n) also for n = 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def product_dtype(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    """What LoRA's own products are computed in: the wider of the two dtypes; on a CPU fp32.

    Without bf16 instructions torch's bf16 product on a CPU is up to eight times slower than its fp32 one, and one with
    a transposed operand hundreds of times (docs/performance.md).
    """
    return torch.float32 if a.device.type == "cpu" else torch.promote_types(a.dtype, b.dtype)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Below autograd an op that returns its argument, as to() would, is not allowed.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def scaled(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """scale tensor, without an operation where it is the tensor."""
    return tensor if scale == 1 else tensor * scale


class Product:
    """How rows multiply one matrix, and a quantized one, on one backend.

    ``weight`` holds the op's arguments from packed to spec. It is a plain tuple that autograd does not look into:
    ``save_for_backward`` costs time per tensor, and hands what it saves to hooks that move activations elsewhere.
    """

    name = "linear"
    #: What stands between the weight and the features in the ops' arguments.
    groups: tuple = ()

    def __init__(self, namespace: str, weight: tuple):
        self.namespace, self.weight = namespace, weight

    def forward(self, keyset, x, features, bias, t, lora_b, scaling) -> torch.Tensor:
        """x W^T + scaling t lora_b^T + bias."""
        arguments = (x, *self.weight, *self.groups, features, bias, t, lora_b, scaling)
        return below_autograd(_cached_op(self.namespace, self.name), keyset, *arguments)

    def has_lora_kernels(self, x: torch.Tensor) -> bool:
        """Whether the product and its LoRA are one op for x."""
        return (self.namespace, x.device.type) in HAVE_LORA_KERNELS

    def has_factor_kernels(self, *activations: torch.Tensor) -> bool:
        """Whether kernels multiply these by LoRA's factors: those in 16 bits, which torch would copy to fp32."""
        there = (self.namespace, activations[0].device.type) in HAVE_LORA_KERNELS
        return there and any(each.dtype != torch.float32 for each in activations)

    def lora_forward(self, x, features, bias, lora_a, lora_b, scaling) -> tuple[torch.Tensor, torch.Tensor]:
        """(x W^T + scaling t lora_b^T + bias, t) with t = x lora_a^T."""
        if not self.has_lora_kernels(x):
            return self.lora_forward_by_parts(x, features, bias, lora_a, lora_b, scaling)
        t, others = shared_input.find(x, lora_a)
        if t is not None:
            return self.forward(None, x, features, bias, t, lora_b, scaling), t
        arguments = (x, *self.weight, features, bias, lora_a, lora_b, scaling)
        if not others:
            return below_autograd(_cached_op(self.namespace, "lora_linear"), None, *arguments)
        op = _cached_op(self.namespace, "lora_linear_shared")
        y, t, *ts = below_autograd(op, None, *arguments, others)
        shared_input.keep(ts)
        return y, t

    def lora_forward_by_parts(self, x, features, bias, lora_a, lora_b, scaling) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, t by :meth:`matmul`."""
        with torch._C._AutoDispatchBelowAutograd():
            t = self.matmul(x, lora_a)
        return self.forward(None, x, features, bias, t, lora_b, scaling), t

    def grad_input(self, grad, features, grad_t=None, lora_a=None) -> torch.Tensor:
        """grad W + grad_t lora_a."""
        op = _cached_op(self.namespace, f"{self.name}_grad_input")
        return below_autograd(op, None, grad, *self.weight, *self.groups, features, grad_t, lora_a)

    def lora_backward(self, grad, x, t, lora_a, lora_b, scaling, wanted) -> tuple[torch.Tensor | None, ...]:
        """Gradients for (x, lora_a, lora_b), None where not ``wanted``."""
        if not self.has_lora_kernels(grad):
            return self.lora_backward_by_parts(grad, x, t, lora_a, lora_b, scaling, wanted)
        op = _cached_op(self.namespace, "lora_linear_backward")
        found = iter(below_autograd(op, None, grad, x, t, *self.weight, lora_a, lora_b, scaling, *wanted))
        return tuple(next(found) if is_wanted else None for is_wanted in wanted)

    def lora_backward_by_parts(self, grad, x, t, lora_a, lora_b, scaling, wanted) -> tuple[torch.Tensor | None, ...]:
        """The same by :meth:`matmul`, :meth:`outer` and :meth:`grad_input`."""
        wants_x, wants_a, wants_b = wanted
        grad_x = grad_a = grad_b = grad_t = None
        wide = self.once_in_fp32(grad) if any(wanted) else grad
        if wants_x or wants_a:
            grad_t = self.matmul(wide, lora_b.transpose(-1, -2), scaling)
        if wants_b:
            grad_b = self.outer(wide, t, scaling).to(lora_b.dtype)
        if wants_x:
            grad_x = self.grad_input(grad, x.shape[-1], grad_t, lora_a)
        if wants_a:
            grad_a = self.outer(grad_t, x).to(lora_a.dtype)
        return grad_x, grad_a, grad_b

    def once_in_fp32(self, grad: torch.Tensor) -> torch.Tensor:
        """A gradient as :meth:`matmul` and :meth:`outer` would each convert it."""
        return grad.float() if grad.device.type == "cpu" and not self.has_factor_kernels(grad) else grad

    def matmul(self, x: torch.Tensor, matrix: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """scale x matrix^T, matrix [p, k]: in fp32 by a kernel, or in :func:`product_dtype`."""
        if self.has_factor_kernels(x):
            return below_autograd(_cached_op(self.namespace, "lora_down"), None, x, matrix, scale)
        dtype = product_dtype(x, matrix)
        return scaled(torch.nn.functional.linear(_cast(x, dtype), _cast(matrix, dtype)), scale)

    def up(self, t, matrix, dtype: torch.dtype, scale: float = 1.0, bias=None) -> torch.Tensor:
        """scale t matrix^T + bias in ``dtype``: t [..., r], matrix [p, r]."""
        if (self.namespace, t.device.type) in HAVE_LORA_KERNELS:
            return below_autograd(_cached_op(self.namespace, "lora_up"), None, t, matrix, bias, scale, dtype)
        y = self.matmul(t, matrix, scale)
        return _cast(y if bias is None else y + bias, dtype)

    def outer(self, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """scale a^T b, summed over rows, in :func:`product_dtype`."""
        if self.has_factor_kernels(a, b) and torch.float32 in (a.dtype, b.dtype):
            is_transposed = a.dtype == torch.float32
            wide, low = (b, a) if is_transposed else (a, b)
            op = _cached_op(self.namespace, "lora_outer")
            return below_autograd(op, None, wide, low, scale, is_transposed)
        dtype = product_dtype(a, b)
        return scaled(_cast(rows(a), dtype).T @ _cast(rows(b), dtype), scale)

    def sum_rows(self, grad: torch.Tensor) -> torch.Tensor:
        """The sum over rows, in fp32."""
        return rows(grad).sum(0, dtype=torch.float32)


class Linear(torch.autograd.Function):
    """Differentiable in x, bias, t and lora_b. Saves t and lora_b."""

    @staticmethod
    def forward(ctx, x, bias, t, lora_b, product, keyset, features, scaling):
        ctx.save_for_backward(t, lora_b)
        ctx.product, ctx.scaling = product, scaling
        ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
        return product.forward(keyset, x, features, bias, t, lora_b, scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        t, lora_b = ctx.saved_tensors
        product = ctx.product
        needs_x, needs_bias, needs_t, needs_b = ctx.needs_input_grad[:4]
        grad_bias = grad_t = grad_b = None
        grad_x = product.grad_input(grad, ctx.in_features) if needs_x else None
        if needs_bias:
            grad_bias = product.sum_rows(grad).to(ctx.bias_dtype)
        if needs_t or needs_b:
            grad = product.once_in_fp32(grad)
        if needs_t:
            grad_t = product.matmul(grad, lora_b.transpose(-1, -2), ctx.scaling).to(t.dtype)
        if needs_b:
            grad_b = product.outer(grad, t, ctx.scaling).to(lora_b.dtype)
        return grad_x, grad_bias, grad_t, grad_b, *[None] * 4


class LoraLinear(torch.autograd.Function):
    """Differentiable in x, bias, lora_a and lora_b. Saves x in its own dtype, t and the factors.

    Both contributions to grad_x, through W and through A, use one product.
    """

    @staticmethod
    def forward(ctx, x, bias, lora_a, lora_b, product, features, scaling):
        y, t = product.lora_forward(x, features, bias, lora_a, lora_b, scaling)
        ctx.save_for_backward(x, t, lora_a, lora_b)
        ctx.product, ctx.scaling = product, scaling
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(t)
        ctx.set_materialize_grads(False)  # zeros for t would be a launch
        return y, t

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        if grad is None:  # what used y has no gradient for it
            return (None,) * 7
        x, t, lora_a, lora_b = ctx.saved_tensors
        product = ctx.product
        needs_x, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:4]
        grad_bias = product.sum_rows(grad).to(ctx.bias_dtype) if needs_bias else None
        wanted = (needs_x, needs_a, needs_b)
        grad_x, grad_a, grad_b = product.lora_backward(grad, x, t, lora_a, lora_b, ctx.scaling, wanted)
        return grad_x, grad_bias, grad_a, grad_b, *[None] * 3


class _GradInput(torch.autograd.Function):
    """x W as a product of its own (a transposed weight): differentiable in x."""

    @staticmethod
    def forward(ctx, x, product, keyset, features):
        ctx.product, ctx.out_features = product, x.shape[-1]
        op = _cached_op(product.namespace, "linear_grad_input")
        return below_autograd(op, keyset, x, *product.weight, features, None, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.product.forward(None, grad, ctx.out_features, None, None, None, 1.0), None, None, None


def linear(namespace: str, x, weight: tuple, features: int, bias=None, t=None, lora_b=None, scaling=1.0):
    """``torch.ops.<namespace>.linear``, ``weight`` being its arguments from packed to spec.

    Goes around the dispatcher's way to Python and back, which costs 8 us, where nobody looks. Autocast has to be off.
    """
    if is_traced():
        return getattr(torch.ops, namespace).linear.default(x, *weight, features, bias, t, lora_b, scaling)
    return _linear(Product(namespace, weight), None, x, features, bias, t, lora_b, scaling)


def _linear(product: Product, keyset, x, features, bias, t, lora_b, scaling):
    if wants_gradient(x, bias, t, lora_b):
        return Linear.apply(x, bias, t, lora_b, product, keyset, features, scaling)
    return product.forward(keyset, x, features, bias, t, lora_b, scaling)


def lora_linear(namespace: str, x, weight: tuple, features: int, bias, lora_a, lora_b, scaling: float):
    """The first result of ``torch.ops.<namespace>.lora_linear``; as :func:`linear`."""
    if is_traced():
        op = getattr(torch.ops, namespace).lora_linear.default
        return op(x, *weight, features, bias, lora_a, lora_b, scaling)[0]
    return lora_linear_of(Product(namespace, weight), x, features, bias, lora_a, lora_b, scaling)[0]


def lora_linear_of(product: Product, x, features, bias, lora_a, lora_b, scaling):
    """(y, t) of a product and its LoRA, recorded where a gradient is wanted."""
    if wants_gradient(x, bias, lora_a, lora_b):
        return LoraLinear.apply(x, bias, lora_a, lora_b, product, features, scaling)
    return product.lora_forward(x, features, bias, lora_a, lora_b, scaling)


def _autograd_linear(namespace: str):
    def kernel(keyset, x, *args):
        return _linear(Product(namespace, args[:5]), keyset, x, *args[5:])

    return kernel


def _autograd_lora_linear(namespace: str):
    def kernel(keyset, x, *args):
        return lora_linear_of(Product(namespace, args[:5]), x, *args[5:])

    return kernel


def _autograd_grad_input(namespace: str):
    with_lora = without_backward("linear_grad_input", (0, 7, 8))(namespace)

    def kernel(keyset, grad, *args):
        *weight, features, grad_t, lora_a = (*args, None, None)[:8]
        if grad_t is None and wants_gradient(grad):
            return _GradInput.apply(grad, Product(namespace, tuple(weight)), keyset, features)
        return with_lora(keyset, grad, *weight, features, grad_t, lora_a)

    return kernel


def _lora_by_parts(namespace: str):
    """The kernel of every backend: t by torch's product, the rest by the backend's ``linear``."""

    def kernel(x, *args):
        y, t = Product(namespace, args[:5]).lora_forward_by_parts(x, *args[5:])
        return y, _cast(t, torch.float32)

    return kernel


def _shared_by_parts(namespace: str):
    by_parts = _lora_by_parts(namespace)

    def kernel(x, *args):
        *args, others = args
        product = Product(namespace, args[:5])
        return [*by_parts(x, *args), *(_cast(product.matmul(x, other), torch.float32) for other in others)]

    return kernel


def _lora_backward_by_parts(namespace: str):
    def kernel(grad, x, t, *args):
        *weight, lora_a, lora_b, scaling, wants_x, wants_a, wants_b = args
        wanted = (wants_x, wants_a, wants_b)
        product = Product(namespace, tuple(weight))
        found = product.lora_backward_by_parts(grad, x, t, lora_a, lora_b, scaling, wanted)
        return [each for each in found if each is not None]

    return kernel


def _fake_linear(x, packed, absmax, group_scales, offset, spec, out_features, *rest):
    return x.new_empty([*x.shape[:-1], out_features])


def _fake_lora_linear(x, packed, absmax, group_scales, offset, spec, out_features, bias, lora_a, lora_b, scaling):
    t = x.new_empty([*x.shape[:-1], lora_a.shape[0]], dtype=torch.float32)
    return x.new_empty([*x.shape[:-1], out_features]), t


def _fake_lora_linear_shared(x, *args):
    *args, others = args
    y, t = _fake_lora_linear(x, *args)
    return [y, t, *(torch.empty_like(t) for _ in others)]


def _fake_lora_linear_backward(grad, x, t, *args):
    lora_a, lora_b, _, *wanted = args[5:]
    found = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (x, lora_a, lora_b))
    return [each for each, is_wanted in zip(found, wanted, strict=True) if is_wanted]


def _fake_linear_grad_input(grad, packed, absmax, group_scales, offset, spec, in_features, *lora):
    return grad.new_empty([*grad.shape[:-1], in_features])


_LINEAR = f"Tensor x, {WEIGHT}, int out_features, Tensor? bias, Tensor? t, Tensor? lora_b, float scaling"
OPS = (
    Op(f"linear({_LINEAR}) -> Tensor", _fake_linear, _autograd_linear, autocast=True),
    Op(
        f"linear_approximate({_LINEAR}) -> Tensor",
        _fake_linear,
        without_backward("linear_approximate", (0, 7, 8, 9)),
    ),
    Op(
        f"lora_linear(Tensor x, {WEIGHT}, int out_features, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling)"
        " -> (Tensor, Tensor)",
        _fake_lora_linear,
        _autograd_lora_linear,
        autocast=True,
        kernel=_lora_by_parts,
    ),
    # [y, t, and t of x with each of the other lora_a, of products that will take x too]
    Op(
        f"lora_linear_shared(Tensor x, {WEIGHT}, int out_features, Tensor? bias, Tensor lora_a, Tensor lora_b, "
        "float scaling, Tensor[] others) -> Tensor[]",
        _fake_lora_linear_shared,
        without_backward("lora_linear_shared", (0, 7, 8, 9)),
        kernel=_shared_by_parts,
    ),
    Op(
        f"lora_linear_backward(Tensor grad, Tensor x, Tensor t, {WEIGHT}, Tensor lora_a, Tensor lora_b, float scaling, "
        "bool wants_x, bool wants_a, bool wants_b) -> Tensor[]",
        _fake_lora_linear_backward,
        without_backward("lora_linear_backward", (0, 1, 2, 8, 9)),
        kernel=_lora_backward_by_parts,
    ),
    Op(
        f"linear_grad_input(Tensor grad, {WEIGHT}, int in_features, Tensor? grad_t=None, Tensor? lora_a=None)"
        " -> Tensor",
        _fake_linear_grad_input,
        _autograd_grad_input,
    ),
)
