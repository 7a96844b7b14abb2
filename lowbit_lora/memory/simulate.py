"""The bytes that a training step holds, from a model on the meta device: the step runs, on tensors without data.

torch's FakeTensorMode gives every operator's result its shape and dtype and no memory. A dispatch mode sees each result,
and adds up the storages that are alive. So what the backward keeps, what checkpointing frees and recomputes, and what
lives for a moment only (logits and their gradients) are counted as this very model makes them; nothing is a formula.
What operators allocate inside themselves, and what allocators lose between blocks, is not seen.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit import QuantizedTensor
from lowbit.modules import replace_weights

#: A model of more equal blocks is run with so many of them, twice, and the rest is a straight line through the two.
_BLOCKS = (3, 4)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages of tensors that are alive; ``highest``: the most since it was last set to zero."""

    def __init__(self):
        super().__init__()
        self.now = self.highest = 0
        self._sizes: dict[int, int] = {}

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
            self.highest = max(self.highest, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def highest_in_step(model: nn.Module, inputs: Callable[[], dict[str, torch.Tensor]]) -> int:
    """The most bytes alive in one forward and backward of a model on the meta device, weights and gradients included.

    Args:
        model: in train mode; its ``loss`` is what the backward starts from. It is spent afterwards.
        inputs: makes what its forward takes.

    Raises:
        ValueError: the model looks at values of tensors (``.item()``), which are not there.
    """
    blocks = equal_blocks(model)
    if blocks is None or len(blocks[2]) <= max(_BLOCKS):
        return max(_phases(model, inputs))
    parent, name, layers = blocks
    phases = []
    for count in reversed(_BLOCKS):  # each of them shortens the model
        setattr(parent, name, layers[:count])
        phases.append(_phases(model, inputs))
    (more, fewer), rest = phases, len(layers) - max(_BLOCKS)
    # Within a phase the highest moment is the same with any number of blocks; that of the step need not be.
    return max(m + (m - f) * rest // (_BLOCKS[1] - _BLOCKS[0]) for m, f in zip(more, fewer, strict=True))


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


def _phases(model: nn.Module, inputs: Callable[[], dict[str, torch.Tensor]]) -> tuple[int, int, int]:
    """The most bytes alive in the forward, in the backward down to the last block, and from the first block on."""
    blocks = equal_blocks(model)
    with FakeTensorMode(allow_non_fake_inputs=True), _fakes_of(model):
        live = LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        batch = inputs()
        found = {"forward": 0}

        def mark(phase: str) -> Callable:
            def begin(gradient: torch.Tensor) -> None:
                found[next(reversed(found))] = live.highest
                live.highest = live.now
                found[phase] = 0

            return lambda module, args, output: _first(output).register_hook(begin) and None

        hooks = []
        if blocks is not None:
            layers = blocks[2]
            hooks = [layers[-2].register_forward_hook(mark("middle")), layers[0].register_forward_hook(mark("first"))]
        try:
            with live:
                loss = model(**batch).loss
                found["forward"], live.highest = live.highest, live.now
                found["last"] = 0
                loss.backward()
                found[next(reversed(found))] = live.highest
        except DataDependentOutputException as error:
            raise ValueError(
                f"model: expected one whose step depends on shapes only, got {type(model).__name__}, which looks at "
                f"values ({error.func})"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in model.parameters():
                parameter.grad = None
    return found["forward"], found["last"], found.get("first", 0)


def _first(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


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
