"""The bytes that a training step holds, from a model on the meta device: the step runs, on tensors without data.

torch's FakeTensorMode gives every operator's result its shape and dtype and no memory. A dispatch mode sees them,
and adds up the storages that are alive. So what the backward keeps, what checkpointing frees and recomputes, and what
lives for a moment only (logits and their gradients) are counted as this very model makes them; nothing is a formula.
What operators allocate inside themselves, and what allocators lose between blocks, is not seen.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit import QuantizedTensor
from lowbit.modules import replace_weights

#: A model of more equal blocks is run with so many of them, twice, and the rest is a straight line through the two.
_BLOCKS = (3, 4)


class Highest(NamedTuple):
    """The most bytes alive at once, and the most of them that were no gradients of parameters."""

    whole: int
    without_gradients: int


class LiveBytes(TorchDispatchMode):
    """Adds up the storages of tensors that are alive, and keeps the most at once since :meth:`restart`."""

    def __init__(self):
        super().__init__()
        self.now = self.gradients = 0
        self._sizes: dict[int, int] = {}
        self.restart()

    def restart(self) -> "Highest | None":
        """Begin anew; returns what was the most until now."""
        before = getattr(self, "highest", None)
        self.highest = Highest(self.now, self.now - self.gradients)
        return before

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed, once however many tensors share it."""
        if isinstance(tensor, QuantizedTensor):
            for part in tensor.parts():
                if part is not None:
                    self.add(part)
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            whole, others = self.highest
            self.highest = Highest(max(whole, self.now), max(others, self.now - self.gradients))
            weakref.finalize(storage, self._freed, key)

    def add_gradient(self, parameter: torch.Tensor) -> None:
        """Know that a parameter has its gradient, which stays until the step is over."""
        self.gradients += parameter.grad.untyped_storage().nbytes()

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def highest_in_step(model: nn.Module, inputs: Callable[[], dict[str, torch.Tensor]]) -> Highest:
    """What is alive at the most in one forward and backward of a model on the meta device, weights included.

    Args:
        model: in train mode; its ``loss`` is what the backward starts from. It is spent afterwards.
        inputs: makes what its forward takes.

    Raises:
        ValueError: the model looks at values of tensors (``.item()``), which are not there.
    """
    blocks = equal_blocks(model)
    if blocks is None or len(blocks[2]) <= max(_BLOCKS):
        return Highest(*map(max, zip(*_phases(model, inputs), strict=True)))
    parent, name, layers = blocks
    fewer, more = _BLOCKS
    phases = {}
    for count in (more, fewer):  # each of them shortens the model
        setattr(parent, name, layers[:count])
        phases[count] = _phases(model, inputs)
    # Within a phase the highest moment is the same with any number of blocks; that of the step need not be.
    added = (len(layers) - more) // (more - fewer)
    found = [
        [large + (large - small) * added for large, small in zip(*pair, strict=True)]
        for pair in zip(phases[more], phases[fewer], strict=True)
    ]
    return Highest(*map(max, zip(*found, strict=True)))


def equal_blocks(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """``(parent, name, list)`` of the model's blocks, if there is one list of them and all are of the same shapes."""
    lists = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > 1 and not isinstance(parent, nn.ModuleList)
    ]
    if not lists:
        return None
    most = max(sum(p.numel() for p in child.parameters()) for _, _, child in lists)
    large = [entry for entry in lists if 10 * sum(p.numel() for p in entry[2].parameters()) > most]
    outer = [entry for entry in large if not any(entry[0] in other[2].modules() for other in large)]
    kinds = {_shapes(block) for block in outer[0][2]}
    return outer[0] if len(outer) == 1 and len(kinds) == 1 else None


def _shapes(block: nn.Module) -> tuple:
    return type(block), tuple((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters())


def _phases(model: nn.Module, inputs: Callable[[], dict[str, torch.Tensor]]) -> list[Highest]:
    """The most alive in the forward, in the backward down to the last block, between, and from the first block on."""
    blocks = equal_blocks(model)
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True), _fakes_of(model):
        live = LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        batch = inputs()

        def ends_a_phase(module: nn.Module, args: tuple, output) -> None:
            states = output if isinstance(output, torch.Tensor) else output[0]
            states.register_hook(lambda gradient: found.append(live.restart()) and None)

        ends = [] if blocks is None else [blocks[2][-2], blocks[2][0]]
        hooks = [block.register_forward_hook(ends_a_phase) for block in ends]
        hooks += [
            p.register_post_accumulate_grad_hook(live.add_gradient) for p in model.parameters() if p.requires_grad
        ]
        try:
            with live:
                loss = model(**batch).loss
                found.append(live.restart())
                loss.backward()
                found.append(live.restart())
        except DataDependentOutputException as error:
            raise ValueError(
                f"model: expected one whose step depends on shapes only, got {type(model).__name__}, which looks at "
                f"values ({error.func})"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
    # Between the last block and the first one each is as high as a neighbour, or lies between the two.
    return [found[0], found[1], found[-1]] if blocks is not None else found


@contextlib.contextmanager
def _fakes_of(model: nn.Module) -> Iterator[None]:
    """Let the model's tensors be on the CPU, as far as they know, but without data.

    On the meta device itself attention would choose the path that keeps all products of queries and keys.
    """
    fakes = {
        parameter: nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    replace_weights(model, fakes)
    for module, before in buffers:
        for name, buffer in before.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    try:
        yield
    finally:
        replace_weights(model, {fake: parameter for parameter, fake in fakes.items()})
        for module, before in buffers:
            module._buffers.update(before)
