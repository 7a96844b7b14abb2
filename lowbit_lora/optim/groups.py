"""Settings of an optimizer's groups, and which of a model's parameters are in which group."""

import math
from typing import Any

from torch import nn

from lowbit.checks import check_choice, check_positive


def check_group(group: dict[str, Any], rule: str) -> None:
    """ValueError or TypeError unless the settings of a group are in range."""
    for name in ("lr", "eps", "weight_decay"):
        value = float(group[name])
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number of at least 0, got {group[name]!r}")
    betas = group["betas"]
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0 <= float(beta) < 1 for beta in betas)):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    check_bits(group["bits"])
    check_choice("rule", group["rule"], (rule,))


def check_bits(bits: Any) -> int:
    """``bits``; ValueError unless it is 8 or 32."""
    if bits not in (8, 32):
        raise ValueError(f"bits: expected 8 or 32, got {bits!r}")
    return bits


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    lora_plus_ratio: float = 1.0,
    decay_biases_and_norms: bool = False,
) -> list[dict[str, Any]]:
    """Groups of what trains of a model: LoRA+'s learning rate for B, and no decay of biases and norms.

    Args:
        model: any module; one of lowbit_lora's wrappers, PEFT's, or around them.
        lr: of A, and of all that is not LoRA.
        weight_decay: of what has at least two dimensions and is no bias, nor DoRA's magnitudes.
        lora_plus_ratio: B's learning rate over A's; LoRA+ proposes about 16 (Hayou et al., 2024, arXiv 2402.12354).
        decay_biases_and_norms: give them the decay too.

    Raises:
        ValueError: no parameter trains.
    """
    check_positive("lora_plus_ratio", lora_plus_ratio)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            is_factor_b = not {"lora_B", "lora_embedding_B"}.isdisjoint(parts)
            is_matrix = parameter.dim() > 1 and parts[-1] != "bias" and "lora_magnitude_vector" not in parts
            decay = weight_decay if is_matrix or decay_biases_and_norms else 0.0
            groups.setdefault((lr * lora_plus_ratio if is_factor_b else lr, decay), []).append(parameter)
    if not groups:
        raise ValueError(
            f"model: expected parameters that require gradients, got none in {type(model).__name__}; an adapter that "
            "was loaded with trainable=False does not train"
        )
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]
