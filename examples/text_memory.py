"""Count the bytes a model's base takes, and the memory the process took."""

import sys
from dataclasses import dataclass

import torch

import lowbit


@dataclass(frozen=True)
class BaseBytes:
    """Storage of a model without its adapter.

    `parameters` counts weights (a 4-bit weight is one), `total` the bytes they take as stored, `quantized`
    the share of `total` in 4-bit weights with their scales, `quantized_dense` what those took in float32.
    """

    parameters: int
    total: int
    quantized: int
    quantized_dense: int


def base_bytes(model: torch.nn.Module) -> BaseBytes:
    """Count every stored tensor once, but LoRA matrices and trained copies of the head (the adapter)."""
    parameters = total = quantized = quantized_dense = 0
    seen: set[int] = set()
    for module in model.modules():
        weight = getattr(module, "quantized_weight", None)
        if isinstance(weight, lowbit.QuantizedTensor):
            quantized += weight.nbytes
            quantized_dense += 4 * weight.numel()
            parameters += weight.numel()
            seen.update(part.data_ptr() for part in weight.parts() if part is not None)
    total = quantized
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name or parameter.data_ptr() in seen:
            continue
        parameters += parameter.numel()
        total += parameter.nbytes
    return BaseBytes(parameters, total, quantized, quantized_dense)


def peak_memory_bytes() -> int | None:
    """Most resident memory this process ever held, Python and libraries included; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB
