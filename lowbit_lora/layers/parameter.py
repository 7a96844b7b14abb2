"""LoRA on a parameter by which a module multiplies in its own forward, which stays."""

from typing import Any

import torch

from lowbit.adapted import ProductWeight, standing_in

from .base import LoRABaseLayer


def product_weight(layer: LoRABaseLayer) -> torch.Tensor:
    """The weight of a layer plus what its active adapters add, a ProductWeight; the parameter where none computes."""
    weight = layer.base._parameters[layer.weight_name]  # there is what may stand in for it
    if layer.rows is not None and layer.adapters.keys() & set(layer.rows.names):
        raise ValueError(
            f"adapter_names: expected adapters without {layer.weight_name} of a {type(layer.base).__name__}, which "
            "multiplies all rows by it together"
        )
    if not layer.active or layer.merged or layer.rows is not None:
        return weight
    return ProductWeight(weight, [layer.addition(name) for name in layer.active])


class LoRAParameter(LoRABaseLayer):
    """A module with LoRA on its parameter ``weight_name``.

    While the module's own forward runs, it finds a ProductWeight under that name, and so does other code that reads the
    parameter from this layer. All other attributes are the module's.
    """

    @property
    def weight(self) -> torch.Tensor:
        return self.merged_weight() if torch.compiler.is_compiling() else product_weight(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward takes and returns."""
        with standing_in(self.base, self.weight_name, product_weight(self)):
            return self.base_layer.forward(*args, **kwargs)  # not the module itself, whose hooks are this layer's

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})  # empty while it is unpickled
        if name in modules or "base_layer" not in modules:
            return super().__getattr__(name)
        return self.weight if name == self.weight_name else getattr(self.base_layer, name)
