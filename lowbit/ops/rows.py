"""LoRA where each row of x has an adapter of its own: the rows of each adapter are multiplied by its factors.

On a GPU with Triton all rows are sorted, and are one grouped product with the stacked factors. Elsewhere the rows of
each group are products of torch's with the factors where they lie: on a CPU, copying the factors into a stack, or all
rows into their order, takes longer than multiplying them.
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
        order, inverse: int64 [rows]: the rows in sorted order, and what undoes it.
    """

    sizes: list[int]
    ends: torch.Tensor
    order: torch.Tensor
    inverse: torch.Tensor

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
        return x.split([tokens * size for size in self.sizes])

    def places(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The places of each group's rows in x, not sorted: an int64 index for each."""
        tokens = self.tokens(x)
        if tokens == 1:
            return self.order.split(self.sizes)
        first = self.order[:, None] * tokens
        return self.split((first + torch.arange(tokens, device=first.device)).flatten())

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
        sums = _grouped_sums if namespace == _TRITON else _sums
        total, t = sums(y, x, groups, scalings, lora_a, lora_b)
        ctx.save_for_backward(x, t, *factors)
        ctx.groups, ctx.namespace, ctx.scalings = groups, namespace, scalings
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, t, *factors = ctx.saved_tensors
        lora_a, lora_b = factors[: len(ctx.scalings)], factors[len(ctx.scalings) :]
        needs_y, needs_x, _, _, _, *needs = ctx.needs_input_grad
        needs_a, needs_b = needs[: len(lora_a)], needs[len(lora_a) :]
        gradients = _grouped_gradients if ctx.namespace == _TRITON else _gradients
        grad_x, grad_a, grad_b = gradients(
            grad, x, t, ctx.groups, ctx.scalings, lora_a, lora_b, needs_x, needs_a, needs_b
        )
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


# ---- group by group; t = scaling_e * x A_e^T [rows, rank] is sorted, and in fp32


def _sums(y, x, groups: Groups, scalings, lora_a, lora_b) -> tuple[torch.Tensor, torch.Tensor]:
    """``(y + t B_e^T, t)``."""
    total, t = torch.empty_like(y), x.new_empty(len(x), len(lora_a[0]), dtype=torch.float32)
    for at, own_t, a, b, scaling in zip(groups.places(x), groups.split(t), lora_a, lora_b, scalings, strict=True):
        own_t.addmm_(x.index_select(0, at).float(), a.float().T, beta=0, alpha=scaling)
        own = y.index_select(0, at).float().addmm_(own_t, b.float().T)
        total.index_copy_(0, at, own.to(y.dtype))
    return total, t


def _gradients(grad, x, t, groups: Groups, scalings, lora_a, lora_b, needs_x, needs_a, needs_b) -> tuple:
    """``(of x, [of each A], [of each B])``; None where it is not needed."""
    grad_x, grad_a, grad_b = torch.empty_like(x) if needs_x else None, [], []
    each = zip(groups.places(x), groups.split(t), scalings, lora_a, lora_b, needs_a, needs_b, strict=True)
    for at, own_t, scaling, a, b, needs_own_a, needs_own_b in each:
        own = grad.index_select(0, at).float()
        grad_t = torch.addmm(own_t, own, b.float(), beta=0, alpha=scaling) if needs_x or needs_own_a else None
        grad_b.append((own.T @ own_t).to(b.dtype) if needs_own_b else None)
        grad_a.append((grad_t.T @ x.index_select(0, at).float()).to(a.dtype) if needs_own_a else None)
        if needs_x:
            grad_x.index_copy_(0, at, (grad_t @ a.float()).to(x.dtype))
    return grad_x, grad_a, grad_b


# ---- all groups at once


def _grouped_sums(y, x, groups: Groups, scalings, lora_a, lora_b) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`_sums`."""
    matmul, ends = op_of(_TRITON, "grouped_matmul"), groups.ends * groups.tokens(x)
    t = matmul(groups.sort(x), torch.stack(list(lora_a)), ends)
    torch._foreach_mul_(groups.split(t), scalings)
    added = matmul(t, torch.stack(list(lora_b)), ends)
    return groups.unsort(added.add_(groups.sort(y))).to(y.dtype), t


def _grouped_gradients(grad, x, t, groups: Groups, scalings, lora_a, lora_b, needs_x, needs_a, needs_b) -> tuple:
    """See :func:`_gradients`."""
    matmul, outer = op_of(_TRITON, "grouped_matmul"), op_of(_TRITON, "grouped_outer")
    grad, ends = groups.sort(grad), groups.ends * groups.tokens(x)
    grad_x, grad_a, grad_b = None, [None] * len(lora_a), [None] * len(lora_b)
    if any(needs_b):
        grad_b = _needed(outer(grad, t, ends), lora_b, needs_b)
    if needs_x or any(needs_a):
        grad_t = matmul(grad, torch.stack([b.T for b in lora_b]), ends)
        torch._foreach_mul_(groups.split(grad_t), scalings)
    if any(needs_a):
        grad_a = _needed(outer(grad_t, groups.sort(x), ends), lora_a, needs_a)
    if needs_x:
        grad_x = groups.unsort(matmul(grad_t, torch.stack([a.T for a in lora_a]), ends)).to(x.dtype)
    return grad_x, grad_a, grad_b


def _needed(gradients: torch.Tensor, factors, needed) -> list[torch.Tensor | None]:
    return [own.to(f.dtype) if need else None for own, f, need in zip(gradients, factors, needed, strict=True)]
