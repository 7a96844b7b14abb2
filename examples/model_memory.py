"""The bytes that a model's base takes, and the memory that the process took."""

import sys
from dataclasses import dataclass

import torch

import lowbit


@dataclass(frozen=True)
class BaseBytes:
    """Storage of a model without its adapter.

    `parameters` counts weights (a 4-bit weight is one). `total` is the bytes they take as stored, `quantized` the part
    of `total` in 4-bit weights with their scales, and `quantized_dense` what those took in float32.
    """

    parameters: int
    total: int
    quantized: int
    quantized_dense: int


def base_bytes(model: torch.nn.Module) -> BaseBytes:
    """Count every stored tensor once, except the adapter: LoRA matrices and trained copies of the head."""
    stored = [p for name, p in model.named_parameters() if "lora_" not in name and "modules_to_save" not in name]
    quantized = [p for p in stored if isinstance(p, lowbit.QuantizedTensor)]
    return BaseBytes(
        parameters=sum(p.numel() for p in stored),
        total=sum(p.nbytes for p in stored),
        quantized=sum(p.nbytes for p in quantized),
        quantized_dense=sum(4 * p.numel() for p in quantized),
    )


def peak_memory_bytes() -> int | None:
    """Return the most resident memory that this process ever held, libraries included; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB
