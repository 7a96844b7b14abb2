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
def capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA GPU, an A100's where there is no GPU (tests); None on other GPUs."""
    if device.type == "xpu" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@functools.cache
def _processors_and_lanes(device: torch.device) -> tuple[int, int]:
    """Of an A100's size where there is no GPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.multi_processor_count, getattr(properties, "warp_size", 32)
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).max_compute_units, 32
    return 108, 32


def gpu_of(device: torch.device) -> Gpu:
    """The GPU that ``device`` is."""
    major, minor = capability(device) or (0, 0)
    return Gpu(10 * major + minor, *_processors_and_lanes(device))


def shared_bytes_of(gpu: Gpu) -> int:
    """What a program may have of shared memory. Source: CUDA programming guide, table of compute capabilities."""
    if gpu.capability == 0:
        return 64 * 1024
    return {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(gpu.capability, 99) * 1024
