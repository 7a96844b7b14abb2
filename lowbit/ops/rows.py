"""LoRA where each row of x has an adapter of its own: the rows of each adapter are multiplied by its factors.

On a GPU with Triton all rows are one grouped product with the stacked factors. Elsewhere each group of rows is one
product with the factors where they lie: on a CPU, copying them into a stack takes longer than multiplying. On a GPU
nothing of the size of x, y or their gradients is in fp32.
"""

from dataclasses import dataclass

import torch

from .. import backends
from .linear import Product
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
    def forward(ctx, y, x, products, scalings, *factors):
        lora_a, lora_b = factors[: len(scalings)], factors[len(scalings) :]
        groups = products.groups
        t = products.down(groups.sort(x), lora_a, scalings)
        ctx.save_for_backward(x, t, *factors)
        ctx.products, ctx.scalings = products, scalings
        return groups.unsort(products.add_up(groups.sort(y), t, lora_b))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, t, *factors = ctx.saved_tensors
        products, scalings = ctx.products, ctx.scalings
        groups, lora_a, lora_b = products.groups, factors[: len(scalings)], factors[len(scalings) :]
        needs_y, needs_x, _, _, *needs = ctx.needs_input_grad
        needs_a, needs_b = needs[: len(scalings)], needs[len(scalings) :]
        grad_x, grad_a, grad_b, rows = None, [None] * len(lora_a), [None] * len(lora_b), groups.sort(grad)
        if any(needs_b):
            grad_b = products.outer(rows, t, lora_b, needs_b)
        if needs_x or any(needs_a):
            grad_t = products.down(rows, [b.T for b in lora_b], scalings)
        if any(needs_a):
            grad_a = products.outer(grad_t, groups.sort(x), lora_a, needs_a)
        if needs_x:
            grad_x = groups.unsort(products.up(grad_t, [a.T for a in lora_a], x.dtype))
        return grad if needs_y else None, grad_x, None, None, *grad_a, *grad_b


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
        [rows, out_features] in y's dtype. On a CPU the sum is accumulated in fp32 and rounded once; on a GPU the
        product is rounded to y's dtype first.
    """
    namespace = backends.namespace_for_experts(x.device.type, backends.selected())
    products = (_StackedProducts if namespace == _TRITON else _ProductsByGroup)(groups, namespace)
    return LoraByRow.apply(y, x, products, scalings, *lora_a, *lora_b)


class _StackedProducts:
    """The products of sorted rows with the matrices of their groups, all in one launch."""

    def __init__(self, groups: Groups, namespace: str):
        self.groups, self.namespace = groups, namespace

    def _matmul(self, x, matrices, dtype) -> torch.Tensor:
        ends = self.groups.ends * self.groups.tokens(x)
        return op_of(self.namespace, "grouped_matmul")(x, torch.stack(list(matrices)), ends, dtype)

    def down(self, x, matrices, scalings) -> torch.Tensor:
        """scaling_e * x M_e^T in fp32, the matrices [rank, k]."""
        t = self._matmul(x, matrices, torch.float32)
        torch._foreach_mul_(self.groups.split(t), scalings)
        return t

    def up(self, t, matrices, dtype: torch.dtype) -> torch.Tensor:
        """t M_e^T in ``dtype``, the matrices [n, rank]."""
        return self._matmul(t, matrices, dtype)

    def add_up(self, y, t, matrices) -> torch.Tensor:
        """y + t M_e^T."""
        return self.up(t, matrices, y.dtype).add_(y)

    def outer(self, a, b, factors, needed) -> list[torch.Tensor | None]:
        """a_e^T b_e for each group, in the dtypes of its factors; None where not needed."""
        products = op_of(self.namespace, "grouped_outer")(a, b, self.groups.ends * self.groups.tokens(a)).unbind()
        return [p.to(f.dtype) if need else None for p, f, need in zip(products, factors, needed, strict=True)]


class _ProductsByGroup:
    """The same, one group after the other."""

    def __init__(self, groups: Groups, namespace: str):
        self.groups, self.product = groups, Product(namespace, ())

    def down(self, x, matrices, scalings) -> torch.Tensor:
        parts = zip(self.groups.split(x), matrices, scalings, strict=True)
        return torch.cat([self.product.matmul(part, matrix, scaling).float() for part, matrix, scaling in parts])

    def up(self, t, matrices, dtype: torch.dtype) -> torch.Tensor:
        parts = zip(self.groups.split(t), matrices, strict=True)
        return torch.cat([self.product.up(part, matrix, dtype) for part, matrix in parts])

    def add_up(self, y, t, matrices) -> torch.Tensor:
        dtype = y.dtype if self.product.has_factor_kernels(y) else torch.float32
        return (self.up(t, matrices, dtype) + y).to(y.dtype)

    def outer(self, a, b, factors, needed) -> list[torch.Tensor | None]:
        wanted = zip(needed, factors, self.groups.split(a), self.groups.split(b), strict=True)
        return [self.product.outer(own, other).to(f.dtype) if need else None for need, f, own, other in wanted]
