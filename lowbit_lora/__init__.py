"""lowbit_lora: LoRA and QLoRA layers, and the model wrappers, on lowbit's kernels."""

from .config import LoraConfig, QLoRAConfig, QuantizationType
from .layers import LoRABaseLayer, LoRALinear, QLoRALinear, QuantizedLinear
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
    "QuantizedLinear",
]
