"""LoRA and QLoRA on top of lowbit: layers, model wrappers, and adapters in PEFT's files."""

from lowbit import modules as _modules

from .config import LoraConfig, QLoRAConfig, QuantizationType
from .hf import experts as _experts
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
from .optim import AdamW8bit, Lion8bit, PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit, get_paged_optimizer

_modules.AFTER_REPLACING.append(_experts.use)  # mixtures whose experts are quantized multiply by lowbit's product

#: Another name of LoraModel, in the spelling of the layers.
LoRAModel = LoraModel

__all__ = [
    "AdamW8bit",
    "Lion8bit",
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
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLion",
    "PagedLion8bit",
    "QLoRAConfig",
    "QLoRAEmbedding",
    "QLoRALinear",
    "QLoRAModel",
    "QuantizationType",
    "get_paged_optimizer",
]
