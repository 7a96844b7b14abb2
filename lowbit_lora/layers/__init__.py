"""Layers with LoRA: one class per kind of base layer, dense or quantized."""

from torch import nn

from .base import DEFAULT, Adapter, LoRABaseLayer, RowAdapters
from .conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from .embedding import LoRAEmbedding, QLoRAEmbedding
from .linear import LoRALinear, QLoRALinear

#: The classes, each with ``takes(module)``. A new kind of layer is a class in a file of its own and a name here.
LAYERS: tuple[type[LoRABaseLayer], ...] = (LoRALinear, LoRAEmbedding, LoRAConv1d, LoRAConv2d, LoRAConv3d)

__all__ = ["DEFAULT", "LAYERS", "Adapter", "LoRABaseLayer", "LoRAConv1d", "LoRAConv2d", "LoRAConv3d", "LoRAEmbedding"]
__all__ += ["LoRALinear", "QLoRAEmbedding", "QLoRALinear", "RowAdapters", "layer_class"]


def layer_class(module: nn.Module) -> type[LoRABaseLayer] | None:
    """The class that adapts a module, or None."""
    return next((layer for layer in LAYERS if layer.takes(module)), None)
