"""LoRA for each expert of a stack of experts' weights, dense or quantized."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowbit.adapted import Factors, ProductWeight
from lowbit.lowrank import random_factors

from ..config import check_unset
from .base import Adapter
from .parameter import LoRAParameter


class LoRAExperts(LoRAParameter):
    """A module with LoRA on parameters [experts, out, in], or [experts, in, out] where it says ``is_transposed``.

    A parameter [out, in], such as a router's weight, counts as one expert. As in PEFT, A is [rank * experts, in],
    expert by expert; B is [out, rank * experts], in which the experts of a rank stand side by side; several parameters
    of one module are nested layers, the last one outermost; and there is no lora_dropout, use_dora or lora_bias.
    ``parameter_names`` are in the order of the module's own.

    Raises:
        TypeError, ValueError: as LoRABaseLayer; a name of no parameter of two or three dimensions.
    """

    def __init__(self, base_layer: nn.Module, parameter_names: list[str], **options: Any):
        *inner, self.weight_name = parameter_names
        super().__init__(LoRAExperts(base_layer, inner, **options) if inner else base_layer, **options)

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """False: ``target_parameters`` chooses this class, by a parameter's name."""
        return False

    @property
    def base(self) -> nn.Module:
        """The module of the experts, also inside nested layers."""
        return self.base_layer.base if isinstance(self.base_layer, LoRAExperts) else self.base_layer

    def nested(self) -> dict[str, "LoRAExperts"]:
        inner = self.base_layer
        if not isinstance(inner, LoRAExperts):
            return {}
        return {"base_layer": inner} | {f"base_layer.{name}": layer for name, layer in inner.nested().items()}

    def config_name(self, name: str) -> str:
        """The parameter's name."""
        return re.sub(r"(\.base_layer)*$", f".{self.weight_name}", name, count=1)

    def _setup(self) -> None:
        weight = self.base._parameters.get(self.weight_name)
        name = f"{type(self.base).__name__}.{self.weight_name}"
        if weight is None:
            raise TypeError(f"parameter_names: expected parameters of the module, got {name}, which is none")
        if weight.dim() not in (2, 3) or weight.numel() == 0 or not weight.is_floating_point():
            raise ValueError(
                f"parameter_names: expected weights [out, in] or [experts, out, in], got {name} of shape "
                f"{tuple(weight.shape)} and {weight.dtype}"
            )
        self._is_stack = weight.dim() == 3
        self._experts = len(weight) if self._is_stack else 1
        self._transposed = self._is_stack and bool(getattr(self.base, "is_transposed", False))
        self._sizes = (weight.mT if self._transposed else weight).shape[-2:]  # out, in

    def _new_factors(self, adapter: Adapter, **options) -> dict[str, nn.Module | nn.Parameter]:
        check_unset(adapter, ("lora_dropout", "use_dora", "lora_bias"), "target_parameters")
        return self._linear_factors(self._sizes, adapter.rank * self._experts, **options)

    @torch.no_grad()
    def reset_lora_parameters(self, name: str | None = None, method: str = "default") -> None:
        """Fill the factors of each expert; see :class:`LoRABaseLayer`."""
        name = self._only_active() if name is None else name
        lora_a, lora_b = self.factors(name)
        rank = self.adapters[name].rank
        made = [random_factors(*self._sizes, rank, method, lora_a.device) for _ in range(self._experts)]
        lora_a.copy_(torch.cat([a for a, _ in made]))
        lora_b.copy_(torch.stack([b for _, b in made], 2).flatten(1))

    def addition(self, name: str) -> Factors:
        """What an adapter adds to each expert's weight, as it is stored."""
        whole = super().addition(name)
        if not self._is_stack:
            return whole
        left = whole.left.unflatten(1, (-1, self._experts)).permute(2, 0, 1)
        each = whole._replace(left=left, right=whole.right.unflatten(0, (self._experts, -1)))
        return each.swapped() if self._transposed else each

    def merged_weight(self, names: Iterable[str] | None = None) -> torch.Tensor:
        """See :class:`LoRABaseLayer`. One expert at a time is in fp32."""
        names = self.active if names is None else list(names)
        self._check_names(names)
        return ProductWeight(self.stored_weight, [self.addition(name) for name in names]).merged()

    @torch.compiler.disable(reason="torch.compile does not trace a stack of experts with LoRA")
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See :class:`LoRAParameter`; a ValueError where the model multiplies by deepgemm."""
        way = getattr(getattr(self.base, "config", None), "_experts_implementation", None)
        if str(way).startswith("deepgemm") and self.active and not self.merged:
            raise ValueError(
                "experts_implementation: expected 'grouped_mm', 'batched_mm' or 'eager' with LoRA on experts, got "
                f"{way!r}, which reads their weights from memory; call model.set_experts_implementation"
            )
        return super().forward(*args, **kwargs)
