"""LoRA and QLoRA on top of lowbit: layers, model wrappers, and adapters in PEFT's files."""

from lowbit import modules as _modules

from . import hf
from .calibrate import CalibrationReport, calibrate
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

hf.register_with_transformers()
_modules.AFTER_REPLACING.append(_experts.use)  # mixtures whose experts are quantized multiply by lowbit's product

#: Another name of LoraModel, in the spelling of the layers.
LoRAModel = LoraModel

__all__ = [
    "AdamW8bit",
    "CalibrationReport",
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
    "calibrate",
    "get_paged_optimizer",
]


def __getattr__(name: str):
    if name != "LowbitConfig":  # not in __all__ either: it needs transformers, which takes seconds to import
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .hf.config import LowbitConfig

    return LowbitConfig
