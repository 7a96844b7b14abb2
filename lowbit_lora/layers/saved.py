"""A module that trains whole (``modules_to_save``): a copy in full precision for each adapter, by PEFT's names."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowbit import QuantizedTensor
from lowbit.adapted import Adapted, cast_floats, copy_with_hooks


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
        super().__init__(module)
        self.modules_to_save = nn.ModuleDict()
        dtypes = [parameter.dtype for parameter in module.parameters()]
        self._low_dtype = next((dtype for dtype in dtypes if dtype in (torch.float16, torch.bfloat16)), None)

    def add_adapter(self, name: str) -> None:
        """Add a copy of the original, which does not compute yet."""
        self._check_new(name)
        own = copy_with_hooks(self.original_module)
        self.modules_to_save[name] = own.float() if self._low_dtype else own
        self.adapters[name] = None

    def _parts(self) -> dict[str, nn.ModuleDict | nn.ParameterDict]:
        return {"": self.modules_to_save}

    def check_active(self, names: Iterable[str]) -> tuple[str, ...]:
        names = super().check_active(names)
        if len(names) > 1:
            raise ValueError(
                f"adapters: expected at most one active adapter that trains a whole {type(self.base).__name__}, got "
                f"{', '.join(names)}"
            )
        return names

    def current(self) -> nn.Module:
        return self.modules_to_save[self.active[0]] if self.active else self.original_module

    def merged_tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        originals, merged = self.original_module.state_dict(keep_vars=True), {}
        for name in self.check_active(names):
            for key, tensor in self.adapter_tensors(name).items():
                value = tensor.detach().to(originals[key].dtype)
                merged[key] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
        return merged

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is None:
            return self._run(self.active[0] if self.active else None, args, kwargs)
        first, *rest = args
        return self.rows.joined(len(first), lambda name, rows: self._run(name, (first[rows], *rest), kwargs))

    def _run(self, name: str | None, args: tuple, kwargs: dict) -> Any:
        """What the copy of an adapter returns; without one, what the original does."""
        if name not in self.adapters:
            return self.original_module(*args, **kwargs)
        if self._low_dtype is None:
            return self.modules_to_save[name](*args, **kwargs)
        wide = {key: cast_floats(value, torch.float32) for key, value in kwargs.items()}
        return cast_floats(self.modules_to_save[name](*cast_floats(args, torch.float32), **wide), self._low_dtype)
