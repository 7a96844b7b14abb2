"""Tables that kernels read from the memory of their device."""

import functools

import torch

from ... import format as fmt
from .launch import is_traced


@functools.cache
def _scale_map(device: torch.device) -> torch.Tensor:
    return fmt.SCALE_MAP.to(device)


def scale_map(device: torch.device) -> torch.Tensor:
    """What the 256 codes of double-quantized scales stand for, fp32 [256] on ``device``.

    A graph that torch.compile makes owns all its buffers: there it is an op that returns a copy, once per graph.
    """
    if is_traced():
        return torch.ops.lowbit_triton.scale_map.default(device)
    return _scale_map(device)


def copy_of_scale_map(device: torch.device) -> torch.Tensor:
    """The kernel of that op."""
    return _scale_map(device).clone()
