"""LoRA where each row of x has an adapter of its own: the rows of each adapter are multiplied by its factors.

On a GPU with Triton all rows are one grouped product with the stacked factors. Elsewhere each group of rows is one
product of torch's with the factors where they lie: on a CPU, copying them into a stack takes longer than multiplying.
"""

from dataclasses import dataclass

import torch

from .. import backends
from .record import op_of

_TRITON = backends.NAMESPACES["triton"]


@dataclass(frozen=True)
class Groups:
    """Which rows of a batch are of which group. A row may be several rows of x, its tokens: as many for each.

    Attributes:
        ends: for each group where its rows end, once rows are sorted by group.
        ends_there: the same, int32 on the device of the rows.
        order, inverse: int64 [rows]: the rows in sorted order, and what undoes it; None where rows are sorted.
    """

    ends: list[int]
    ends_there: torch.Tensor
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    def tokens(self, x: torch.Tensor) -> int:
        """How many rows of x are one of the batch.

        Raises:
            ValueError: the rows of x are no multiple of the batch's.
        """
        rows = self.ends[-1]
        if not rows or len(x) % rows:
            raise ValueError(
                f"adapter_names: expected a name for each row of the batch, got {rows} for {len(x)} rows of x"
            )
        return len(x) // rows

    def places(self, x: torch.Tensor) -> list[slice]:
        """The places of each group's rows in x, sorted."""
        tokens = self.tokens(x)
        return [slice(tokens * begin, tokens * end) for begin, end in zip([0, *self.ends], self.ends, strict=False)]

    def sort(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [rows, n] in sorted order."""
        return x if self.order is None else _permuted(x, self.order)

    def unsort(self, x: torch.Tensor) -> torch.Tensor:
        """What undoes :meth:`sort`."""
        return x if self.inverse is None else _permuted(x, self.inverse)


def _permuted(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(order), -1).index_select(0, order).view(x.shape)


class LoraByRow(torch.autograd.Function):
    """scaling_e * x A_e^T B_e^T for each row of x and its group e, in fp32. Saves x as it is, t and the factors.

    A group touches no row and no factor of another: what is not finite in one stays there.
    """

    @staticmethod
    def forward(ctx, x, namespace, groups, scalings, *factors):
        lora_a, lora_b = factors[: len(scalings)], factors[len(scalings) :]
        t = _scaled(_matmul(namespace, groups.sort(x), lora_a, groups), groups, scalings)
        ctx.save_for_backward(x, t, *factors)
        ctx.namespace, ctx.groups, ctx.scalings = namespace, groups, scalings
        return groups.unsort(_matmul(namespace, t, lora_b, groups))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, t, *factors = ctx.saved_tensors
        namespace, groups, scalings = ctx.namespace, ctx.groups, ctx.scalings
        lora_a, lora_b = factors[: len(scalings)], factors[len(scalings) :]
        needs = ctx.needs_input_grad[4:]
        needs_a, needs_b = needs[: len(scalings)], needs[len(scalings) :]
        grad, grad_x, grad_a, grad_b = groups.sort(grad), None, [None] * len(lora_a), [None] * len(lora_b)
        if any(needs_b):
            grad_b = _outer(namespace, grad, t, lora_b, needs_b, groups)
        if ctx.needs_input_grad[0] or any(needs_a):
            grad_t = _matmul(namespace, grad, [matrix.T for matrix in lora_b], groups)
            grad_t = _scaled(grad_t, groups, scalings)
        if any(needs_a):
            grad_a = _outer(namespace, grad_t, groups.sort(x), lora_a, needs_a, groups)
        if ctx.needs_input_grad[0]:
            grad_x = groups.unsort(_matmul(namespace, grad_t, [matrix.T for matrix in lora_a], groups)).to(x.dtype)
        return grad_x, None, None, None, *grad_a, *grad_b


def lora_by_row(
    x: torch.Tensor,
    groups: Groups,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    scalings: list[float],
) -> torch.Tensor:
    """``scaling_e * x A_e^T B_e^T`` for each row of x and its group e; differentiable in x and the factors.

    Args:
        x: [rows, in_features].
        groups: which rows are of which group; none of them empty.
        lora_a, lora_b: for each group [rank, in_features] and [out_features, rank], of the same shapes.
        scalings: for each group.

    Returns:
        [rows, out_features] in fp32.
    """
    namespace = backends.namespace_for_experts(x.device.type, backends.selected)
    return LoraByRow.apply(x, namespace, groups, scalings, *lora_a, *lora_b)


def _scaled(t: torch.Tensor, groups: Groups, scalings: list[float]) -> torch.Tensor:
    """t with each group's rows times its scaling, in place."""
    torch._foreach_mul_([t[at] for at in groups.places(t)], scalings)
    return t


def _matmul(namespace: str, x: torch.Tensor, matrices, groups: Groups) -> torch.Tensor:
    """x M_e^T, rows sorted, the matrices [p, k]; in fp32."""
    if namespace == _TRITON:
        return op_of(namespace, "grouped_matmul")(x, torch.stack(matrices), groups.ends_there * groups.tokens(x))
    y = x.new_empty([len(x), len(matrices[0])], dtype=torch.float32)
    for matrix, at in zip(matrices, groups.places(x), strict=True):
        torch.mm(x[at].float(), matrix.float().T, out=y[at])
    return y


def _outer(namespace: str, a: torch.Tensor, b: torch.Tensor, like, needed, groups: Groups) -> list:
    """a_e^T b_e for each group, in the dtypes of ``like``; None where not needed."""
    if namespace == _TRITON:
        products = op_of(namespace, "grouped_outer")(a, b, groups.ends_there * groups.tokens(a)).unbind()
    else:
        products = [
            a[at].float().T @ b[at].float() if wanted else None
            for wanted, at in zip(needed, groups.places(a), strict=True)
        ]
    return [
        product.to(factor.dtype) if wanted else None
        for product, factor, wanted in zip(products, like, needed, strict=True)
    ]
