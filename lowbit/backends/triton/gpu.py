"""What a choice of configurations depends on of a GPU."""

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Gpu:
    """``capability``: 10 major + minor on NVIDIA, else 0. ``processors``: multiprocessors; compute units on AMD, and on
    Intel. ``lanes``: threads of a warp.
    """

    capability: int
    processors: int
    lanes: int = 32


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that ``device`` is; an A100 where there is none (tests)."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        major, minor = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
        return Gpu(10 * major + minor, properties.multi_processor_count, getattr(properties, "warp_size", 32))
    if device.type == "xpu":
        return Gpu(0, torch.xpu.get_device_properties(device).max_compute_units)
    return Gpu(0, 108) if torch.version.hip else Gpu(80, 108)


def shared_bytes_of(gpu: Gpu) -> int:
    """What a program may have of shared memory. Source: CUDA programming guide, table of compute capabilities."""
    if gpu.capability == 0:
        return 64 * 1024
    return {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(gpu.capability, 99) * 1024
