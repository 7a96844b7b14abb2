"""Copies between a GPU and the host's pinned memory, beside what the GPU computes."""

from collections import deque
from typing import Protocol

import torch


class Arrival(Protocol):
    """The end of a copy."""

    def synchronize(self) -> None:
        """Wait, on the host, until the copy is done."""


class _Lane:
    """A stream of one GPU, and what its copies read and write until they are done."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self._under_way: deque[tuple[torch.cuda.Event, torch.Tensor, torch.Tensor]] = deque()

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        to, source = to.detach(), source.detach()  # without the graphs that made them
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream), torch.no_grad():
            to.copy_(source, non_blocking=True)
            done = self.stream.record_event()
        # Their memory is kept until then. The allocator would give it to others, and autograd would add in place to a
        # gradient that nobody else seems to have, which Tensor.record_stream does not prevent.
        self._under_way.append((done, to, source))
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()
        return done

    def synchronize(self) -> None:
        self.stream.synchronize()
        self._under_way.clear()

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


class Transfer:
    """Copies between GPUs and the host, in the order in which they are started, for each GPU on a stream of its own.

    A copy begins when the GPU has done what it was told to do before. Until it has ended its source must not change:
    :meth:`synchronize`, or what :meth:`copy` returned, says so to the host, and :meth:`join` to the GPU. Tests have a
    class in this one's place.
    """

    def __init__(self):
        self._lanes: dict[torch.device, _Lane] = {}

    def is_remote(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is on a GPU."""
        return tensor.device.type == "cuda"

    def host_like(
        self, tensor: torch.Tensor, memory_format: torch.memory_format = torch.preserve_format
    ) -> torch.Tensor:
        """Memory of the host for the numbers of such a tensor.

        It is pinned: of such memory torch takes a power of two of bytes, so up to twice of what is wanted.
        """
        return torch.empty_like(tensor.detach(), device="cpu", pin_memory=True, memory_format=memory_format)

    def device_like(self, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Memory of a GPU for the numbers of such a tensor."""
        return torch.empty_like(host, device=device)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> Arrival:
        """Start to copy; one of the two is on a GPU, and the other is pinned memory."""
        device = (to if self.is_remote(to) else source).device
        if device not in self._lanes:
            self._lanes[device] = _Lane(device)
        return self._lanes[device].copy(to, source)

    def synchronize(self) -> None:
        """Wait, on the host, for all copies."""
        for lane in self._lanes.values():
            lane.synchronize()

    def join(self) -> None:
        """Let what the GPUs compute from here on wait for all copies."""
        for lane in self._lanes.values():
            lane.join()
