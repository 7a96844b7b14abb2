"""Folders of bitsandbytes: read by lowbit's kernels, and written for bitsandbytes.

The keys are in :mod:`lowbit.files`. Here is what config.json says about them.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from lowbit import QuantizedTensor
from lowbit.names import few

from .config import LowbitConfig

_METHOD = "bitsandbytes_4bit"


def register() -> None:
    """From now on, ``from_pretrained`` loads 4-bit folders of bitsandbytes as lowbit's models.

    ``import lowbit_lora`` does this where bitsandbytes is not installed. Where it is, bitsandbytes loads its own
    folders until this is called; :func:`unregister` gives them back. ``BitsAndBytesConfig`` still means bitsandbytes.
    """
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = _FolderOfBitsAndBytes


def unregister() -> None:
    """Undo :func:`register`."""
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = auto.BitsAndBytesConfig


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Context in which ``from_pretrained`` loads such folders as lowbit's models."""
    from transformers.quantizers import auto

    before = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD]
    register()
    try:
        yield
    finally:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = before


class _FolderOfBitsAndBytes:
    """What transformers looks up for the quantization_config of such a folder."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> LowbitConfig:
        # The block size is in the files; each weight there says how it is stored.
        return LowbitConfig(
            format=config_dict.get("bnb_4bit_quant_type", "fp4"),
            double_quant=config_dict.get("bnb_4bit_use_double_quant", False),
            modules_to_not_convert=config_dict.get("llm_int8_skip_modules"),
            conv1d_transposed=True,
        )


def settings(model: nn.Module) -> dict[str, Any]:
    """The quantization_config of a folder that holds ``model`` for bitsandbytes.

    Raises:
        ValueError: a weight that bitsandbytes has no place for; it is named.
    """
    quantized, dense = {}, []
    for prefix, module in model.named_modules():
        is_theirs = type(module) is nn.Linear or _is_conv1d(module)  # the classes that transformers replaces
        weight = module._parameters.get("weight")
        if is_theirs and not isinstance(weight, QuantizedTensor):
            dense.append(prefix)
        for key, parameter in module._parameters.items():
            if isinstance(parameter, QuantizedTensor):
                name = f"{prefix}.{key}" if prefix else key
                _check_fits(name, parameter, module, is_theirs and key == "weight")
                quantized[prefix] = parameter
    spec = next(iter(quantized.values())).spec
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": spec.format,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "llm_int8_skip_modules": _skipped(dense, list(quantized)),
    }


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _check_fits(name: str, weight: QuantizedTensor, module: nn.Module, has_place: bool) -> None:
    if weight.spec.format not in ("nf4", "fp4"):
        raise ValueError(f"format: expected weights in nf4 or fp4 for 'bitsandbytes', got {name} in {weight.spec.text}")
    if not has_place:
        raise ValueError(
            f"format: expected weights of nn.Linear or Conv1D for 'bitsandbytes', got {name} of a "
            f"{type(module).__name__}, for which transformers has no 4-bit layer of bitsandbytes; leave it out with "
            "modules_to_not_convert, or save in format='lowbit'"
        )
    if _is_conv1d(module) != weight.stored.transposed:
        raise ValueError(
            f"format: expected weights stored as [out, in] for 'bitsandbytes', got {name} of a {type(module).__name__} "
            "as [in, out]; quantize it by LowbitConfig(conv1d_transposed=True)"
        )


def _skipped(dense: list[str], quantized: list[str]) -> list[str]:
    """Entries that make transformers keep the modules ``dense``, and no other.

    A name is also the beginning or the end of others: where one of those is quantized, the entry says it whole.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = []
    for name in dense:
        is_unique = all(should_convert_module(other, [name]) for other in quantized)
        skipped.append(name if is_unique else f"{re.escape(name)}$")
    if not all(should_convert_module(other, skipped) for other in quantized):
        raise ValueError(f"format: expected names that tell dense layers from others, got {few(dense)}")
    return skipped
