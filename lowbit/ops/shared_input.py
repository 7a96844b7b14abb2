"""t = x A^T of several LoRAs that take the same x, as those of q, k and v do: all by the launch of the first.

Which LoRAs these are is observed. A product whose x is the very tensor that the product before it took *follows* the
first product with that x. From the next time on the first one's launch computes t for its followers too, each of which
takes its own, once. Nobody has to say which layers belong together, and a layer that no longer follows is forgotten.

A t is taken only where x and A are what they were when it was computed: the same tensors with the same memory and
version, in the same graph. (As in autograd's checks, a write that torch's version counter does not count, such as one
through ``.data``, is not seen.) x is not kept alive; with it goes each t that nobody took. A thread sees only its own.

Only a CUDA graph that is being captured gets such launches. To serve a product and its followers takes the host longer
(9 us a product more, benchmarks/bench_host.py's machine) than the launches that it saves; a graph does so once, and
saves them in each replay. Elsewhere lora_a are only met, once each: before a capture torch wants a run of the same.
"""

import functools
import threading
import weakref
from collections.abc import Sequence

import torch
from torch.utils.weak import TensorWeakRef

CAPTURE_ID = "capture_id(Tensor x) -> int"

#: How many follow at most: kMostOtherLoras of csrc/arguments.h.
MOST = 3


class _Follower:
    """A lora_a that follows another, its t where that waits for it, and its state when t was computed."""

    __slots__ = ("lora_a", "state", "t")

    def __init__(self, lora_a: torch.Tensor):
        self.lora_a, self.state, self.t = TensorWeakRef(lora_a), None, None


class _First:
    """A lora_a that others follow, and the x that it took last, in which graph."""

    __slots__ = ("capture", "followers", "lora_a", "state", "x")

    def __init__(self, lora_a: weakref.ref):
        self.lora_a, self.followers = lora_a, []

    def begin(self, x: torch.Tensor, lora_a: torch.Tensor, capture: tuple | None) -> list[torch.Tensor]:
        """Take x; return the lora_a of the followers whose t it is to compute: in a graph."""
        self.x = weakref.ref(x, functools.partial(_end, self.followers))
        self.state, self.capture = _state(x), capture
        if capture is None:
            return []
        kind, served, others = _kind(lora_a), [], []
        for follower in self.followers:
            other = follower.lora_a()
            if other is not None and _kind(other) == kind:
                follower.state = _state(other)
                served.append(follower)
                others.append(other)
        self.followers[:] = served
        return others

    def is_followed(self, x: torch.Tensor, lora_a: torch.Tensor, capture: tuple | None) -> bool:
        """Whether a product takes the same x after this one, which has not been changed."""
        if self.x() is not x or (first := self.lora_a()) is None or first is lora_a:
            return False
        return self.state == _state(x) and self.capture == capture

    def take(self, lora_a: torch.Tensor) -> torch.Tensor | None:
        """A follower's t, if it is right. One that is new follows from now on."""
        for follower in self.followers:
            if follower.lora_a.ref() is lora_a:
                t, follower.t = follower.t, None
                return t if follower.state == _state(lora_a) else None
        if len(self.followers) < MOST and _is_parameter(lora_a) and _kind(lora_a) == _kind(self.lora_a()):
            self.followers.append(_Follower(lora_a))
        return None


class _Thread(threading.local):
    def __init__(self):
        self.latest: _First | None = None
        self.met: dict[int, _First] = {}  # by the id of their lora_a


_thread = _Thread()


def find(x: torch.Tensor, lora_a: torch.Tensor) -> tuple[torch.Tensor | None, Sequence[torch.Tensor]]:
    """What a product finds: (its t, ()), or (None, the lora_a whose t its launch is to compute too).

    The latter t are then given to :func:`keep`.
    """
    thread, capture = _thread, _capture(x)
    if capture is None and id(lora_a) in thread.met:
        return None, ()
    if torch.is_inference_mode_enabled():  # whose tensors have no version
        return None, ()
    latest = thread.latest
    if latest is not None:
        if latest.is_followed(x, lora_a, capture):
            _first(thread.met, lora_a)
            return latest.take(lora_a), ()
        _end(latest.followers)
        thread.latest = None
    if type(x) is not torch.Tensor or x.is_inference() or not _is_parameter(lora_a):
        return None, ()
    latest = thread.latest = _first(thread.met, lora_a)
    return None, latest.begin(x, lora_a, capture)


def keep(ts: Sequence[torch.Tensor]) -> None:
    """Let those that :func:`find` named last find their t."""
    for follower, t in zip(_thread.latest.followers, ts, strict=True):
        follower.t = t


def _end(followers: list[_Follower], _=None) -> None:
    """Forget those that did not come, and their t."""
    followers[:] = [each for each in followers if each.t is None]


def _first(met: dict[int, _First], lora_a: torch.Tensor) -> _First:
    key = id(lora_a)
    found = met.get(key)
    if found is None:
        found = met[key] = _First(weakref.ref(lora_a, lambda _: met.pop(key, None)))
    return found


def _is_parameter(lora_a: torch.Tensor) -> bool:
    """Whether it outlives a product, is no shard of something, and has a version."""
    return type(lora_a) is torch.nn.Parameter and not lora_a.is_inference()


def _kind(lora_a: torch.Tensor) -> tuple:
    """What those that one launch serves have in common. A sharded parameter's memory may be freed for a while."""
    return lora_a.shape, lora_a.dtype, lora_a.get_device(), lora_a.data_ptr() != 0


def _state(tensor: torch.Tensor) -> tuple:
    """What changes where the tensor's values do. (``.data = ...`` counts no version.)"""
    return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _capture(x: torch.Tensor) -> tuple[int, int] | None:
    """(the current stream of x's device, the graph that it is being captured into), or None.

    Nothing in a graph may read what another one computes, or what a stream computes that it does not wait for.
    """
    if not x.is_cuda or not torch._C._cuda_isCurrentStreamCapturing():
        return None
    graph = torch.ops.lowbit.capture_id(x)
    return (torch._C._cuda_getCurrentRawStream(x.get_device()), graph) if graph else None
