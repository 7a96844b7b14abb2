"""What a product's optional operands are before a launch: contiguous, and None where there is nothing to add."""

import math

import torch


def contiguous(operand: torch.Tensor | None) -> torch.Tensor | None:
    """``operand``, if any."""
    return None if operand is None else operand.contiguous()


def lora_factors(low: torch.Tensor | None, up: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(low [..., rank] as a matrix, up), or (None, None) without LoRA or with one of rank 0."""
    if low is None or low.shape[-1] == 0:
        return None, None
    return low.reshape(-1, low.shape[-1]).contiguous(), up.contiguous()


def rounded_factors(
    low: torch.Tensor, up: torch.Tensor, dtype: torch.dtype, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(low [m, rank], up [n, rank]) in ``dtype``, whose product low up^T is scaling times that of the given ones.

    Only fp16 has too small a range for low, whose size is x's or the loss scale's: there the other factor, which is
    small, takes over what of it is beyond 2^15, and a large scaling.
    """
    if scaling != 1:
        low = low.float() * scaling
    if dtype == torch.float16:
        # Per component of the rank. What is not finite stays so in its own row, and does not count for the others. At
        # most 2^15: up, below 2 in any LoRA, would be infinite for all rows because of one far beyond fp16.
        largest = torch.linalg.vector_norm(low.float().nan_to_num(0.0, 0.0, 0.0), math.inf, 0)
        moved = (largest / 2**15).clamp(max(1.0, abs(scaling)), 2.0**15)
        low, up = low / moved, up * moved
    return low.to(dtype), up.to(dtype)
