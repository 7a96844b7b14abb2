"""The ops of a mixture of experts: products of each token with the matrix of the expert it goes to.

What ``ops.py`` is for one matrix, for a stack of them [E, N, K] that was quantized as one tensor. Tokens are sorted by
expert; ``expert_ends`` int32 [E] says where the rows of each end. It stays on the tokens' device: kernels read it, and
nothing waits for it.
"""

import torch

from . import format as fmt
from . import reference
from .dispatch import WEIGHT, below_autograd, wants_gradient

SCHEMAS = (
    f"grouped_linear(Tensor x, {WEIGHT}, Tensor expert_ends, int out_features, Tensor? bias, Tensor? t, "
    "Tensor? lora_b, float scaling) -> Tensor",
    f"grouped_linear_grad_input(Tensor grad, {WEIGHT}, Tensor expert_ends, int in_features, Tensor? grad_t=None, "
    "Tensor? lora_a=None) -> Tensor",
    "grouped_matmul(Tensor x, Tensor matrices, Tensor expert_ends) -> Tensor",
    "grouped_outer(Tensor a, Tensor b, Tensor expert_ends) -> Tensor",
)


def _fake_grouped_linear(
    x,
    packed,
    absmax,
    group_scales,
    offset,
    format,
    block_size,
    expert_ends,
    out_features,
    bias,
    t,
    lora_b,
    scaling,
):
    return x.new_empty([x.shape[0], out_features])


def _fake_grouped_linear_grad_input(
    grad,
    packed,
    absmax,
    group_scales,
    offset,
    format,
    block_size,
    expert_ends,
    in_features,
    grad_t=None,
    lora_a=None,
):
    return grad.new_empty([grad.shape[0], in_features])


def _fake_grouped_matmul(x, matrices, expert_ends):
    return x.new_empty([x.shape[0], matrices.shape[1]], dtype=torch.float32)


def _fake_grouped_outer(a, b, expert_ends):
    return a.new_empty([expert_ends.numel(), a.shape[1], b.shape[1]], dtype=torch.float32)


FAKES = {
    "grouped_linear": _fake_grouped_linear,
    "grouped_linear_grad_input": _fake_grouped_linear_grad_input,
    "grouped_matmul": _fake_grouped_matmul,
    "grouped_outer": _fake_grouped_outer,
}


