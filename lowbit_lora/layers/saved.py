"""A module that trains whole (``modules_to_save``): a copy in full precision for each adapter, by PEFT's names."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowbit import QuantizedTensor

from .adapted import Adapted

#: Where nn.Module keeps the hooks of a module.
HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks")
HOOKS += ("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook")


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` call the hooks of ``source``: the very dictionaries, so that the hooks' handles go on working."""
    for name in HOOKS:
        setattr(target, name, getattr(source, name))


class SavedModule(Adapted):
    """``original_module`` and, in ``modules_to_save``, a copy for each adapter, which trains and is saved with it.

    A copy of a module in 16 bits is in fp32: its inputs are widened, and its outputs come in the original's dtype.
    Attributes are those of the module that computes now.
    """

    def __init__(self, module: nn.Module):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise TypeError(f"modules_to_save: expected modules that are called, got a {type(module).__name__}")
        if any(isinstance(parameter, QuantizedTensor) for parameter in module.parameters()):
            raise ValueError(
                "modules_to_save: expected dense weights, got a quantized one, which cannot train; leave it dense "
                "(skip=[...] of lowbit.quantize_)"
            )
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        low = (p.dtype for p in module.parameters() if p.dtype in (torch.float16, torch.bfloat16))
        self._low_dtype = next(low, None)

    @property
    def base(self) -> nn.Module:
        """The original module."""
        return self.original_module

    def add_adapter(self, name: str) -> None:
        """Add a copy of the original, which does not compute yet."""
        self._check_new(name)
        own = copy.deepcopy(self.original_module)
        for source, target in zip(self.original_module.modules(), own.modules(), strict=True):
            share_hooks(source, target)
        self.modules_to_save[name] = own.float() if self._low_dtype else own
        self.adapters[name] = None

    def _parts(self) -> list[nn.ModuleDict | nn.ParameterDict]:
        return [self.modules_to_save]

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The parameters and buffers of a copy."""
        return dict(self.modules_to_save[name].state_dict(keep_vars=True)) if name in self.adapters else {}

    def check_active(self, names: Iterable[str]) -> tuple[str, ...]:
        """The adapter among ``names`` that has a copy; an error where there are several."""
        names = super().check_active(names)
        if len(names) > 1:
            raise ValueError(
                f"adapters: expected at most one active adapter that trains a whole {type(self.base).__name__}, got "
                f"{', '.join(names)}"
            )
        return names

    def current(self) -> nn.Module:
        """The module that computes now."""
        return self.modules_to_save[self.active[0]] if self.active else self.original_module

    def merged_tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The values of the copy of the adapter among ``names`` that has one, in the original's dtypes."""
        names = self.check_active(names)
        if not names:
            return {}
        originals = self.original_module.state_dict(keep_vars=True)
        merged = {}
        for key, tensor in self.modules_to_save[names[0]].state_dict(keep_vars=True).items():
            value = tensor.detach().to(originals[key].dtype)
            merged[key] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
        return merged

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module that computes now returns."""
        if self.rows is not None:
            return self._by_row(args, kwargs)
        return self._run(self.active[0] if self.active else None, args, kwargs)

    def _run(self, name: str | None, args: tuple, kwargs: dict) -> Any:
        if name is None:
            return self.original_module(*args, **kwargs)
        if self._low_dtype is None:
            return self.modules_to_save[name](*args, **kwargs)
        wide = {key: _cast(value, torch.float32) for key, value in kwargs.items()}
        return _cast(self.modules_to_save[name](*_cast(args, torch.float32), **wide), self._low_dtype)

    def _by_row(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """Each row of the first argument through the copy of its adapter, or the original."""
        first, *rest = args
        index, y = self.rows.spread(len(first)), None
        for number, name in enumerate(self.rows.names):
            chosen = (index == number).nonzero().squeeze(1)
            if len(chosen):
                part = self._run(name if name in self.adapters else None, (first[chosen], *rest), kwargs)
                if not isinstance(part, torch.Tensor):
                    raise TypeError(
                        "adapter_names: expected modules to save that return a tensor, but a "
                        f"{type(self.base).__name__} returns a {type(part).__name__}"
                    )
                y = part.new_empty(len(first), *part.shape[1:]) if y is None else y
                y = y.index_copy(0, chosen, part)
        return y


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    return value
