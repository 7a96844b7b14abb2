"""What a product's optional operands are before a launch: contiguous, and None where there is nothing to add."""

import torch


def contiguous(operand: torch.Tensor | None) -> torch.Tensor | None:
    """``operand``, if any."""
    return None if operand is None else operand.contiguous()


def lora_factors(low: torch.Tensor | None, up: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(low [..., rank] as a matrix, up), or (None, None) without LoRA or with one of rank 0."""
    if low is None or low.shape[-1] == 0:
        return None, None
    return low.reshape(-1, low.shape[-1]).contiguous(), up.contiguous()