def expert_part(packed, absmax, group_scales, offset, format, block_size, expert: int, rows: int, columns: int):
    """The parts of one matrix [rows, columns] out of a stack, as views; scales decoded (double quantization's
    groups would cross from one expert to the next). None where it does not begin with a block of its own.
    """
    numel = rows * columns
    first = expert * numel
    if format == "int8":
        return packed[first : first + numel], absmax[expert * rows : (expert + 1) * rows], None, None
    if numel % block_size:
        return None
    blocks = slice(first // block_size, (first + numel) // block_size)
    if group_scales is not None:
        # The groups that these blocks lie in, decoded, without what they hold of the neighbours.
        begin = blocks.start // fmt.GROUP_SIZE * fmt.GROUP_SIZE
        groups = group_scales[begin // fmt.GROUP_SIZE :]
        scales = reference.decode_scales(absmax[begin : blocks.stop], groups, offset)[blocks.start - begin :]
    else:
        scales = absmax[blocks]
    return packed[first // 2 : (first + numel) // 2], scales, None, None


def by_expert(namespace: str) -> dict:
    """Kernels of the products with the stack, made of the namespace's own for one matrix; they wait for expert_ends."""
    ops = getattr(torch.ops, namespace)

    def matrices(packed, absmax, group_scales, offset, format, block_size, expert_ends, rows, columns):
        """(expert, its rows of x, its W) for each that has rows; W as ``linear`` takes it, or decoded."""
        for expert, at in enumerate(reference.expert_rows(expert_ends)):
            if at.start == at.stop:
                continue
            weight = (packed, absmax, group_scales, offset, format, block_size)
            parts = expert_part(*weight, expert, rows, columns)
            if parts is None:
                # Its blocks begin or end in a neighbour's: rare enough to decode the whole stack.
                dense = ops.dequantize.default(*weight, [expert_ends.numel(), rows, columns], torch.float32)[expert]
                yield expert, at, dense
            else:
                yield expert, at, (*parts, format, block_size)

    def grouped_linear(x, *arguments):
        *weight, expert_ends, out_features, bias, t, lora_b, scaling = arguments
        y = x.new_empty([x.shape[0], out_features])
        for expert, at, part in matrices(*weight, expert_ends, out_features, x.shape[-1]):
            of_expert = (
                None if bias is None else bias[expert],
                None if t is None else t[at],
                None if lora_b is None else lora_b[expert],
            )
            if isinstance(part, tuple):
                y[at] = ops.linear.default(x[at], *part, out_features, *of_expert, scaling)
            else:
                y[at] = reference.dense_linear(x[at], part, *of_expert, scaling)
        return y

    def grouped_linear_grad_input(grad, *arguments):
        *weight, expert_ends, in_features, grad_t, lora_a = (*arguments, None, None)[:10]
        grad_x = grad.new_empty([grad.shape[0], in_features])
        for expert, at, part in matrices(*weight, expert_ends, grad.shape[-1], in_features):
            of_expert = (None, None) if grad_t is None else (grad_t[at], lora_a[expert])
            if isinstance(part, tuple):
                grad_x[at] = ops.linear_grad_input.default(grad[at], *part, in_features, *of_expert)
            else:
                grad_x[at] = reference.dense_grad_input(grad[at], part, *of_expert)
        return grad_x

    return {"grouped_linear": grouped_linear, "grouped_linear_grad_input": grouped_linear_grad_input}


def _transposed(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.transpose(1, 2)


class _GroupedMatmul(torch.autograd.Function):
    """Autograd of ``grouped_matmul``: differentiable in x and the matrices."""

    @staticmethod
    def forward(ctx, x, matrices, expert_ends, namespace, keyset):
        ctx.save_for_backward(x, matrices, expert_ends)
        ctx.namespace = namespace
        return below_autograd(getattr(torch.ops, namespace).grouped_matmul.default, keyset, x, matrices, expert_ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, matrices, ends = ctx.saved_tensors
        ops = getattr(torch.ops, ctx.namespace)
        grad_x = grad_matrices = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.grouped_matmul.default(grad, _transposed(matrices), ends).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_matrices = ops.grouped_outer.default(grad, x, ends).to(matrices.dtype)
        return grad_x, grad_matrices, None, None, None


def _linear_gradients(ops, needs, grad, ends, t, lora_b, bias_dtype, scaling):
    """Gradients of ``grouped_linear`` for (bias, t, lora_b), in fp32 for t; None where ``needs`` is false."""
    needs_bias, needs_t, needs_b = needs
    grad_bias = grad_t = grad_b = None
    if needs_bias:
        grad_bias = ops.grouped_outer.default(grad.new_ones([grad.shape[0], 1]), grad, ends)[:, 0].to(bias_dtype)
    if needs_t:
        grad_t = ops.grouped_matmul.default(grad, _transposed(lora_b), ends) * scaling
    if needs_b:
        grad_b = (ops.grouped_outer.default(grad, t, ends) * scaling).to(lora_b.dtype)
    return grad_bias, grad_t, grad_b


class _GroupedLinear(torch.autograd.Function):
    """Autograd of ``grouped_linear``: differentiable in x, bias, t and lora_b.

    ``weight`` is the op's arguments from packed to block_size.
    """

    @staticmethod
    def forward(ctx, x, bias, t, lora_b, expert_ends, namespace, keyset, weight, out_features, scaling):
        ctx.save_for_backward(t, lora_b, expert_ends)
        ctx.options = (None if bias is None else bias.dtype, scaling)
        ctx.weight, ctx.namespace, ctx.in_features = weight, namespace, x.shape[-1]
        arguments = (x, *weight, expert_ends, out_features, bias, t, lora_b, scaling)
        return below_autograd(getattr(torch.ops, namespace).grouped_linear.default, keyset, *arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        t, lora_b, ends = ctx.saved_tensors
        ops = getattr(torch.ops, ctx.namespace)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.grouped_linear_grad_input.default(grad, *ctx.weight, ends, ctx.in_features)
        needs = ctx.needs_input_grad[1:4]
        grad_bias, grad_t, grad_b = _linear_gradients(ops, needs, grad, ends, t, lora_b, *ctx.options)
        grad_t = None if grad_t is None else grad_t.to(t.dtype)
        return grad_x, grad_bias, grad_t, grad_b, *[None] * 6


class _GroupedLoraLinear(torch.autograd.Function):
    """Autograd of the products and their LoRA together: both ways to x are one product in the backward."""

    @staticmethod
    def forward(ctx, x, bias, lora_a, lora_b, expert_ends, namespace, weight, out_features, scaling):
        ops = getattr(torch.ops, namespace)
        t = ops.grouped_matmul.default(x, lora_a, expert_ends)
        ctx.save_for_backward(x, t, lora_a, lora_b, expert_ends)
        ctx.options = (None if bias is None else bias.dtype, scaling)
        ctx.weight, ctx.namespace = weight, namespace
        return ops.grouped_linear.default(x, *weight, expert_ends, out_features, bias, t, lora_b, scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, t, lora_a, lora_b, ends = ctx.saved_tensors
        ops = getattr(torch.ops, ctx.namespace)
        needs_x, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:4]
        needs = (needs_bias, needs_x or needs_a, needs_b)
        grad_bias, grad_t, grad_b = _linear_gradients(ops, needs, grad, ends, t, lora_b, *ctx.options)
        grad_x = grad_a = None
        if needs_x:
            grad_x = ops.grouped_linear_grad_input.default(grad, *ctx.weight, ends, x.shape[-1], grad_t, lora_a)
        if needs_a:
            grad_a = ops.grouped_outer.default(grad_t, x, ends).to(lora_a.dtype)
        return grad_x, grad_bias, grad_a, grad_b, *[None] * 5


def autograd_kernels(namespace: str) -> dict:
    """Kernels of the Autograd key for the two ops that have a backward; they take the dispatcher's keyset first."""

    def grouped_linear(keyset, x, *arguments):
        *weight, ends, out_features, bias, t, lora_b, scaling = arguments
        if wants_gradient(x, bias, t, lora_b):
            return _GroupedLinear.apply(
                x, bias, t, lora_b, ends, namespace, keyset, tuple(weight), out_features, scaling
            )
        return below_autograd(getattr(torch.ops, namespace).grouped_linear.default, keyset, x, *arguments)

    def grouped_matmul(keyset, x, matrices, expert_ends):
        if wants_gradient(x, matrices):
            return _GroupedMatmul.apply(x, matrices, expert_ends, namespace, keyset)
        return below_autograd(getattr(torch.ops, namespace).grouped_matmul.default, keyset, x, matrices, expert_ends)

    return {"grouped_linear": grouped_linear, "grouped_matmul": grouped_matmul}


def lora_linear(namespace, x, weight, expert_ends, out_features, lora_a, lora_b, scaling, bias) -> torch.Tensor:
    """The product and its LoRA, as one node of the graph; under torch.compile and torch.func as two ops, which they
    look into. ``weight``: from packed to block_size.
    """
    if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        return _GroupedLoraLinear.apply(x, bias, lora_a, lora_b, expert_ends, namespace, weight, out_features, scaling)
    ops = getattr(torch.ops, namespace)
    t = ops.grouped_matmul.default(x, lora_a, expert_ends)
    return ops.grouped_linear.default(x, *weight, expert_ends, out_features, bias, t, lora_b, scaling)
