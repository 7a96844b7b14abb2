"""What the benchmarks use of torch.cuda, on CPU tensors: --device stub runs their GPU code where there is no GPU.

It finds a program's mistakes before a GPU is there. Its times say nothing.
"""

import contextlib
import time
from types import SimpleNamespace

import torch

_capturing: list["CUDAGraph"] = []


class CUDAGraph:
    """Replays nothing: what was captured ran once, on the CPU."""

    def replay(self) -> None:
        """As torch.cuda.CUDAGraph's."""


@contextlib.contextmanager
def graph(captured: CUDAGraph):
    """As torch.cuda.graph; an ``.item()`` in it fails as it would in a capture."""
    _capturing.append(captured)
    item = torch.Tensor.item

    def forbidden(_):
        raise RuntimeError("operation not permitted when stream is capturing: item()")

    torch.Tensor.item = forbidden
    try:
        yield
    finally:
        torch.Tensor.item = item
        _capturing.pop()


class Event:
    """As torch.cuda.Event, by the host's clock."""

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self) -> None:
        """Take the time."""
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds, and a second more: nothing is worth warming up."""
        return (end.at - self.at) * 1e3 + 1e3


def is_available() -> bool:
    """Always."""
    return True


def synchronize() -> None:
    """Nothing to wait for."""
    if _capturing:
        raise RuntimeError("operation not permitted when stream is capturing: synchronize()")


def get_device_name() -> str:
    """What the tables show."""
    return "no GPU: the stub"


def get_device_properties(_=0) -> SimpleNamespace:
    """A GPU with an L2 of 64 KB."""
    return SimpleNamespace(L2_cache_size=2**16)


def mem_get_info() -> tuple[int, int]:
    """A gigabyte, free."""
    return 2**30, 2**30


def reset_peak_memory_stats() -> None:
    """There are none."""


def max_memory_allocated() -> int:
    """There are none."""
    return 0
