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
from . import reference
from .backends import NAMESPACES

# A weight in a schema: absmax is fp32 scales, or uint8 codes when group_scales and offset are given (4 bits only). For
# int8 block_size is the length of a row.
_WEIGHT = "Tensor packed, Tensor absmax, Tensor? group_scales, Tensor? offset, str format, int block_size"

_LINEAR_ARGUMENTS = f"Tensor x, {_WEIGHT}, int out_features, Tensor? bias, Tensor? t, Tensor? lora_b, float scaling"

SCHEMAS = (
    "quantize(Tensor weight, str format, int block_size) -> (Tensor, Tensor)",
    "quantize_scales(Tensor absmax, Tensor offset) -> (Tensor, Tensor)",
    "search_scales(Tensor weight, Tensor? importance, str format, int block_size) -> Tensor",
    "encode(Tensor weight, Tensor scales, str format, int block_size) -> Tensor",
    f"dequantize({_WEIGHT}, int[] shape, ScalarType dtype) -> Tensor",
    f"dequantize_out({_WEIGHT}, Tensor(a!) out) -> ()",
    f"linear({_LINEAR_ARGUMENTS}) -> Tensor",
    f"linear_approximate({_LINEAR_ARGUMENTS}) -> Tensor",
    f"linear_grad_input(Tensor grad, {_WEIGHT}, int in_features) -> Tensor",
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


def _fake_linear_grad_input(grad, packed, absmax, group_scales, offset, format, block_size, in_features):
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
    "linear_grad_input": _fake_linear_grad_input,
}


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., n] as [rows, n]; unlike reshape(-1, n) also for n = 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def product_dtype(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    """What LoRA's own products are computed in: the wider of the two dtypes; on a CPU fp32.

    Without bf16 instructions torch's bf16 product on a CPU is up to seven times slower than its fp32 one, and one with
    a transposed operand hundreds of times (docs/performance.md).
    """
    return torch.float32 if a.device.type == "cpu" else torch.promote_types(a.dtype, b.dtype)


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    dtype = product_dtype(a, b)
    return a.to(dtype) @ b.to(dtype)


def _linear_gradients(namespace, needs, grad, saved, format, block_size, in_features, bias_dtype, scaling):
    """Gradients of ``linear`` for (x, bias, t, lora_b); None where ``needs`` is false.

    Nothing of the dense weight's size is used: grad_x decodes the packed weight again.
    """
    packed, absmax, group_scales, offset, t, lora_b = saved
    needs_x, needs_bias, needs_t, needs_b = needs
    grad_x = grad_bias = grad_t = grad_b = None
    if needs_x:
        op = getattr(torch.ops, namespace).linear_grad_input.default
        grad_x = op(grad, packed, absmax, group_scales, offset, format, block_size, in_features)
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
    each argument. ``keyset`` is the dispatcher's, or None for a call that did not come through it.
    """

    @staticmethod
    def forward(ctx, x, bias, t, lora_b, namespace, keyset, weight, scaling):
        packed, absmax, group_scales, offset, format, block_size, _ = weight
        ctx.save_for_backward(packed, absmax, group_scales, offset, t, lora_b)
        ctx.options = (format, block_size, x.shape[-1], None if bias is None else bias.dtype, scaling)
        ctx.namespace = namespace
        return _linear_below_autograd(namespace, keyset, x, *weight, bias, t, lora_b, scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:4]
        gradients = _linear_gradients(ctx.namespace, needs, grad, ctx.saved_tensors, *ctx.options)
        return (*gradients, None, None, None, None)


def _linear_below_autograd(namespace, keyset, *args):
    op = _LINEAR[namespace]
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args) if keyset is None else op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


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
    return _linear_below_autograd(namespace, keyset, x, *args)


def linear(namespace: str, x: torch.Tensor, *args) -> torch.Tensor:
    """``torch.ops.<namespace>.linear(x, *args)`` without the dispatcher's way to Python and back, which costs 8 us.

    What has to pass through the dispatcher first still does: tracing, torch.func. Autocast has to be off.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return getattr(torch.ops, namespace).linear.default(x, *args)
    return _linear_with_autograd(namespace, None, x, *args)


def _autograd_linear(namespace: str):
    def linear(keyset, x, *args):
        return _linear_with_autograd(namespace, keyset, x, *args)

    return linear


def _inference_only(namespace: str):
    def linear_approximate(keyset, *args):
        operands = (args[0], *args[8:11])
        if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in operands):
            raise RuntimeError(
                "linear_approximate: expected inputs that require no gradient, or torch.no_grad(): it has no backward"
            )
        with torch._C._AutoDispatchBelowAutograd():
            op = getattr(torch.ops, namespace).linear_approximate.default
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return linear_approximate


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
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
    library.impl("linear", _autograd_linear(namespace), "Autograd", with_keyset=True)
    library.impl("linear_approximate", _inference_only(namespace), "Autograd", with_keyset=True)
    library.impl("dequantize_out", _noting_the_change(namespace), "ADInplaceOrView", with_keyset=True)
    for device_type in ("cpu", "cuda"):
        library.impl("linear", _autocast_linear(namespace, device_type), f"Autocast{device_type.upper()}")
    return library


# The Library objects own the registrations: they live as long as the process.
LIBRARIES = {namespace: _register(namespace) for namespace in NAMESPACES.values()}
for _schema in NATIVE_SCHEMAS:
    LIBRARIES["lowbit"].define(_schema)
_LINEAR = {namespace: getattr(torch.ops, namespace).linear.default for namespace in NAMESPACES.values()}
