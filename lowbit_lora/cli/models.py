"""Loading models by the command line: which class, which adapter, and the files beside the weights."""

import enum
import glob
import os
import shutil
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from lowbit.files.checked import read_tensors
from lowbit.files.folder import written_beside
from lowbit.files.hub import local_folder
from lowbit.modules import has_quantized_weights

from .. import LoraModel, QLoRAModel
from ..files import WEIGHTS_FILE


class Writer(str, enum.Enum):
    """Whose folder of 4-bit weights is written."""

    lowbit = "lowbit"
    bitsandbytes = "bitsandbytes"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: What stands beside the weights, and makes a folder whole: the tokenizer's files.
_BESIDE = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def read_config(model: str):
    """The config of a model's folder or hub name.

    Raises:
        OSError: there is none.
    """
    from transformers import AutoConfig

    if not os.path.isdir(model) and (os.path.isabs(model) or model.startswith((".", "~"))):
        raise FileNotFoundError(f"{model}: expected a model's folder, found none")
    return AutoConfig.from_pretrained(model)


def load(model: str, kind: str | None = None, **options: Any) -> nn.Module:
    """The model of a folder or a hub name, of the class that its config names; bitsandbytes' folders are lowbit's here.

    ``kind``: another class of transformers.

    Raises:
        ValueError: transformers has no such class.
        OSError: a file is missing, truncated or corrupt; it is named.
    """
    import transformers

    from ..hf import bitsandbytes, checkpoint

    kind = kind or (read_config(model).architectures or ["AutoModel"])[0]
    if not hasattr(transformers, kind):
        raise ValueError(f"{model}: expected a class of transformers {transformers.__version__}, got {kind!r}")
    try:
        with bitsandbytes.registered():
            return getattr(transformers, kind).from_pretrained(model, **{"dtype": "auto"} | options)
    except SafetensorError:  # which names no file
        folder = local_folder(model, "*.safetensors", "a model")
        checkpoint.quantized_keys(sorted(glob.glob(os.path.join(folder, "*.safetensors"))))
        raise


def is_quantized(model: str) -> str | None:
    """The method by which a model's weights are quantized, as its config says."""
    settings = getattr(read_config(model), "quantization_config", None)
    return None if settings is None else dict(settings).get("quant_method", "unknown")


def with_adapter(base: nn.Module, folder: str) -> LoraModel:
    """The adapter of a folder on its base; the base is quantized as when the adapter was saved."""
    is_qlora = has_quantized_weights(base) or "quantization" in adapter_settings(folder)
    return (QLoRAModel if is_qlora else LoraModel).from_pretrained(base, folder)


def adapter_settings(folder: str) -> dict[str, Any]:
    """What lowbit wrote of an adapter beside PEFT's settings: how its base was quantized; nothing of PEFT's own."""
    path = os.path.join(local_folder(folder, "adapter_*", "an adapter"), WEIGHTS_FILE)
    return read_tensors(path)[1]


def copy_tokenizer(model: str, out: str) -> list[str]:
    """Copy the files of a model's tokenizer; returns their names."""
    from transformers.utils import cached_file

    copied = []
    for name in _BESIDE:
        path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            shutil.copyfile(path, os.path.join(out, name))
            copied.append(name)
    return copied


def save(model: nn.Module, source: str, out: str, **options: Any) -> list[str]:
    """Save a model, and the tokenizer of the one it was made of, to a folder: all or, on an error, nothing.

    ``options``: of its ``save_pretrained``. Returns the names of the tokenizer's files.
    """
    from ..hf.saving import is_weights

    with written_beside(out, stale=is_weights) as beside:
        model.save_pretrained(beside, **options)
        return copy_tokenizer(source, beside)


def check_out(model: str, out: str) -> None:
    """ValueError if the output would overwrite the model that is read."""
    if os.path.exists(out) and os.path.exists(model) and os.path.samefile(out, model):
        raise ValueError(f"OUT: expected another folder than the model's, got {out}")


def folder_bytes(folder: str) -> int:
    """The bytes of a folder's weights."""
    names = os.listdir(folder)
    return sum(
        os.path.getsize(os.path.join(folder, name)) for name in names if name.endswith((".safetensors", ".gguf"))
    )


def model_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters as stored."""
    return sum(parameter.nbytes for parameter in model.parameters())
