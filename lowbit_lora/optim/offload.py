"""Optimizers whose states, and gradients, are in the host's memory while the parameters are on a GPU."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ..transfer import Arrival, Transfer
from .states import DTensor

_HOST = torch.device("cpu")


class HostSum:
    """A sum of gradients in the host's memory, contiguous, and the gradient that is on its way to be added to it."""

    def __init__(self, transfer: Transfer):
        self._transfer = transfer
        self._total: torch.Tensor | None = None
        self._next: torch.Tensor | None = None
        self._arrival: Arrival | None = None  # of the next one, or of the first
        self._has_next = False

    def begin(self, grad: torch.Tensor) -> None:
        """Forget the sum and start one."""
        self._total = self._memory_for(grad, self._total)
        self._arrival, self._has_next = self._transfer.copy(self._total, grad), False

    def add(self, grad: torch.Tensor) -> None:
        """Add one more; only the one before has to have arrived, which another backward has left time for."""
        self._settle()
        self._next = self._memory_for(grad, self._next)
        self._arrival, self._has_next = self._transfer.copy(self._next, grad), True

    def zero(self) -> None:
        """Make the sum 0."""
        self._settle()
        self._total.zero_()

    def scale(self, factor: torch.Tensor) -> None:
        """Multiply the sum by a number, as ``clip_grad_norm_`` does."""
        self._settle()
        self._total.mul_(factor.to(_HOST))

    def value(self) -> torch.Tensor:
        """The sum, once all has arrived."""
        self._settle()
        return self._total

    def _settle(self) -> None:
        if self._arrival is not None:
            self._arrival.synchronize()
        if self._has_next:
            with torch.no_grad():
                self._total.add_(self._next)  # rounded as autograd's own sum
        self._arrival, self._has_next = None, False

    def _memory_for(self, grad: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
        if old is not None and (old.shape, old.dtype) == (grad.shape, grad.dtype):
            return old
        return self._transfer.host_like(grad, torch.contiguous_format)


class HostGradient(torch.Tensor):
    """What ``p.grad`` is with ``offload_gradients``: a shape on the GPU, whose numbers are in the host's memory.

    A backward adds to it, ``zero_grad`` of an optimizer or a module zeroes or removes it, and ``clip_grad_norm_`` takes
    its norm and scales it. For all else there are no numbers, and an error says so: without it GradScaler or
    DistributedDataParallel would leave these gradients out in silence.
    """

    total: HostSum

    @staticmethod
    def __new__(cls, grad: torch.Tensor, total: HostSum) -> "HostGradient":
        made = torch.Tensor._make_wrapper_subclass(
            cls, grad.shape, strides=grad.stride(), dtype=grad.dtype, device=grad.device
        )
        made.total = total
        return made

    def __repr__(self, **options: Any) -> str:
        return f"HostGradient({list(self.shape)}, {self.dtype}, in the memory of the host)"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        own = args[0] if args and isinstance(args[0], cls) else None
        if own is not None and func in _CHANGES and not kwargs:
            _CHANGES[func](own.total, *args[1:])
            return own
        if own is not None and func is torch.ops.aten.linalg_vector_norm.default:
            return func(own.total.value(), *args[1:], **(kwargs or {})).to(own.device)
        raise RuntimeError(
            f"{func}: gradients are in the host's memory (offload_gradients=True), where GradScaler and "
            "DistributedDataParallel do not reach them. Train in bfloat16, skip steps by the optimizer's on_nonfinite, "
            "or take offload_gradients=False"
        )


#: What may be done to a HostGradient in place.
_CHANGES = {
    torch.ops.aten.add_.Tensor: HostSum.add,
    torch.ops.aten.mul_.Tensor: HostSum.scale,
    torch.ops.aten.zero_.default: HostSum.zero,
}


class Offload:
    """Where the numbers are that an optimizer's step reads: of parameters on a GPU copies of the host's.

    The parameters themselves are the truth: one that was changed since the last step, which torch counts, is copied
    again. Torch does not count changes in place of ``p.data``.

    Args:
        states: do so; else all is where it is.
        gradients: copy gradients as soon as a backward has made them, and free them.

    Raises:
        ValueError: gradients without states.
    """

    def __init__(self, states: bool, gradients: bool):
        if gradients and not states:
            raise ValueError("offload_gradients: expected offload_states=True too: the step runs where the states are")
        self._states, self._gradients, self._transfer = states, gradients, Transfer()
        self._copies: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._copied: dict[torch.nn.Parameter, tuple[int, int]] = {}  # which content of the parameter
        self._sums: dict[torch.nn.Parameter, HostSum] = {}
        self._watched: set[torch.nn.Parameter] = set()

    def check(self, parameter: torch.Tensor) -> None:
        """ValueError unless the states of such a parameter can be on the host."""
        if isinstance(parameter, DTensor) and self._is_away(parameter):
            raise ValueError(
                "offload_states: expected no sharded parameters on a GPU, got a DTensor; fully_shard's "
                "CPUOffloadPolicy keeps parameters, gradients and states on the host"
            )

    def home(self, parameter: torch.Tensor) -> torch.device:
        """Where the states of a parameter are."""
        return _HOST if self._is_away(parameter) else parameter.device

    def _is_away(self, parameter: torch.Tensor) -> bool:
        return self._states and self._transfer.is_remote(parameter)

    def watch(self, params: Sequence[torch.nn.Parameter]) -> None:
        """From now on take the gradients of these, if they are to be."""
        if not self._gradients:
            return
        this = weakref.ref(self)

        def take(parameter: torch.nn.Parameter) -> None:
            offload = this()
            if offload is not None:  # else the optimizer is gone
                offload._take(parameter)

        for p in params:
            if p.requires_grad and p not in self._watched:
                p.register_post_accumulate_grad_hook(take)
                self._watched.add(p)

    def _take(self, p: torch.nn.Parameter) -> None:
        grad = p.grad
        if isinstance(grad, HostGradient) or not self._is_away(p):
            return
        if grad.layout is torch.strided and not grad.requires_grad:
            p.grad = HostGradient(grad, self._begun(p, grad))

    def _begun(self, p: torch.nn.Parameter, grad: torch.Tensor) -> HostSum:
        total = self._sums.setdefault(p, HostSum(self._transfer))
        total.begin(grad)
        return total

    def arrived(
        self, params: list[list[torch.nn.Parameter]], local: list[list[torch.Tensor]], grads: list[list[torch.Tensor]]
    ) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
        """The numbers of parameters and gradients on the device of the states; local parts that are there already are
        returned as they are."""
        if not self._states:
            return local, grads
        own = [
            [self._copy_of(p) if self._is_away(p) else part for p, part in zip(*of_call, strict=True)]
            for of_call in zip(params, local, strict=True)
        ]
        sums = [
            [self._sum_of(p, grad) if self._is_away(p) else grad for p, grad in zip(*of_call, strict=True)]
            for of_call in zip(params, grads, strict=True)
        ]
        self._transfer.synchronize()
        return own, [[part.value() if isinstance(part, HostSum) else part for part in of_call] for of_call in sums]

    def _copy_of(self, p: torch.nn.Parameter) -> torch.Tensor:
        copy = self._copies.get(p)
        if copy is None or (copy.shape, copy.dtype) != (p.shape, p.dtype):
            copy = self._copies[p] = self._transfer.host_like(p, torch.contiguous_format)
            self._copied.pop(p, None)
        if self._copied.get(p) != _content(p):
            self._transfer.copy(copy, p)
            self._copied[p] = _content(p)
        return copy

    def _sum_of(self, p: torch.nn.Parameter, grad: torch.Tensor) -> HostSum:
        return grad.total if isinstance(grad, HostGradient) else self._begun(p, grad)

    def send_back(self, params: list[torch.nn.Parameter]) -> None:
        """Copy what a step has changed to the parameters; what the GPU computes afterwards waits for that."""
        away = [p for p in params if self._is_away(p)]
        for p in away:
            self._transfer.copy(p, self._copies[p])
        if away:
            self._transfer.join()
            self._copied.update((p, _content(p)) for p in away)


def _content(p: torch.nn.Parameter) -> tuple[int, int]:
    return p._version, p.data_ptr()
