"""The adapter's files: PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``.

How the base was quantized stands in the metadata of the safetensors file: PEFT warns of keys that it does not
know in the JSON, and a third file would be one more to keep in step.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from . import hf
from .config import LoraConfig, QLoRAConfig
from .targets import module_names

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_METADATA_KEY = "lowbit"
#: What PEFT puts before the names of modules.
PREFIX = "base_model.model."


def save_adapter(
    model: nn.Module, config: LoraConfig, tensors: dict[str, torch.Tensor], folder: str | os.PathLike
) -> None:
    """Write both files into ``folder``, or on any failure leave both as they were.

    ``tensors``: the adapter's, by PEFT's keys without their prefix.
    """
    # clone: safetensors refuses tensors that share memory (tied modules to save).
    tensors = {PREFIX + key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    metadata = {"format": "pt"}
    if isinstance(config, QLoRAConfig):
        metadata[_METADATA_KEY] = json.dumps(config.quantization_settings())
    written = config.to_peft() | {"base_model_name_or_path": hf.base_name(model)}

    def write_config(path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(written, file, indent=2, sort_keys=True)

    _write_together(
        os.fspath(folder),
        {WEIGHTS_FILE: lambda path: save_file(tensors, path, metadata), CONFIG_FILE: write_config},
    )


def _write_together(folder: str, writers: dict[str, Callable[[str], None]]) -> None:
    """Write files beside the old ones, then rename all of them into place; undo the renames if one fails."""
    os.makedirs(folder, exist_ok=True)
    # On the same file system, so that os.replace is one atomic step.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
        for name, write in writers.items():
            path = os.path.join(new, name)
            write(path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        replaced = []
        try:
            for name in writers:
                target, backup = os.path.join(folder, name), os.path.join(new, name + ".old")
                if os.path.exists(target):
                    os.replace(target, backup)
                else:
                    backup = None
                replaced.append((target, backup))
                os.replace(os.path.join(new, name), target)
        except BaseException:
            for target, backup in replaced:
                if backup is not None:
                    os.replace(backup, target)
                else:
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(target)
            raise


def read_adapter(
    folder: str | os.PathLike, config_class: type[LoraConfig], overrides: dict[str, Any]
) -> tuple[LoraConfig, dict[str, torch.Tensor], str]:
    """``(config, tensors by key, path of the weights)`` of an adapter by lowbit or PEFT.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        OSError: a file is truncated or corrupt.
        ValueError, TypeError: a setting is out of range or not supported.
    """
    folder = hf.local_folder(folder)
    config_path, weights_path = (os.path.join(folder, name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    for path in (config_path, weights_path):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: expected an adapter's file, found none")
    with _broken_file(config_path, ValueError), open(config_path, encoding="utf-8") as file:
        written = json.load(file)  # both JSON and UTF-8 errors are ValueErrors
        if not isinstance(written, dict):
            raise ValueError(f"expected a JSON object, got {type(written).__name__}")
    with _broken_file(weights_path, SafetensorError, ValueError), safe_open(weights_path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        settings = json.loads(metadata.get(_METADATA_KEY, "{}"))
    ours = settings if issubclass(config_class, QLoRAConfig) else {}
    try:
        config = config_class.from_peft(written | _as_written(overrides), **(ours | _not_in_peft(overrides)))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{config_path}: {error}") from error
    return config, tensors, weights_path


_IN_PEFT = {"lora_dropout"}
_NOT_IN_PEFT = {"quantization", "double_quant", "block_size", "scale", "gradient_checkpointing", "paged_adamw"}


def _as_written(overrides: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in overrides.items() if name in _IN_PEFT}


def _not_in_peft(overrides: dict[str, Any]) -> dict[str, Any]:
    unknown = set(overrides) - _IN_PEFT - _NOT_IN_PEFT
    if unknown:
        raise TypeError(f"expected overrides among {sorted(_IN_PEFT | _NOT_IN_PEFT)}, got {sorted(unknown)}")
    return {name: value for name, value in overrides.items() if name in _NOT_IN_PEFT}


@contextlib.contextmanager
def _broken_file(path: str, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise OSError(f"{path}: expected a whole adapter file, but it is truncated or corrupt ({error})") from error


def fit(
    tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], model: nn.Module, file: str
) -> dict[str, torch.Tensor]:
    """The file's tensors under the keys of ``expected``, which are PEFT's without their prefix.

    Raises:
        ValueError: a key is missing or unexpected, or a shape or dtype does not fit: all of them are named.
    """
    canonical = {alias: names[0] for names in module_names(model).values() for alias in names[1:]}
    values, unexpected = {}, []
    for key, tensor in tensors.items():
        own = key.removeprefix(PREFIX)
        own = own if own in expected else _canonical_key(own, canonical)
        if own in expected:
            values[own] = tensor
        elif not _is_peft_duplicate(own):
            unexpected.append(key)
    wrong = [f"missing: {_few(missing)}"] if (missing := [key for key in expected if key not in values]) else []
    wrong += [f"unexpected: {_few(unexpected)}"] if unexpected else []
    misshapen = [
        f"{key} (expected {target.dtype} {tuple(target.shape)}, got {values[key].dtype} {tuple(values[key].shape)})"
        for key, target in expected.items()
        if key in values
        and (values[key].shape != target.shape or values[key].is_floating_point() != target.is_floating_point())
    ]
    wrong += [f"of another shape or kind: {_few(misshapen)}"] if misshapen else []
    if wrong:
        raise ValueError(f"{file}: expected {len(expected)} tensors for this model and rank; {'; '.join(wrong)}")
    return values


def _canonical_key(key: str, canonical: dict[str, str]) -> str:
    """The key of a shared module under its first name; PEFT writes such a module under each."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in canonical:
            return ".".join([canonical[name], *parts[end:]])
    return key


def _is_peft_duplicate(key: str) -> bool:
    """With bias="all" PEFT 0.21 writes biases of modules to save thrice, twice under its wrapper's names."""
    return ".original_module." in key or ".modules_to_save." in key


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
