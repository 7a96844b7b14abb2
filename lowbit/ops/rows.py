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
    """y + scaling_e * x A_e^T B_e^T for each row and its group e. Saves x as it is, t and the factors.

    A group touches no row and no factor of another: what is not finite in one stays there.
    """

    @staticmethod
    def forward(ctx, y, x, groups, namespace, scalings, *factors):
        lora_a, lora_b = factors[: len(scalings)], factors[len(scalings) :]
        t = x.new_zeros(len(x), len(lora_a[0]), dtype=torch.float32)
        t = _scaled(_add_products(t, groups.sort(x), lora_a, groups, namespace), groups, scalings)
        ctx.save_for_backward(x, t, *factors)
        ctx.groups, ctx.namespace, ctx.scalings = groups, namespace, scalings
        total = groups.sort(y).to(torch.float32, copy=True)
        return groups.unsort(_add_products(total, t, lora_b, groups, namespace)).to(y.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, t, *factors = ctx.saved_tensors
        groups, namespace, scalings = ctx.groups, ctx.namespace, ctx.scalings
        lora_a, lora_b = factors[: len(scalings)], factors[len(scalings) :]
        needs_y, needs_x, _, _, _, *needs = ctx.needs_input_grad
        needs_a, needs_b = needs[: len(scalings)], needs[len(scalings) :]
        grad_x, grad_a, grad_b, rows = None, [None] * len(lora_a), [None] * len(lora_b), groups.sort(grad)
        if any(needs_b):
            grad_b = _outer(rows, t, lora_b, needs_b, groups, namespace)
        if needs_x or any(needs_a):
            grad_t = _add_products(torch.zeros_like(t), rows, [b.T for b in lora_b], groups, namespace)
            grad_t = _scaled(grad_t, groups, scalings)
        if any(needs_a):
            grad_a = _outer(grad_t, groups.sort(x), lora_a, needs_a, groups, namespace)
        if needs_x:
            grad_x = x.new_zeros(x.shape, dtype=torch.float32)
            grad_x = _add_products(grad_x, grad_t, [a.T for a in lora_a], groups, namespace)
            grad_x = groups.unsort(grad_x).to(x.dtype)
        return grad if needs_y else None, grad_x, None, None, None, *grad_a, *grad_b


def add_lora_by_row(
    y: torch.Tensor,
    x: torch.Tensor,
    groups: Groups,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    scalings: list[float],
) -> torch.Tensor:
    """``y + scaling_e * x A_e^T B_e^T`` for each row and its group e; differentiable in y, x and the factors.

    Args:
        y: [rows, out_features], such as the product with the base's weight.
        x: [rows, in_features].
        groups: which rows are of which group.
        lora_a, lora_b: for each group [rank, in_features] and [out_features, rank], of the same shapes.
        scalings: for each group.

    Returns:
        [rows, out_features] in y's dtype; the sum is accumulated in fp32 and rounded once.
    """
    namespace = backends.namespace_for_experts(x.device.type, backends.selected)
    return LoraByRow.apply(y, x, groups, namespace, scalings, *lora_a, *lora_b)


def _scaled(t: torch.Tensor, groups: Groups, scalings: list[float]) -> torch.Tensor:
    """t with each group's rows times its scaling, in place."""
    torch._foreach_mul_([t[at] for at in groups.places(t)], scalings)
    return t


def _add_products(total: torch.Tensor, x: torch.Tensor, matrices, groups: Groups, namespace: str) -> torch.Tensor:
    """total [rows, p, fp32] + x M_e^T, the matrices [p, k], rows sorted; in place."""
    if namespace == _TRITON:
        ends = groups.ends_there * groups.tokens(x)
        return total.add_(op_of(namespace, "grouped_matmul")(x, torch.stack(list(matrices)), ends))
    for matrix, at in zip(matrices, groups.places(x), strict=True):
        total[at].addmm_(x[at].float(), matrix.float().T)
    return total


def _outer(a: torch.Tensor, b: torch.Tensor, factors, needed, groups: Groups, namespace: str) -> list:
    """a_e^T b_e for each group, in the dtypes of its factors; None where not needed."""
    if namespace == _TRITON:
        products = op_of(namespace, "grouped_outer")(a, b, groups.ends_there * groups.tokens(a)).unbind()
    else:
        wanted = zip(needed, groups.places(a), strict=True)
        products = [a[at].float().T @ b[at].float() if need else None for need, at in wanted]
    return [p.to(f.dtype) if need else None for p, f, need in zip(products, factors, needed, strict=True)]
