"""Modules in whose place adapters compute: layers with LoRA, one class per kind of base; whole modules; single rows."""

from torch import nn

from .attention import LoRAMultiheadAttention
from .base import DEFAULT, Adapter, LoRABaseLayer
from .conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from .embedding import LoRAEmbedding, QLoRAEmbedding
from .experts import LoRAExperts
from .linear import LoRALinear, QLoRALinear
from .saved import SavedModule
from .tokens import TrainedTokens

#: The classes, each with ``takes(module)``. A new kind of layer is a class in a file of its own and a name here.
LAYERS: tuple[type[LoRABaseLayer], ...] = (LoRALinear, LoRAEmbedding, LoRAConv1d, LoRAConv2d, LoRAConv3d)
LAYERS += (LoRAMultiheadAttention, LoRAExperts)

__all__ = ["DEFAULT", "LAYERS", "Adapter", "LoRABaseLayer", "LoRAConv1d", "LoRAConv2d", "LoRAConv3d"]
__all__ += ["LoRAEmbedding", "LoRAExperts", "LoRALinear", "LoRAMultiheadAttention", "QLoRAEmbedding", "QLoRALinear"]
__all__ += ["SavedModule", "TrainedTokens", "layer_class"]


def layer_class(module: nn.Module) -> type[LoRABaseLayer] | None:
    """The class that adapts a module, or None."""
    return next((layer for layer in LAYERS if layer.takes(module)), None)
