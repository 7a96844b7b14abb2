"""LoRA and QLoRA on top of lowbit: layers, model wrappers, and adapters in PEFT's files."""

from .config import LoraConfig, QLoRAConfig, QuantizationType
from .layers import LoRABaseLayer, LoRALinear, QLoRALinear
from .model import LoraModel, QLoRAModel

__all__ = [
    "LoRABaseLayer",
    "LoRALinear",
    "LoraConfig",
    "LoraModel",
    "QLoRAConfig",
    "QLoRALinear",
    "QLoRAModel",
    "QuantizationType",
]
