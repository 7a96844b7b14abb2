"""LoRA and QLoRA on top of lowbit: layers, model wrappers, and adapters in PEFT's files."""

from .config import LoraConfig, QLoRAConfig, QuantizationType
from .layers import (
    LoRABaseLayer,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAEmbedding,
    LoRAExperts,
    LoRALinear,
    LoRAMultiheadAttention,
    QLoRAEmbedding,
    QLoRALinear,
)
from .model import LoraModel, QLoRAModel
from .optim import get_paged_optimizer

#: Another name of LoraModel, in the spelling of the layers.
LoRAModel = LoraModel

__all__ = [
    "LoRABaseLayer",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALinear",
    "LoRAModel",
    "LoRAMultiheadAttention",
    "LoraConfig",
    "LoraModel",
    "QLoRAConfig",
    "QLoRAEmbedding",
    "QLoRALinear",
    "QLoRAModel",
    "QuantizationType",
    "get_paged_optimizer",
]
