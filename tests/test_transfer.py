"""What lowbit_lora.transfer asks of CUDA's streams, of which there is a double here: there is no GPU."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lowbit_lora import transfer
from lowbit_lora.transfer import Transfer


class Event:
    def __init__(self):
        self.is_done = False

    def query(self):
        return self.is_done


class Streams:
    """torch.cuda as far as it is used, on tensors of the CPU; ``log`` has who did what."""

    def __init__(self):
        self.log, self.events, self.current = [], [], "main"

    def Stream(self, device):
        return Stream(self, "side")

    def current_stream(self, device):
        return Stream(self, self.current)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.cuda.log.append(f"event on {self.cuda.current}")
        self.cuda.events.append(Event())
        return self.cuda.events[-1]

    def synchronize(self):
        self.cuda.log.append(f"host waits for {self.name}")


@pytest.fixture
def cuda(monkeypatch):
    streams = Streams()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    monkeypatch.setattr(transfer.torch.Tensor, "copy_", noting(streams, torch.Tensor.copy_))
    return streams


def noting(streams, copy_):
    def noted(to, source, non_blocking=False):
        streams.log.append(f"copy on {streams.current}, non_blocking={non_blocking}")
        return copy_(to, source)

    return noted


def test_order(cuda):
    """A copy would begin before its source has been computed, or be read before it has ended."""
    copies, host, p = Transfer(), torch.zeros(3), torch.nn.Parameter(torch.ones(3))
    copies.copy(host, p)
    begun = ["side waits for main", "copy on side, non_blocking=True", "event on side"]
    assert cuda.log == begun and torch.equal(host, torch.ones(3)) and not host.requires_grad
    copies.synchronize()
    copies.copy(p, host * 2)
    copies.join()
    assert cuda.log == [*begun, "host waits for side", *begun, "main waits for side"]
    assert torch.equal(p.detach(), torch.full((3,), 2.0)) and p._version == 1


def test_memory_is_kept_until_the_copy_has_ended(cuda):
    """The GPU would give the memory of a gradient to another tensor while it is still being copied."""
    copies, storages, leaves = Transfer(), [], []
    for _ in range(3):
        leaf = torch.ones(4, requires_grad=True)
        source = leaf * 2
        storages.append(StorageWeakRef(source.untyped_storage()))
        leaves.append(weakref.ref(leaf))
        copies.copy(torch.empty(4), source)
        del leaf, source
    gc.collect()
    assert not any(storage.expired() for storage in storages)
    assert not any(leaf() for leaf in leaves)  # the graph is not kept
    for event in cuda.events[:2]:
        event.is_done = True
    copies.copy(torch.empty(4), torch.ones(4))
    assert [storage.expired() for storage in storages] == [True, True, False]
    copies.synchronize()
    assert storages[2].expired()


def test_memory_of_the_host():
    """Strides of an activation would be lost, or a parameter's copy require a gradient."""
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="(?i)pin|accelerator|CUDA|NVIDIA"):
            Transfer().host_like(torch.ones(3))
    host = Transfer().device_like(torch.ones(4, 3).t(), torch.device("cpu"))
    assert host.stride() == (1, 3) and not Transfer().is_remote(host)
