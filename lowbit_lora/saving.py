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
from .conversion import trainable_biases
from .layers import DEFAULT
from .targets import module_names

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_METADATA_KEY = "lowbit"
_PREFIX = "base_model.model."


def adapter_tensors(
    model: nn.Module, layers: dict[str, nn.Module], saved: dict[str, nn.Module], bias: str, adapter: str = DEFAULT
) -> dict[str, torch.Tensor]:
    """All that is saved of an adapter, by PEFT's key; the tensors are the model's own."""
    tensors = {}
    for name, layer in layers.items():
        tensors |= {f"{_PREFIX}{name}.{key}": factor for key, factor in layer.adapter_parameters(adapter).items()}
    for name, parameter in trainable_biases(model, layers, saved, bias).items():
        tensors[_PREFIX + name] = parameter
    for name, module in saved.items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            tensors[f"{_PREFIX}{name}.{key}"] = tensor
    return tensors


def save_adapter(
    model: nn.Module,
    config: LoraConfig,
    layers: dict[str, nn.Module],
    saved: dict[str, nn.Module],
    folder: str | os.PathLike,
    adapter: str = DEFAULT,
) -> None:
    """Write both files into ``folder``, or on any failure leave both as they were."""
    tensors = adapter_tensors(model, layers, saved, config.bias, adapter)
    # clone: safetensors refuses tensors that share memory (tied modules to save).
    tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
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
    tensors: dict[str, torch.Tensor],
    model: nn.Module,
    layers: dict[str, nn.Module],
    saved: dict[str, nn.Module],
    bias: str,
    file: str,
    adapter: str = DEFAULT,
) -> dict[str, torch.Tensor]:
    """The file's tensors under the keys of :func:`adapter_tensors`.

    Raises:
        ValueError: a key is missing or unexpected, or a shape or dtype does not fit; the key is named.
    """
    expected = adapter_tensors(model, layers, saved, bias, adapter)
    canonical = {alias: names[0] for names in module_names(model).values() for alias in names[1:]}
    values, unexpected = {}, []
    for key, tensor in tensors.items():
        own = key if key in expected else _canonical_key(key, canonical)
        if own in expected:
            values[own] = tensor
        elif not _is_peft_duplicate(key, saved):
            unexpected.append(key)
    missing = [key for key in expected if key not in values]
    if missing or unexpected:
        raise ValueError(
            f"{file}: expected {len(expected)} tensors for this model; missing: {_few(missing)}; "
            f"unexpected: {_few(unexpected)}"
        )
    for key, target in expected.items():
        value = values[key]
        if value.shape != target.shape:
            raise ValueError(
                f"{file}: {key}: expected shape {tuple(target.shape)} for this model and rank, got {tuple(value.shape)}"
            )
        if value.is_floating_point() != target.is_floating_point():
            raise ValueError(f"{file}: {key}: expected dtype like {target.dtype}, got {value.dtype}")
    return values


def _canonical_key(key: str, canonical: dict[str, str]) -> str:
    """The key of a shared module under its first name; PEFT writes such a module under each."""
    parts = key.removeprefix(_PREFIX).split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in canonical:
            return ".".join([_PREFIX + canonical[name], *parts[end:]])
    return key


def _is_peft_duplicate(key: str, saved: dict[str, nn.Module]) -> bool:
    """With bias="all" PEFT 0.21 writes biases of modules to save thrice, twice under its wrapper's names."""
    stems = (f"{_PREFIX}{name}.{inner}." for name in saved for inner in ("original_module", "modules_to_save"))
    return key.startswith(tuple(stems))


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "") if keys else "none"
