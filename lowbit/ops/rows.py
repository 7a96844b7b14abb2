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
        sizes: for each group how many rows it has.
        ends: for each group where its rows end, once rows are sorted by group, int32 on the device of the rows.
        order, inverse: int64 [rows]: the rows in sorted order, and what undoes it; None where rows are sorted.
    """

    sizes: list[int]
    ends: torch.Tensor
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    def tokens(self, x: torch.Tensor) -> int:
        """How many rows of x are one of the batch.

        Raises:
            ValueError: the rows of x are no multiple of the batch's.
        """
        rows = sum(self.sizes)
        if not rows or len(x) % rows:
            raise ValueError(
                f"adapter_names: expected a name for each row of the batch, got {rows} for {len(x)} rows of x"
            )
        return len(x) // rows

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows of each group, views of x [rows, n], which is sorted."""
        tokens = self.tokens(x)
        return torch.split_with_sizes(x, [tokens * size for size in self.sizes])

    def sort(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [rows, n] in sorted order."""
        return _permuted(x, self.order)

    def unsort(self, x: torch.Tensor) -> torch.Tensor:
        """What undoes :meth:`sort`."""
        return _permuted(x, self.inverse)


def _permuted(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(order), -1).index_select(0, order).view(x.shape)


class LoraByRow(torch.autograd.Function):
    """y + scaling_e * x A_e^T B_e^T for each row and its group e. Saves x as it is, t and the factors.

    A group touches no row and no factor of another: what is not finite in one stays there.
    """

    @staticmethod
    def forward(ctx, y, x, groups, namespace, scalings, *factors):
        lora_a, lora_b = factors[: len(scalings)], factors[len(scalings) :]
        t = _products(groups.sort(x), lora_a, groups, namespace, scalings)
        ctx.save_for_backward(x, t, *factors)
        ctx.groups, ctx.namespace, ctx.scalings = groups, namespace, scalings
        total = groups.sort(y).float()  # new memory in any dtype
        return groups.unsort(_products(t, lora_b, groups, namespace, total=total)).to(y.dtype)

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
            grad_t = _products(rows, [b.T for b in lora_b], groups, namespace, scalings)
        if any(needs_a):
            grad_a = _outer(grad_t, groups.sort(x), lora_a, needs_a, groups, namespace)
        if needs_x:
            grad_x = groups.unsort(_products(grad_t, [a.T for a in lora_a], groups, namespace)).to(x.dtype)
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


def _products(x, matrices, groups: Groups, namespace: str, scalings=None, total=None) -> torch.Tensor:
    """total + scaling_e * x M_e^T in fp32, the matrices [p, k], rows sorted; in the memory of ``total``, if given."""
    if namespace == _TRITON:
        y = op_of(namespace, "grouped_matmul")(x, torch.stack(list(matrices)), groups.ends * groups.tokens(x))
        if scalings is not None:
            torch._foreach_mul_(groups.split(y), scalings)
        return y if total is None else total.add_(y)
    beta = 0 if total is None else 1
    total = x.new_empty(len(x), len(matrices[0]), dtype=torch.float32) if total is None else total
    scalings = [1.0] * len(matrices) if scalings is None else scalings
    for part, rows, matrix, scaling in zip(groups.split(total), groups.split(x), matrices, scalings, strict=True):
        part.addmm_(rows.float(), matrix.float().T, beta=beta, alpha=scaling)
    return total


def _outer(a: torch.Tensor, b: torch.Tensor, factors, needed, groups: Groups, namespace: str) -> list:
    """a_e^T b_e for each group, in the dtypes of its factors; None where not needed."""
    if namespace == _TRITON:
        products = op_of(namespace, "grouped_outer")(a, b, groups.ends * groups.tokens(a)).unbind()
    else:
        wanted = zip(needed, groups.split(a), groups.split(b), strict=True)
        products = [own.float().T @ other.float() if need else None for need, own, other in wanted]
    return [p.to(f.dtype) if need else None for p, f, need in zip(products, factors, needed, strict=True)]
