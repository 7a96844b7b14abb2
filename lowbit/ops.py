"""The torch ops: schemas, fake kernels, autograd and autocast, once for every backend.

Each op exists in one torch.library namespace per backend (``backends.NAMESPACES``): ``torch.ops.lowbit.linear`` is
the compiled one, ``torch.ops.lowbit_reference.linear`` the oracle. The namespace a call went to is all that its
backward needs to stay on the same backend. In the ``lowbit`` namespace the reference also stands in, at a lower
dispatch priority, for what the extension does not implement.

The ops take plain tensors and trust their callers; ``lowbit/functional.py`` has the public functions and the checks.
"""

import math

import torch

from . import format as fmt
from . import grouped_ops, reference
from .backends import NAMESPACES, triton
from .dispatch import WEIGHT, below_autograd, wants_gradient

_LINEAR_ARGUMENTS = f"Tensor x, {WEIGHT}, int out_features, Tensor? bias, Tensor? t, Tensor? lora_b, float scaling"

SCHEMAS = (
    "quantize(Tensor weight, str format, int block_size) -> (Tensor, Tensor)",
    "quantize_scales(Tensor absmax, Tensor offset) -> (Tensor, Tensor)",
    "search_scales(Tensor weight, Tensor? importance, str format, int block_size) -> Tensor",
    "encode(Tensor weight, Tensor scales, str format, int block_size) -> Tensor",
    f"dequantize({WEIGHT}, int[] shape, ScalarType dtype) -> Tensor",
    f"dequantize_out({WEIGHT}, Tensor(a!) out) -> ()",
    f"linear({_LINEAR_ARGUMENTS}) -> Tensor",
    f"linear_approximate({_LINEAR_ARGUMENTS}) -> Tensor",
    f"lora_linear(Tensor x, {WEIGHT}, int out_features, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling)"
    " -> (Tensor, Tensor)",
    f"linear_grad_input(Tensor grad, {WEIGHT}, int in_features, Tensor? grad_t=None, Tensor? lora_a=None) -> Tensor",
)
# Which instruction set the CPU kernels use; no tensors, so no backend but the extension has them.
NATIVE_SCHEMAS = ("cpu_isa() -> str", "cpu_isas() -> str[]", "set_cpu_isa(str isa) -> ()")


