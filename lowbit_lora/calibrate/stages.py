"""The stages of a block: layers that share an input, in the order in which a forward needs them."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .blocks import Probe

#: The last part of the names of layers whose outputs are what tokens are attended by, and what is read of them.
_ATTENDED = {"k", "v", "wk", "wv", "key", "value", "k_lin", "v_lin", "k_proj", "v_proj", "key_proj", "value_proj"}
_ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(frozen=True)
class Place:
    """A tensor inside a forward: the first input of a module of the block, or its output."""

    module: str
    is_output: bool


@dataclass
class Stage:
    """Layers with the same input.

    ``layers``: their names in the block, the first called first. ``attended``: those of them that make keys and values.
    ``residuals``: for those whose output is added to another tensor that exists by then, which one that is.
    ``experts``: the layer is a stack of experts, which gets tokens and their experts' numbers.
    """

    layers: list[str]
    attended: set[str] = field(default_factory=set)
    residuals: dict[str, Place] = field(default_factory=dict)
    experts: bool = False


def find(block: nn.Module, probe: Probe, layers: set[str], stacks: set[str]) -> list[Stage]:
    """Run a block once, and see which of the ``layers`` get the same tensor; ``stacks`` are those of experts.

    Layers that are not called, or more than once, are in no stage.

    Args:
        block: in fp32.
        layers, stacks: names in the block.
    """
    watch = _Watch(block, {block.get_submodule(name) for name in layers | stacks})
    args, kwargs = probe.call.map(_as_fp32).around(probe.hidden.float())
    with watch:
        block(*args, **kwargs)
    stages: dict[Any, Stage] = {}
    for module, name in watch.called.items():
        if watch.count[module] != 1:
            continue
        if name in stacks:
            stages[name] = Stage([name], experts=True)
            continue
        stage = stages.setdefault(_identity(watch.inputs[module]), Stage([]))
        stage.layers.append(name)
        if name.rpartition(".")[2] in _ATTENDED:
            stage.attended.add(name)
        place = watch.added_to(module)
        if place is not None:
            stage.residuals[name] = place
    for stage in stages.values():
        if len(stage.attended) == len(stage.layers) and not stage.experts:
            # Keys and values of another sequence (cross-attention): who attends to them is counted elsewhere.
            stage.attended.clear()
    return list(stages.values())


def _as_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _identity(tensor: torch.Tensor) -> tuple:
    """The same for views that hold the same rows in the same memory."""
    return tensor.data_ptr(), tensor.numel(), tensor.shape[-1]


class _Watch(TorchFunctionMode):
    """Context that notes the inputs and outputs of a block's modules, and what is added to what.

    All tensors are kept until the end, so that none has the address of an earlier one.
    """

    def __init__(self, block: nn.Module, layers: set[nn.Module]):
        super().__init__()
        self.called: dict[nn.Module, str] = {}
        self.count: dict[nn.Module, int] = {}
        self.inputs: dict[nn.Module, torch.Tensor] = {}
        self._outputs: dict[nn.Module, torch.Tensor] = {}
        self._places: dict[tuple, Place] = {}
        self._when: dict[Place, int] = {}
        self._ready: dict[nn.Module, int] = {}
        self._adds: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._kept: list[torch.Tensor] = []
        self._block, self._layers = block, layers
        self._names = {module: name for name, module in block.named_modules()}
        self._hooks = contextlib.ExitStack()

    def __enter__(self):
        for module in self._names:
            self._hooks.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            self._hooks.callback(module.register_forward_hook(self._after).remove)
        return super().__enter__()

    def __exit__(self, *error):
        self._hooks.close()
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", None) in _ADDS and len(args) == 2:
            one, other = args
            if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape:
                self._adds.append((one, other))
                self._kept.append(result)
        return result

    def _before(self, module, args, kwargs):
        tensor = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        if tensor is None:
            return
        self._note(module, tensor, is_output=False)
        if module in self._layers:
            self.called.setdefault(module, self._names[module])
            self.count[module] = self.count.get(module, 0) + 1
            self.inputs.setdefault(module, tensor)
            self._ready.setdefault(module, len(self._kept))

    def _after(self, module, args, output):
        output = output[0] if isinstance(output, tuple) and output else output
        if isinstance(output, torch.Tensor):
            self._note(module, output, is_output=True)
            self._outputs.setdefault(module, output)

    def _note(self, module: nn.Module, tensor: torch.Tensor, is_output: bool) -> None:
        self._kept.append(tensor)
        place = Place(self._names[module], is_output)
        self._places.setdefault(_identity(tensor), place)
        self._when.setdefault(place, len(self._kept))

    def added_to(self, module: nn.Module) -> Place | None:
        """Where the tensor that the layer's output is added to can be seen, if that is before the layer is called."""
        output = self._outputs.get(module)
        if output is None:
            return None
        for one, other in self._adds:
            for mine, residual in ((one, other), (other, one)):
                if _identity(mine) == _identity(output):
                    place = self._places.get(_identity(residual))
                    return place if place is not None and self._when[place] <= self._ready[module] else None
        return None
