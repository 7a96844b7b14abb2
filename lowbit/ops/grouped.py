"""The ops of a mixture of experts: products of each token with the matrix of the expert it goes to.

``linear.py`` multiplies by one matrix, this file by a stack of matrices [E, N, K] that was quantized as one tensor.
Tokens are sorted by expert; ``expert_ends`` int32 [E] says where the rows of each end. It stays on the tokens' device:
kernels read it, and nothing waits for it.
"""

import torch

from .. import reference
from ..format import WeightSpec
from . import linear as single
from .record import WEIGHT, Op, below_autograd, is_traced, op_of, wants_gradient


class GroupedProduct(single.Product):
    """How rows multiply the matrices of their experts, on one backend."""

    name = "grouped_linear"

    def __init__(self, namespace: str, weight: tuple, expert_ends: torch.Tensor):
        super().__init__(namespace, weight)
        self.expert_ends, self.groups = expert_ends, (expert_ends,)

    def has_lora_kernels(self, x: torch.Tensor) -> bool:
        """Nowhere is a stack of matrices one op with its LoRA."""
        return False

    def has_factor_kernels(self, *activations: torch.Tensor) -> bool:
        """Nor are there kernels for the factors of one expert."""
        return False

    def matmul(self, x: torch.Tensor, matrix: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """scale x M_e^T, the matrices [E, p, k], in fp32."""
        return single.scaled(op_of(self.namespace, "grouped_matmul")(x, matrix, self.expert_ends), scale)

    def up(self, t, matrix, dtype: torch.dtype) -> torch.Tensor:
        """t M_e^T in ``dtype``."""
        return op_of(self.namespace, "grouped_matmul")(t, matrix, self.expert_ends, dtype)

    def outer(self, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """scale a_e^T b_e for each expert, in fp32."""
        return single.scaled(op_of(self.namespace, "grouped_outer")(a, b, self.expert_ends), scale)

    def sum_rows(self, grad: torch.Tensor) -> torch.Tensor:
        """The sum over each expert's rows, in fp32."""
        return self.outer(grad.new_ones([grad.shape[0], 1]), grad)[:, 0]


def grouped_lora_linear(namespace, x, weight, expert_ends, features, bias, lora_a, lora_b, scaling) -> torch.Tensor:
    """The first result of ``torch.ops.<namespace>.grouped_lora_linear``; as :func:`lowbit.ops.linear.linear`."""
    if is_traced():
        op = getattr(torch.ops, namespace).grouped_lora_linear.default
        return op(x, *weight, expert_ends, features, bias, lora_a, lora_b, scaling)[0]
    product = GroupedProduct(namespace, weight, expert_ends)
    return single.lora_linear_of(product, x, features, bias, lora_a, lora_b, scaling)[0]


def _autograd_linear(namespace: str):
    def kernel(keyset, x, *args):
        *weight, expert_ends, features, bias, t, lora_b, scaling = args
        product = GroupedProduct(namespace, tuple(weight), expert_ends)
        if wants_gradient(x, bias, t, lora_b):
            return single.Linear.apply(x, bias, t, lora_b, product, keyset, features, scaling)
        return product.forward(keyset, x, features, bias, t, lora_b, scaling)

    return kernel


def _autograd_lora_linear(namespace: str):
    def kernel(keyset, x, *args):
        *weight, expert_ends, features, bias, lora_a, lora_b, scaling = args
        product = GroupedProduct(namespace, tuple(weight), expert_ends)
        return single.lora_linear_of(product, x, features, bias, lora_a, lora_b, scaling)

    return kernel


class _GroupedMatmul(torch.autograd.Function):
    """Differentiable in x and the matrices."""

    @staticmethod
    def forward(ctx, x, matrices, product, keyset, dtype):
        ctx.save_for_backward(x, matrices)
        ctx.product = product
        op = op_of(product.namespace, "grouped_matmul")
        return below_autograd(op, keyset, x, matrices, product.expert_ends, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, matrices = ctx.saved_tensors
        needs_x, needs_matrices = ctx.needs_input_grad[:2]
        grad_x = ctx.product.up(grad, matrices.transpose(1, 2), x.dtype) if needs_x else None
        grad_matrices = ctx.product.outer(grad, x).to(matrices.dtype) if needs_matrices else None
        return grad_x, grad_matrices, None, None, None


def _autograd_matmul(namespace: str):
    op = op_of(namespace, "grouped_matmul")

    def kernel(keyset, x, matrices, expert_ends, dtype=torch.float32):
        if wants_gradient(x, matrices):
            return _GroupedMatmul.apply(x, matrices, GroupedProduct(namespace, (), expert_ends), keyset, dtype)
        return below_autograd(op, keyset, x, matrices, expert_ends, dtype)

    return kernel


def _lora_by_parts(namespace: str):
    def kernel(x, *args):
        *weight, expert_ends, features, bias, lora_a, lora_b, scaling = args
        product = GroupedProduct(namespace, tuple(weight), expert_ends)
        return product.lora_forward(x, features, bias, lora_a, lora_b, scaling)

    return kernel


def expert_part(packed, absmax, group_scales, offset, spec: str, expert: int, rows: int, columns: int) -> tuple | None:
    """The arguments from packed to spec of one matrix [rows, columns] out of a stack, as views; scales decoded, since
    double quantization's groups would cross from one expert to the next. None where the matrix does not begin with a
    block of its own.
    """
    numel, weight = rows * columns, WeightSpec.parse(spec)
    packed, absmax = packed.reshape(-1), absmax.reshape(-1)
    codes = packed[weight.packed_size(expert * numel) : weight.packed_size((expert + 1) * numel)]
    if weight.record.scales.per_row:
        return codes, absmax[expert * rows : (expert + 1) * rows], None, None, spec
    if numel % weight.block_size:
        return None
    blocks = numel // weight.block_size
    part = slice(expert * blocks, (expert + 1) * blocks)
    if not weight.double_quant:
        return codes, absmax[part], None, None, spec
    scales = reference.decode_scales(absmax[part], group_scales, offset, spec, part.start)
    return codes, scales, None, None, weight.without_double_quant().text


def by_expert(namespace: str) -> dict:
    """Kernels of the products with the stack, made of the namespace's own for one matrix; they wait for expert_ends."""

    def fill(result, weight, expert_ends, shape, product, dense_product):
        """``result`` with each expert's rows: ``product`` takes (expert, rows, W as an op takes it), the other W."""
        for expert, at in enumerate(reference.expert_rows(expert_ends)):
            if at.start == at.stop:
                continue
            part = expert_part(*weight, expert, *shape)
            if part is not None:
                result[at] = product(expert, at, part)
            else:  # its blocks begin or end in a neighbour's: rare enough to decode the whole stack
                stack = op_of(namespace, "dequantize")(*weight, [expert_ends.numel(), *shape], torch.float32)
                result[at] = dense_product(expert, at, stack[expert])
        return result

    def grouped_linear(x, *arguments):
        *weight, expert_ends, features, bias, t, lora_b, scaling = arguments

        def rest(e, at):
            return None if bias is None else bias[e], *((None, None) if t is None else (t[at], lora_b[e])), scaling

        return fill(
            x.new_empty([x.shape[0], features]),
            weight,
            expert_ends,
            (features, x.shape[-1]),
            lambda e, at, part: op_of(namespace, "linear")(x[at], *part, features, *rest(e, at)),
            lambda e, at, w: reference.dense_linear(x[at], w, *rest(e, at)),
        )

    def grouped_linear_grad_input(grad, *arguments):
        *weight, expert_ends, features, grad_t, lora_a = (*arguments, None, None)[:9]

        def lora(e, at):
            return (None, None) if grad_t is None else (grad_t[at], lora_a[e])

        return fill(
            grad.new_empty([grad.shape[0], features]),
            weight,
            expert_ends,
            (grad.shape[-1], features),
            lambda e, at, part: op_of(namespace, "linear_grad_input")(grad[at], *part, features, *lora(e, at)),
            lambda e, at, w: reference.dense_grad_input(grad[at], w, *lora(e, at)),
        )

    return {"grouped_linear": grouped_linear, "grouped_linear_grad_input": grouped_linear_grad_input}


def _fake_linear(x, packed, absmax, group_scales, offset, spec, expert_ends, out_features, *rest):
    return x.new_empty([x.shape[0], out_features])


def _fake_lora_linear(
    x, packed, absmax, group_scales, offset, spec, expert_ends, out_features, bias, lora_a, lora_b, scaling
):
    t = x.new_empty([x.shape[0], lora_a.shape[1]], dtype=torch.float32)
    return x.new_empty([x.shape[0], out_features]), t


def _fake_grad_input(grad, packed, absmax, group_scales, offset, spec, expert_ends, in_features, *lora):
    return grad.new_empty([grad.shape[0], in_features])


def _fake_matmul(x, matrices, expert_ends, dtype=torch.float32):
    return x.new_empty([x.shape[0], matrices.shape[1]], dtype=dtype)


def _fake_outer(a, b, expert_ends):
    return a.new_empty([expert_ends.numel(), a.shape[1], b.shape[1]], dtype=torch.float32)


_STACK = f"{WEIGHT}, Tensor expert_ends"
OPS = (
    Op(
        f"grouped_linear(Tensor x, {_STACK}, int out_features, Tensor? bias, Tensor? t, Tensor? lora_b, float scaling)"
        " -> Tensor",
        _fake_linear,
        _autograd_linear,
    ),
    Op(
        f"grouped_lora_linear(Tensor x, {_STACK}, int out_features, Tensor? bias, Tensor lora_a, Tensor lora_b, "
        "float scaling) -> (Tensor, Tensor)",
        _fake_lora_linear,
        _autograd_lora_linear,
        kernel=_lora_by_parts,
    ),
    Op(
        f"grouped_linear_grad_input(Tensor grad, {_STACK}, int in_features, Tensor? grad_t=None, Tensor? lora_a=None)"
        " -> Tensor",
        _fake_grad_input,
    ),
    Op(
        "grouped_matmul(Tensor x, Tensor matrices, Tensor expert_ends, ScalarType dtype=float32) -> Tensor",
        _fake_matmul,
        _autograd_matmul,
    ),
    Op("grouped_outer(Tensor a, Tensor b, Tensor expert_ends) -> Tensor", _fake_outer),
)
