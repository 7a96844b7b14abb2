"""Checkpointing whose inputs are in the host's memory until the backward.

Checkpointing keeps one hidden state for each block of a model, and computes the rest again. torch shows these to
saved-tensor hooks where it is the non-reentrant kind, as long as they are positional arguments, which they are in
transformers' models. So the hooks of :func:`checkpoint` can move them to the host. Inside a block torch's own hooks are
the inner ones, and hide what it computes.
"""

import weakref
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as torch_checkpoint

from .transfer import Transfer

#: Inputs of fewer bytes stay where they are: a copy would cost more than it frees.
SMALLEST = 1 << 20
_transfer = Transfer()
_latest: "weakref.ref[_Block] | None" = None


class _Away:
    """A tensor that is on the host, or on its way."""

    def __init__(self, tensor: torch.Tensor):
        self._host, self._device = _transfer.host_like(tensor), tensor.device
        self._back: torch.Tensor | None = None
        _transfer.copy(self._host, tensor)

    def start(self) -> None:
        """Let it come back, if it is not on its way yet."""
        if self._back is None:
            self._back = _transfer.device_like(self._host, self._device)
            _transfer.copy(self._back, self._host)

    def taken(self) -> torch.Tensor:
        """The tensor on its device."""
        self.start()
        _transfer.join()
        found, self._back = self._back, None
        return found


class _Block:
    """One call of a checkpointed function, and of its inputs those that are away.

    A tensor that an earlier block has had too and that is still there, such as a mask or an encoder's output, stays:
    each block would copy it, and free nothing. The block before is the one whose backward is next.
    """

    def __init__(self, inputs: list[torch.Tensor], before: "_Block | None"):
        self._before = None if before is None else weakref.ref(before)
        self._earlier = {} if before is None else {key: r for key, r in before.seen.items() if r() is not None}
        #: By address what this block and earlier ones have had and that is still there.
        self.seen = self._earlier | {tensor.data_ptr(): weakref.ref(tensor) for tensor in inputs}
        self._away: list[_Away] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Away:
        """torch's hook, of an input that is saved."""
        # Parameters stay for the optimizer, and other subclasses have more than one memory.
        is_plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        if not is_plain or tensor.nbytes < SMALLEST or not _transfer.is_remote(tensor) or self._is_shared(tensor):
            return tensor
        self._away.append(_Away(tensor))
        return self._away[-1]

    def _is_shared(self, tensor: torch.Tensor) -> bool:
        earlier = self._earlier.get(tensor.data_ptr())
        return earlier is not None and earlier() is not None

    def unpack(self, packed: torch.Tensor | _Away) -> torch.Tensor:
        """torch's hook, where the backward wants the input."""
        if isinstance(packed, torch.Tensor):
            return packed
        found = packed.taken()
        before = None if self._before is None else self._before()
        if packed is self._away[-1] and before is not None:
            before.prefetch()
        return found

    def prefetch(self) -> None:
        """Let the inputs come back while the backward of the block after this one computes."""
        for away in self._away:
            away.start()


def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's checkpoint of the non-reentrant kind, whose large inputs on a GPU wait on the host for the backward.

    Copies run beside the computing, on a stream of their own. Inputs among ``kwargs``, and those that ``function``
    holds, stay where they are.
    """
    global _latest
    block = _Block([arg for arg in args if isinstance(arg, torch.Tensor)], _latest and _latest())
    _latest = weakref.ref(block)
    with saved_tensors_hooks(block.pack, block.unpack):
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