def _fake_quantize(weight, format, block_size):
    numel = weight.numel()
    if format == "int8":
        absmax = weight.new_empty([fmt.row_shape(weight.shape)[0]], dtype=torch.float32)
        return weight.new_empty([numel], dtype=torch.uint8), absmax
    packed = weight.new_empty([(numel + 1) // 2], dtype=torch.uint8)
    return packed, weight.new_empty([fmt.block_count(numel, block_size)], dtype=torch.float32)


def _fake_quantize_scales(absmax, offset):
    groups = fmt.block_count(absmax.numel(), fmt.GROUP_SIZE)
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty([groups])


def _fake_search_scales(weight, importance, format, block_size):
    return weight.new_empty([fmt.block_count(weight.numel(), block_size)], dtype=torch.float32)


def _fake_encode(weight, scales, format, block_size):
    return weight.new_empty([(weight.numel() + 1) // 2], dtype=torch.uint8)


def _fake_dequantize(packed, absmax, group_scales, offset, format, block_size, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


def _fake_dequantize_out(packed, absmax, group_scales, offset, format, block_size, out):
    return None


def _fake_linear(x, packed, absmax, group_scales, offset, format, block_size, out_features, bias, t, lora_b, scaling):
    return x.new_empty([*x.shape[:-1], out_features])


def _fake_lora_linear(
    x, packed, absmax, group_scales, offset, format, block_size, out_features, bias, lora_a, lora_b, scaling
):
    y, t = ([*x.shape[:-1], size] for size in (out_features, lora_a.shape[0]))
    return x.new_empty(y), x.new_empty(t, dtype=torch.float32)


def _fake_linear_grad_input(
    grad, packed, absmax, group_scales, offset, format, block_size, in_features, grad_t=None, lora_a=None
):
    return grad.new_empty([*grad.shape[:-1], in_features])


_FAKES = {
    "quantize": _fake_quantize,
    "quantize_scales": _fake_quantize_scales,
    "search_scales": _fake_search_scales,
    "encode": _fake_encode,
    "dequantize": _fake_dequantize,
    "dequantize_out": _fake_dequantize_out,
    "linear": _fake_linear,
    "linear_approximate": _fake_linear,
    "lora_linear": _fake_lora_linear,
    "linear_grad_input": _fake_linear_grad_input,
}


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., n] as [rows, n]; unlike reshape(-1, n) also for n = 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def product_dtype(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    """What LoRA's own products are computed in: the wider of the two dtypes; on a CPU fp32.

    Without bf16 instructions torch's bf16 product on a CPU is up to eight times slower than its fp32 one, and one with
    a transposed operand hundreds of times (docs/performance.md).
    """
    return torch.float32 if a.device.type == "cpu" else torch.promote_types(a.dtype, b.dtype)


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    dtype = product_dtype(a, b)
    return a.to(dtype) @ b.to(dtype)


def _linear_gradients(namespace, needs, grad, weight, t, lora_b, in_features, bias_dtype, scaling):
    """Gradients of ``linear`` for (x, bias, t, lora_b); None where ``needs`` is false.

    Nothing of the dense weight's size is used: grad_x decodes the packed weight again.
    """
    needs_x, needs_bias, needs_t, needs_b = needs
    grad_x = grad_bias = grad_t = grad_b = None
    if needs_x:
        op = getattr(torch.ops, namespace).linear_grad_input.default
        grad_x = op(grad, *weight[:-1], in_features)
    if (needs_t or needs_b) and grad.device.type == "cpu":
        grad = grad.float()  # once for both
    if needs_bias:
        grad_bias = rows(grad).sum(0, dtype=torch.float32).to(bias_dtype)
    if needs_t:
        grad_t = (_matmul(grad, lora_b) * scaling).to(t.dtype)
    if needs_b:
        grad_b = (_matmul(rows(grad).T, rows(t)) * scaling).to(lora_b.dtype)
    return grad_x, grad_bias, grad_t, grad_b


class _Linear(torch.autograd.Function):
    """Autograd of ``linear``: differentiable in x, bias, t and lora_b; saves neither x nor a dense weight.

    The frozen weight comes as one tuple, the op's arguments from packed to out_features: apply() takes its time over
    each argument. It is kept as it is: ``save_for_backward`` takes its time over each tensor too, and would hand the
    weight to hooks that move saved activations elsewhere. ``keyset`` is the dispatcher's, or None for a call that did
    not come through it.
    """

    @staticmethod
    def forward(ctx, x, bias, t, lora_b, namespace, keyset, weight, scaling):
        ctx.save_for_backward(t, lora_b)
        ctx.options = (x.shape[-1], None if bias is None else bias.dtype, scaling)
        ctx.weight = weight
        ctx.namespace = namespace
        return below_autograd(_LINEAR[namespace], keyset, x, *weight, bias, t, lora_b, scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:4]
        gradients = _linear_gradients(ctx.namespace, needs, grad, ctx.weight, *ctx.saved_tensors, *ctx.options)
        return (*gradients, None, None, None, None)


def _linear_with_autograd(namespace, keyset, x, *args):
    if torch.is_grad_enabled():
        bias, t, lora_b, scaling = args[7:]
        if (
            x.requires_grad
            or (t is not None and t.requires_grad)
            or (lora_b is not None and lora_b.requires_grad)
            or (bias is not None and bias.requires_grad)
        ):
            return _Linear.apply(x, bias, t, lora_b, namespace, keyset, args[:7], scaling)
    return below_autograd(_LINEAR[namespace], keyset, x, *args)


def linear(namespace: str, x: torch.Tensor, *args) -> torch.Tensor:
    """``torch.ops.<namespace>.linear(x, *args)`` without the dispatcher's way to Python and back, which costs 8 us.

    What has to pass through the dispatcher first still does: tracing, torch.func. Autocast has to be off.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return getattr(torch.ops, namespace).linear.default(x, *args)
    return _linear_with_autograd(namespace, None, x, *args)


def linear_approximate(namespace: str, *args) -> torch.Tensor:
    """``torch.ops.<namespace>.linear_approximate(*args)`` where no gradient is wanted; the short way, as ``linear``."""
    op = getattr(torch.ops, namespace).linear_approximate.default
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return op(*args)
    return below_autograd(op, None, *args)


def _autograd_linear(namespace: str):
    def linear(keyset, x, *args):
        return _linear_with_autograd(namespace, keyset, x, *args)

    return linear


class _LoraLinear(torch.autograd.Function):
    """Autograd of a linear layer and its LoRA together: as :class:`_Linear`, and differentiable in lora_a.

    Saves x in its own dtype. Both ways to x, through W and through A, are one product in the backward.
    """

    @staticmethod
    def forward(ctx, x, bias, lora_a, lora_b, namespace, weight, scaling):
        y, t = _lora_linear_below_autograd(namespace, x, weight, bias, lora_a, lora_b, scaling)
        ctx.save_for_backward(x, t, lora_a, lora_b)
        ctx.options = (x.shape[-1], None if bias is None else bias.dtype, scaling)
        ctx.namespace, ctx.weight = namespace, weight
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, t, lora_a, lora_b = ctx.saved_tensors
        needs_x, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:4]
        needs = (False, needs_bias, needs_x or needs_a, needs_b)
        _, grad_bias, grad_t, grad_b = _linear_gradients(
            ctx.namespace, needs, grad, ctx.weight, t, lora_b, *ctx.options
        )
        grad_x = None
        if needs_x:
            op = getattr(torch.ops, ctx.namespace).linear_grad_input.default
            grad_x = op(grad, *ctx.weight[:-1], x.shape[-1], grad_t, lora_a)
        _, grad_a = lora_down_gradients(grad_t, x, lora_a, False, needs_a)
        return grad_x, grad_bias, grad_a, grad_b, None, None, None


def lora_down_gradients(grad_t, x, lora_a, needs_x, needs_a):
    """Gradients of t = x A^T for (x, A) in their dtypes; None where not needed."""
    grad_x = grad_a = None
    if needs_x:
        grad_x = (grad_t @ lora_a.to(grad_t.dtype)).to(x.dtype)
    if needs_a:
        grad_a = (rows(grad_t).T @ rows(x).to(grad_t.dtype)).to(lora_a.dtype)
    return grad_x, grad_a


#: Up to so many rows of x on a CPU LoRA's first product is part of the call; from there on torch's is faster.
_FEW_ROWS = 4


def _lora_linear_below_autograd(namespace, x, weight, bias, lora_a, lora_b, scaling):
    """(y, t). On one row of a 64 x 64 layer a product of torch's for t would take as long as all the rest."""
    with torch._C._AutoDispatchBelowAutograd():
        if x.device.type == "cpu" and 0 < x.numel() <= _FEW_ROWS * x.shape[-1]:
            return _LORA_LINEAR[namespace](x, *weight, bias, lora_a, lora_b, scaling)
        t = lora_down(x, lora_a)
        return _LINEAR[namespace](x, *weight, bias, t, lora_b, scaling), t


def lora_down(x: torch.Tensor, lora_a: torch.Tensor) -> torch.Tensor:
    """t = x A^T in ``product_dtype``."""
    dtype = product_dtype(x, lora_a)
    return torch.nn.functional.linear(x.to(dtype), lora_a.to(dtype))


def lora_linear(namespace, x, weight, bias, lora_a, lora_b, scaling) -> torch.Tensor | None:
    """x W^T + scaling (x A^T) B^T as one node of the graph; None where it has to be made of two: torch.compile and
    torch.func look into what they trace.

    ``weight`` is the op's arguments from packed to out_features. Autocast has to be off.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if torch.is_grad_enabled() and (
        x.requires_grad or lora_a.requires_grad or lora_b.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _LoraLinear.apply(x, bias, lora_a, lora_b, namespace, weight, scaling)
    return _lora_linear_below_autograd(namespace, x, weight, bias, lora_a, lora_b, scaling)[0]


def _inference_only(namespace: str, name: str, operand_positions: tuple[int, ...]):
    """An Autograd kernel for an op without a backward: an error where one would be needed."""

    def kernel(keyset, *args):
        if wants_gradient(*(args[position] for position in operand_positions)):
            raise RuntimeError(
                f"{name}: expected inputs that require no gradient, or torch.no_grad(): it has no backward"
            )
        return below_autograd(getattr(getattr(torch.ops, namespace), name).default, keyset, *args)

    return kernel


def _autocast_linear(namespace: str, device_type: str):
    def linear(x, *args):
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return getattr(torch.ops, namespace).linear.default(x.to(dtype), *args)

    return linear


def _noting_the_change(namespace: str):
    def dequantize_out(keyset, *args):
        # Autograd tells by its version that a tensor saved for a backward has been overwritten.
        torch.autograd.graph.increment_version(args[-1])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op = getattr(torch.ops, namespace).dequantize_out.default
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return dequantize_out


def _register(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    fakes = _FAKES | grouped_ops.FAKES
    for schema in SCHEMAS + grouped_ops.SCHEMAS:
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fakes[name], lib=library)
    for name, kernel in grouped_ops.autograd_kernels(namespace).items():
        library.impl(name, kernel, "Autograd", with_keyset=True)
    library.impl("linear", _autograd_linear(namespace), "Autograd", with_keyset=True)
    for name in ("linear_approximate", "lora_linear"):  # x, bias, and LoRA's two
        library.impl(name, _inference_only(namespace, name, (0, 8, 9, 10)), "Autograd", with_keyset=True)
    library.impl("dequantize_out", _noting_the_change(namespace), "ADInplaceOrView", with_keyset=True)
    for device_type in ("cpu", "cuda"):
        library.impl("linear", _autocast_linear(namespace, device_type), f"Autocast{device_type.upper()}")
    return library


# The Library objects own the registrations: they live as long as the process.
LIBRARIES = {namespace: _register(namespace) for namespace in NAMESPACES.values()}
for _schema in NATIVE_SCHEMAS:
    LIBRARIES["lowbit"].define(_schema)
for _name, _kernel in grouped_ops.by_expert("lowbit").items():
    LIBRARIES["lowbit"].impl(_name, _kernel, "CUDA")
triton.register(LIBRARIES[NAMESPACES["triton"]])
_LINEAR = {namespace: getattr(torch.ops, namespace).linear.default for namespace in NAMESPACES.values()}
_LORA_LINEAR = {namespace: getattr(torch.ops, namespace).lora_linear.default for namespace in NAMESPACES.values()}
