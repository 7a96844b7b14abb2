"""Pairs of low-rank factors that add to a weight, and the products of activations with a weight and with these."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..functional import linear_plus_low_rank, lora_linear, outside_autocast, without_autocast
from ..grouped import grouped_matmul
from ..ops import lora
from ..ops.dense import frozen_linear
from ..ops.rows import add_lora_by_row
from ..tensor import QuantizedTensor
from .rows import RowAdapters


class Factors(NamedTuple):
    """What an adapter adds to a weight [..., rows, columns]: scaling * left right.

    Attributes:
        left, right: [..., rows, rank] and [..., rank, columns].
        dropout: the probability of zeroing an element of what ``right`` multiplies; 0 outside of training.
        bias: [rows] of one matrix or None: what products gain besides, times the scaling.
        row_scale: [rows] of one matrix or None: by what each row of the sum of W and scaling * left right is multiplied
            besides (DoRA), before biases are added.

    The methods leave bias and row_scale out.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    dropout: float = 0.0
    bias: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None

    def swapped(self) -> "Factors":
        """What is added to the weight with its last two dimensions swapped."""
        return Factors(self.right.mT, self.left.mT, self.scaling, self.dropout)

    def product(self) -> torch.Tensor:
        """scaling * left right in fp32."""
        return self.scaling * (self.left.float() @ self.right.float())

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """scaling * dropout(x) right^T of one matrix: [..., columns] -> [..., rank] in fp32, or the wider dtype."""
        return lora.down(F.dropout(x, self.dropout) if self.dropout else x, self.right, self.scaling)

    def batched(self, x: torch.Tensor) -> torch.Tensor:
        """scaling * x right^T left^T of n matrices: x [n, tokens, columns] -> [n, tokens, rows] in the factors' dtype.

        The factors of n matrices are larger than x in their dtype, unless it has more tokens than they have ranks.
        """
        return (x.to(self.right.dtype) @ self.right.mT * self.scaling) @ self.left.mT

    def grouped(self, x: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same for a stack: of x [tokens, columns], sorted by matrix, to [tokens, rows] in ``dtype``."""
        return grouped_matmul(self.scaling * grouped_matmul(x, self.right, ends), self.left, ends, dtype)


def is_operand(weight: QuantizedTensor) -> bool:
    """Whether lowbit's products with LoRA take a quantized weight as it is."""
    # Not weight.operands(): torch.compile does not look into methods of an argument.
    return not weight.stored.transposed and QuantizedTensor.operands(weight) is not None


def adapted_linear(
    x: torch.Tensor, weight: torch.Tensor, factors: list[Factors], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (W + what the factors add)^T + bias, in x's dtype (under autocast, in the autocast dtype).

    All factors are one pair, with their ranks side by side. The products with W and with that pair are one, whose sum
    is rounded once, except for a transposed quantized W. Biases of the factors are added too.

    Args:
        x: [..., columns].
        weight: [rows, columns], dense or quantized.
        factors: of matrices; may be none.
    """
    scaled = [each for each in factors if each.row_scale is not None]
    if len(factors) == 1 and scaled and not scaled[0].dropout:
        y, bias = _scaled_product(x, weight, scaled[0]), plus_biases(bias, factors)
        return y if bias is None else y + bias.to(y.dtype)
    plain = [each for each in factors if each.row_scale is None]
    y = _plain_product(x, weight, plain, plus_biases(bias, factors))
    return _plus_scaled(y, x, weight, scaled)


def plus_products(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
    """What :func:`adapted_linear` returns, in y's dtype, where ``y`` is x W^T + bias already."""
    bias = plus_biases(None, factors)
    y = y if bias is None else y + bias.to(y.dtype)
    y = _plus_plain(y, x, [each for each in factors if each.row_scale is None])
    return _plus_scaled(y, x, weight, [each for each in factors if each.row_scale is not None])


def _plain_product(x, weight, factors, bias=None) -> torch.Tensor:
    """Without row_scale and biases of the factors."""
    if isinstance(weight, QuantizedTensor) and not is_operand(weight):
        y = x @ weight.mT
        return _plus_plain(y if bias is None else y + bias.to(y.dtype), x, factors)
    if not factors:
        return frozen_linear(x, weight, bias)
    first, *rest = factors = _side_by_side(factors)
    if rest:
        return linear_plus_low_rank(x, weight, functools.partial(_low_rank, factors), bias)
    return lora_linear(x, weight, first.right, first.left, first.scaling, bias, first.dropout, training=True)


def _scaled_product(x, weight, factors) -> torch.Tensor:
    """row_scale * (W + scaling * left right) x, without dropout."""
    y = _plain_product(x, weight, [factors._replace(dropout=0.0)])
    with without_autocast(x.device):
        return (y * factors.row_scale).to(y.dtype)


def _plus_plain(y, x, factors) -> torch.Tensor:
    return y + outside_autocast(_plain_added, x, _side_by_side(factors), y.dtype) if factors else y


def _plain_added(x, factors, dtype) -> torch.Tensor:
    """What all factors together add to a product with x."""
    return lora.up(*_low_rank(factors, x), dtype)


def _low_rank(factors: list[Factors], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(t, left)`` of the factors with their ranks side by side: what they add to x W^T is t left^T."""
    return _joined([each.down(x) for each in factors], -1), _joined([each.left for each in factors], 1)


def _joined(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]


def _plus_scaled(y, x, weight, factors) -> torch.Tensor:
    for each in factors:
        dropped = F.dropout(x, each.dropout) if each.dropout else x
        y = y + (_scaled_product(dropped, weight, each) - _plain_product(dropped, weight, []))
    return y


def plus_biases(bias: torch.Tensor | None, factors: list[Factors]) -> torch.Tensor | None:
    """``bias`` plus, in fp32, the factors' own, times their scalings; None where there is none."""
    for each in factors:
        if each.bias is not None:
            own = each.scaling * each.bias.float()
            bias = own if bias is None else bias + own
    return bias


def _side_by_side(factors: list[Factors]) -> list[Factors]:
    """Factors that add the same, in which those without dropout are one."""
    plain = [each for each in factors if not each.dropout]
    if len(plain) < 2:
        return factors
    left = torch.cat([each.scaling * each.left for each in plain], 1)
    joined = Factors(left, torch.cat([each.right for each in plain]), 1.0)
    return [joined, *(each for each in factors if each.dropout)]


def by_matrix(
    x: torch.Tensor, index: torch.Tensor, count: int, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """A grouped product for rows in any order: row i of x [rows, columns] by the matrix index[i] of ``count``.

    ``product`` takes the rows, sorted by matrix, and int32 ends, as :func:`lowbit.grouped.grouped_matmul` does.
    """
    order = index.argsort(stable=True)
    ends = torch.bincount(index, minlength=count).cumsum(0).to(torch.int32)
    y = product(x[order], ends)
    return torch.empty_like(y).index_copy(0, order, y)


def plus_products_by_row(
    y: torch.Tensor, x: torch.Tensor, factors: list[Factors | None], rows: RowAdapters
) -> torch.Tensor:
    """y + scaling * dropout(x) right^T left^T + biases, where each row of a batch has factors of its own.

    Args:
        y: [batch, ..., rows].
        x: [batch, ..., columns].
        factors: those of each name in ``rows``: matrices [rows, columns], of any ranks, without row_scale; None adds
            nothing.
        rows: which of the factors each row has.

    Returns:
        as ``y``; see :func:`~lowbit.ops.rows.add_lora_by_row`.
    """
    known = [each for each in factors if each]
    if not known:
        return y
    tokens = x.reshape(-1, x.shape[-1])
    if any(each.dropout for each in known):
        chances = torch.tensor([each.dropout if each else 0.0 for each in factors], device=x.device)
        kept = 1 - chances[rows.spread(len(tokens)), None]
        tokens = tokens * torch.empty_like(tokens).bernoulli_(kept).mul_(1 / kept)
    with without_autocast(x.device):
        base = y.reshape(len(tokens), -1)
        if any(each.bias is not None for each in known):
            nothing = torch.zeros(y.shape[-1], device=y.device)
            biases = torch.stack([plus_biases(nothing, [each] if each else []) for each in factors])
            base = base + biases.to(base.dtype)[rows.spread(len(tokens))]
        return add_lora_by_row(base, tokens, rows.groups, *_of_one_rank(factors, known)).view(y.shape)


def _of_one_rank(
    factors: list[Factors | None], known: list[Factors]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """The right sides, the left sides and the scalings, with zeros up to the largest rank and in the place of None."""
    rank = max(len(each.right) for each in known)
    if len(known) < len(factors):
        zero, (rows, columns) = known[0].right.new_zeros(()), (len(known[0].left), known[0].right.shape[1])
        nothing = Factors(zero.expand(rows, rank), zero.expand(rank, columns), 0.0)
        known = [each or nothing for each in factors]
    rights, lefts, scalings = [], [], []
    for left, right, scaling, *_ in known:
        missing = rank - len(right)
        rights.append(F.pad(right, (0, 0, 0, missing)) if missing else right)
        lefts.append(F.pad(left, (0, missing)) if missing else left)
        scalings.append(scaling)
    return rights, lefts, scalings
