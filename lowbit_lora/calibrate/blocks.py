"""The blocks of a model, which pass hidden states to each other, and with what each of them is called.

Nothing here knows a model's class: a chain is a list of modules of which each gets, in a real forward, the tensor that
the one before it returned.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .inputs import Batch


class Stop(BaseException):
    """Ends a forward where the rest of it is of no use. No error: code that catches errors lets it through."""


@dataclass
class Call:
    """The arguments of one call of a block, without the hidden states (``place``: their index or name)."""

    args: tuple
    kwargs: dict[str, Any]
    place: int | str

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any], place: int | str) -> tuple["Call", torch.Tensor]:
        """The call, and its hidden states. Caches of keys and values would grow with every call: they are left out."""
        hidden = kwargs[place] if isinstance(place, str) else args[place]
        args = tuple(None if index == place else value for index, value in enumerate(args))
        kwargs = {key: None if _is_cache(value) else value for key, value in kwargs.items() if key != place}
        return cls(args, kwargs, place), hidden

    def around(self, hidden: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        """The arguments with these hidden states."""
        if isinstance(self.place, str):
            return self.args, self.kwargs | {self.place: hidden}
        return (*self.args[: self.place], hidden, *self.args[self.place + 1 :]), self.kwargs

    def leaves(self) -> list:
        """All arguments, those inside of tuples too."""
        return pytree.tree_leaves((self.args, self.kwargs))

    def map(self, change: Callable[[Any], Any]) -> "Call":
        """The call with each argument changed."""
        return Call(*pytree.tree_map(change, (self.args, self.kwargs)), self.place)


@dataclass
class Probe:
    """One real call of a block, on one row of data: its arguments, and what it returned beside the hidden states."""

    call: Call
    hidden: torch.Tensor
    rest: tuple | None

    def output(self, hidden: torch.Tensor) -> Any:
        """What the block returns with these hidden states."""
        return hidden if self.rest is None else (hidden, *self.rest)


@dataclass
class Chain:
    """Blocks in the order of their calls, with a probe of each.

    ``calls`` are those of each block, one per batch; ``hidden`` is what enters the first block, fp32, one per batch;
    ``kept`` says which tokens count, per batch (None: all).
    """

    name: str
    blocks: dict[str, nn.Module]
    probes: list[Probe] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    kept: list[torch.Tensor | None] = field(default_factory=list)


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states that a block returned, alone or first of several things."""
    return output[0] if isinstance(output, (tuple, list)) else output


def candidates(model: nn.Module, wanted: set[nn.Module]) -> list[Chain]:
    """The lists of modules that may be chains: outermost ones of which each module has one that is wanted in it."""
    found: list[Chain] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
            continue
        if any(name.startswith(f"{chain.name}.") for chain in found):
            continue
        if all(not wanted.isdisjoint(block.modules()) for block in module):
            found.append(Chain(name, {f"{name}.{key}": block for key, block in module.named_children()}))
    return found


def trace(model: nn.Module, batch: Batch, chains: list[Chain]) -> tuple[list[Chain], bool]:
    """Run one batch. Returns those that are chains, with their probes, and whether their calls need real forwards.

    They do where a block gets more of its predecessor than the hidden states, or where there are several chains.
    """
    records: dict[nn.Module, list] = {}

    def before(module, args, kwargs):
        records.setdefault(module, []).append([args, kwargs, None])

    def after(module, args, kwargs, output):
        records[module][-1][2] = output

    with contextlib.ExitStack() as stack:
        for block in (block for chain in chains for block in chain.blocks.values()):
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after, with_kwargs=True).remove)
        model(**batch)
    found, carried = [], False
    for chain in chains:
        probes, more = _linked([records.get(block, []) for block in chain.blocks.values()])
        if probes:
            chain.probes = probes
            carried |= more
            found.append(chain)
    return found, carried or len(found) > 1


