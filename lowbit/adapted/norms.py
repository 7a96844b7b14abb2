"""The norms of a weight's rows with what an adapter adds to it, which DoRA divides by."""

import torch

from ..functional import without_autocast
from ..tensor import QuantizedTensor
from .factors import Factors
from .weight import decoded


def square_row_norms(weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """|W|^2 of each row, fp32 [rows], of a weight, dense or quantized, which is decoded.

    The rows are along ``dim``; along 0 the other dimensions are their columns.
    """
    return _rows(weight, dim).square().sum(1)


def adapted_row_norms(weight: torch.Tensor, squares: torch.Tensor, factors: Factors, dim: int = 0) -> torch.Tensor:
    """The norms, fp32 [rows], of the rows of W + scaling * B A, with A = right [rank, columns] and B = left.

    Neither W nor the sum is formed: |W + s B A|^2 = |W|^2 + 2 s (W A^T) B + s^2 B (A A^T) B.

    Args:
        weight: W, as in :func:`square_row_norms`.
        squares: |W|^2 of each row.
    """
    lora_b, lora_a, scaling = factors.left.float(), factors.right.float(), factors.scaling
    with without_autocast(weight.device):
        if isinstance(weight, QuantizedTensor) and weight.dim() == 2:
            product = lora_a @ (weight if dim else weight.mT)
        else:
            product = lora_a @ _rows(weight, dim).T
        crossed = 2 * scaling * (product.T * lora_b).sum(1)
        own = scaling**2 * (lora_b @ (lora_a @ lora_a.T) * lora_b).sum(1)
        return (squares + crossed + own).clamp(min=0).sqrt()


def _rows(weight: torch.Tensor, dim: int) -> torch.Tensor:
    dense = decoded(weight, torch.float32)
    return dense.T if dim else dense.flatten(1)
