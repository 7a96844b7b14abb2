"""An adapter on disk: PEFT's two files, and lowbit's quantization settings beside them.

``adapter_model.safetensors`` and ``adapter_config.json`` hold what PEFT 0.21 writes, so either library reads the
other's. How the base was quantized has no place in PEFT's file (it warns about keys it does not know), so it goes to
``lowbit_config.json``, which PEFT does not look at.
"""

import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SETTINGS = "lowbit_config.json"
_PREFIX = "base_model.model."
_SETTINGS_KEYS = {"quantization", "double_quant", "block_size", "paged_adamw"}


def peft_key(name: str, adapted: set[str]) -> str:
    """PEFT's key of the parameter ``name``; ``adapted`` are the names of the layers with LoRA."""
    owner, _, last = name.rpartition(".")
    if last.startswith("lora_"):
        return f"{_PREFIX}{name}.weight"
    if owner in adapted:
        return f"{_PREFIX}{owner}.base_layer.{last}"
    return _PREFIX + name


def save_adapter(
    folder: str | os.PathLike,
    state: dict[str, torch.Tensor],
    config: dict[str, Any],
    settings: dict[str, Any] | None,
) -> None:
    """Writes the files of an adapter; on a failure those of an earlier save stay whole.

    Raises:
        OSError: the folder or a file cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    state = {key: tensor.detach().contiguous().cpu() for key, tensor in state.items()}
    writers: dict[str, Callable[[str], None]] = {
        WEIGHTS: lambda path: save_file(state, path, metadata={"format": "pt"}),
        CONFIG: lambda path: _write_json(path, config),
    }
    if settings is not None:
        writers[SETTINGS] = lambda path: _write_json(path, settings)
    # All files are complete before the first one takes its name.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        for name, write in writers.items():
            write(os.path.join(staging, name))
        for name in writers:
            os.replace(os.path.join(staging, name), os.path.join(folder, name))


def read_config(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(PEFT's dictionary, lowbit's quantization settings or {})``.

    Raises:
        OSError: a file is missing or is not JSON.
        ValueError: unknown quantization settings.
    """
    config = _read_json(os.path.join(folder, CONFIG))
    path = os.path.join(folder, SETTINGS)
    settings = _read_json(path) if os.path.exists(path) else {}
    if unknown := set(settings) - _SETTINGS_KEYS:
        raise ValueError(f"{path}: expected keys among {sorted(_SETTINGS_KEYS)}, got also {sorted(unknown)}")
    return config, settings


def read_weights(folder: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors by PEFT's keys.

    Raises:
        OSError: the file is missing, truncated or corrupt.
    """
    path = os.path.join(folder, WEIGHTS)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file (expected an adapter saved by lowbit or PEFT)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise OSError(f"{path}: not a whole safetensors file: {error}") from error


def load_state(own: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    """Copies ``loaded`` into the tensors of ``own``, after checking that all fit.

    Raises:
        ValueError: a key is missing or unexpected, or a shape differs.
    """
    # With bias="all" PEFT writes a saved module's bias again under its wrapper's inner names.
    loaded = {key: value for key, value in loaded.items() if not _is_wrapper_copy(key)}
    if missing := sorted(set(own) - set(loaded)):
        raise ValueError(f"adapter: missing {missing[0]} (and {len(missing) - 1} more); it is for another model")
    if unexpected := sorted(set(loaded) - set(own)):
        raise ValueError(
            f"adapter: {unexpected[0]} (and {len(unexpected) - 1} more) has no place in this model with this config"
        )
    for key, tensor in own.items():
        if tensor.shape != loaded[key].shape:
            raise ValueError(f"adapter: {key}: expected shape {tuple(tensor.shape)}, got {tuple(loaded[key].shape)}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(loaded[key])


def _is_wrapper_copy(key: str) -> bool:
    return ".modules_to_save." in key or ".original_module." in key


def _write_json(path: str, value: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")


def _read_json(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file (expected an adapter saved by lowbit or PEFT)")
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except ValueError as error:
        raise OSError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise OSError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