def _linked(records: list[list]) -> tuple[list[Probe], bool]:
    """The probes of blocks that were called so, none if these are no chain; and whether more than hidden went along."""
    probes, carried, place, previous, rest = [], False, None, None, []
    for calls in records:
        if len(calls) != 1:
            return [], False
        args, kwargs, output = calls[0]
        arguments = {**dict(enumerate(args)), **kwargs}
        matches = [k for k, v in arguments.items() if (_is_hidden(v) if previous is None else v is previous)]
        hidden, *others = output if isinstance(output, (tuple, list)) else (output,)
        place = matches[0] if place is None and matches else place
        if place not in matches or not _is_hidden(hidden) or hidden.shape != arguments[place].shape:
            return [], False
        call, before = Call.of(args, kwargs, place)
        carried |= any(leaf is tensor for leaf in call.leaves() for tensor in rest)
        probes.append(Probe(call, before, tuple(others) if isinstance(output, (tuple, list)) else None))
        previous = hidden
        rest = [leaf for leaf in pytree.tree_leaves(others) if isinstance(leaf, torch.Tensor)]
    return probes, carried


def _is_hidden(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3


def _is_cache(value: Any) -> bool:
    return type(value).__name__.endswith("Cache")


def record(model: nn.Module, batches: list[Batch], chains: list[Chain], really: bool) -> Iterator[None]:
    """Fill in the calls and the hidden states of the chains; yields after each batch.

    Args:
        really: blocks compute. Else they pass their input on, and the forward ends with the last: only what is before
            the blocks costs something.
    """
    shared = _Shared()
    numbers: dict[nn.Module, tuple[Chain, int]] = {}
    for chain in chains:
        chain.calls = [[] for _ in chain.blocks]
        numbers |= {block: (chain, number) for number, block in enumerate(chain.blocks.values())}

    def before(module, args, kwargs):
        chain, number = numbers[module]
        call, hidden = Call.of(args, kwargs, chain.probes[number].call.place)
        if number == 0:
            chain.hidden.append(hidden.detach().float())
        chain.calls[number].append(call.map(shared))

    with contextlib.ExitStack() as stack:
        for block, (chain, number) in numbers.items():
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            if not really:
                stack.enter_context(_passing_on(block, chain.probes[number], number == len(chain.blocks) - 1))
        for batch in batches:
            with contextlib.suppress(Stop):
                model(**batch)
            yield


@contextlib.contextmanager
def _passing_on(block: nn.Module, probe: Probe, is_last: bool) -> Iterator[None]:
    """Context in which a block returns its hidden states as they came; the last ends the forward."""

    def forward(*args, **kwargs):
        if is_last:
            raise Stop
        return probe.output(Call.of(args, kwargs, probe.call.place)[1])

    before = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


class _Shared:
    """Returns one tensor for all that are equal, in fp32: masks and positions are mostly the same for all batches."""

    def __init__(self):
        self._seen: dict[tuple, list[torch.Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().float() if value.is_floating_point() else value.detach()
        seen = self._seen.setdefault((value.shape, value.dtype), [])
        for other in seen:
            if other is value or torch.equal(other, value):
                return other
        seen.append(value)
        return value


def merge(chain: Chain, most_tokens: int) -> None:
    """Make one batch of consecutive ones that differ in nothing but the hidden states, of at most so many tokens."""
    groups: list[list[int]] = []
    for number, hidden in enumerate(chain.hidden):
        last = groups[-1] if groups else None
        tokens = hidden.shape[:-1].numel()
        if last and _are_alike(chain, last[0], number) and tokens * (len(last) + 1) <= most_tokens:
            last.append(number)
        else:
            groups.append([number])
    chain.hidden = [torch.cat([chain.hidden[n] for n in group]) for group in groups]
    chain.kept = [_joined([chain.kept[n] for n in group]) for group in groups]
    chain.calls = [[calls[group[0]] for group in groups] for calls in chain.calls]


def _joined(kept: list[torch.Tensor | None]) -> torch.Tensor | None:
    return None if kept[0] is None else torch.cat(kept)


def _are_alike(chain: Chain, one: int, other: int) -> bool:
    """Whether two batches can be one: the same arguments, of which none has a row for each row of the batch."""
    rows = chain.hidden[one].shape[0]
    if chain.hidden[one].shape != chain.hidden[other].shape:
        return False
    if (chain.kept[one] is None) != (chain.kept[other] is None):
        return False
    for calls in chain.calls:
        first, second = calls[one].leaves(), calls[other].leaves()
        if len(first) != len(second):
            return False
        for a, b in zip(first, second, strict=True):
            if isinstance(a, torch.Tensor):
                if a is not b or (rows > 1 and a.dim() > 1 and a.shape[0] == rows):
                    return False
            elif type(a) is not type(b) or a != b:
                return False
    return True
