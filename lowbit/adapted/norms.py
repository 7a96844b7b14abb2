"""The norms of a weight's rows with what an adapter adds to it, which DoRA divides by."""

import torch

from ..tensor import QuantizedTensor
from .factors import Factors


def square_row_norms(weight: torch.Tensor) -> torch.Tensor:
    """|W|^2 of each row of a weight [rows, columns], dense or quantized, which is decoded; fp32 [rows]."""
    decoded = weight.dequantize(torch.float32) if isinstance(weight, QuantizedTensor) else weight.float()
    return decoded.square().sum(1)


def adapted_row_norms(weight: torch.Tensor, squares: torch.Tensor, factors: Factors) -> torch.Tensor:
    """The norms, fp32 [rows], of the rows of W + scaling * B A, with A = right and B = left.

    Neither W nor the sum is formed: |W + s B A|^2 = |W|^2 + 2 s (W A^T) B + s^2 B (A A^T) B.

    Args:
        weight: W [rows, columns], dense or quantized.
        squares: |W|^2 of each row.
    """
    lora_b, lora_a, scaling = factors.left.float(), factors.right.float(), factors.scaling
    weight = weight if isinstance(weight, QuantizedTensor) else weight.float()
    crossed = 2 * scaling * ((lora_a @ weight.mT).T * lora_b).sum(1)
    own = scaling**2 * (lora_b @ (lora_a @ lora_a.T) * lora_b).sum(1)
    return (squares + crossed + own).clamp(min=0).sqrt()
