"""The adapter's files: PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``.

What PEFT's files have no place for stands in the metadata of the safetensors file: PEFT warns of keys that it does not
know in the JSON, and a third file would be one more to keep in step. It is a checksum of the tensors, the settings of
the JSON that say what the tensors mean, what the base looks like, and how it was quantized. By the settings the two
files know that they belong together. PEFT's own files have no such metadata, and are read without these checks.
"""

import contextlib
import hashlib
import json
import os
import re
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from . import hf
from .base import fingerprint, warn_of_another_base
from .config import LoraConfig, QLoRAConfig
from .targets import module_names

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_METADATA_KEY = "lowbit"
#: What PEFT puts before the names of modules.
PREFIX = "base_model.model."
#: Settings of adapter_config.json that say nothing about what the tensors mean: these may be edited.
_EDITABLE = {"base_model_name_or_path", "inference_mode", "task_type", "lora_dropout", "init_lora_weights"}
#: Seconds without a write after which a temporary file is one of a saver that was killed.
_LEFT_OVER = 3600


def save_adapter(
    model: nn.Module, config: LoraConfig, tensors: dict[str, torch.Tensor], folder: str | os.PathLike
) -> None:
    """Write both files into ``folder``, or on any failure leave both as they were.

    ``tensors``: the adapter's, by PEFT's keys without their prefix.

    Raises:
        OSError: the files cannot be written.
    """
    base = fingerprint(model, tensors.keys())
    # copy: safetensors refuses tensors that share memory (tied modules to save).
    tensors = {PREFIX + key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    written = config.to_peft() | {"base_model_name_or_path": hf.base_name(model)}
    kept = config.quantization_settings() if isinstance(config, QLoRAConfig) else {}
    kept |= {"sha256": _checksum(tensors), "base": base}
    kept["settings"] = {key: value for key, value in written.items() if key not in _EDITABLE}
    weights = save(tensors, {"format": "pt", _METADATA_KEY: json.dumps(kept)})
    _replace_files(os.fspath(folder), weights, json.dumps(written, indent=2, sort_keys=True).encode())


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _replace_files(folder: str, weights: bytes, config: bytes) -> None:
    """Write both files beside the old ones, then rename them into place: the weights, and the config if it differs.

    Several processes may do so at once: the names of the new files are their own, and the last rename counts.
    """
    os.makedirs(folder, exist_ok=True)
    mark = uuid.uuid4().hex
    final = {name: os.path.join(folder, name) for name in (WEIGHTS_FILE, CONFIG_FILE)}
    new = {name: os.path.join(folder, f".{name}.{mark}.saving") for name in final}
    backup = os.path.join(folder, f".{WEIGHTS_FILE}.{mark}.old.saving")
    try:
        for name, content in ((WEIGHTS_FILE, weights), (CONFIG_FILE, config)):
            with open(new[name], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _remove_left_over(folder, os.stat(new[CONFIG_FILE]).st_mtime - _LEFT_OVER)
        if _content(final[CONFIG_FILE]) == config:
            os.replace(new[WEIGHTS_FILE], final[WEIGHTS_FILE])
            return
        is_first = not os.path.exists(final[WEIGHTS_FILE])
        with contextlib.suppress(OSError):  # there is none, or the file system has no links
            os.link(final[WEIGHTS_FILE], backup)
            os.utime(backup)  # so that another saver does not take it for one that was left
        # The weights first: they know the settings that they belong to, so that a reader sees where the config is old.
        os.replace(new[WEIGHTS_FILE], final[WEIGHTS_FILE])
        try:
            os.replace(new[CONFIG_FILE], final[CONFIG_FILE])
        except BaseException:
            if os.path.exists(backup):
                os.replace(backup, final[WEIGHTS_FILE])
            elif is_first:
                os.remove(final[WEIGHTS_FILE])
            raise
    finally:
        for path in (*new.values(), backup):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def _content(path: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    return None


def _remove_left_over(folder: str, before: float) -> None:
    for entry in os.scandir(folder):
        if entry.name.startswith(".adapter_") and entry.name.endswith(".saving"):
            with contextlib.suppress(FileNotFoundError):  # another rank was faster
                if entry.stat().st_mtime < before:
                    os.remove(entry.path)


def read_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    config_class: type[LoraConfig],
    overrides: dict[str, Any],
    settings_from: str | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor], str]:
    """``(config, tensors by key, path of the weights)`` of an adapter by lowbit or PEFT.

    Warns where ``model`` is not the base that the adapter was trained on.

    Args:
        settings_from: "weights" or "config": which to follow where the files do not belong together.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        OSError: a file is truncated or corrupt, or the two do not belong together.
        ValueError, TypeError: a setting is out of range or not supported.
    """
    if settings_from not in (None, "weights", "config"):
        raise ValueError(f"settings_from: expected 'weights' or 'config', got {settings_from!r}")
    folder = hf.local_folder(folder)
    config_path, weights_path = (os.path.join(folder, name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    for path in (config_path, weights_path):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: expected an adapter's file, found none{_hint(folder)}")
    with _broken_file(config_path, ValueError), open(config_path, encoding="utf-8") as file:
        written = json.load(file)  # both JSON and UTF-8 errors are ValueErrors
        if not isinstance(written, dict):
            raise ValueError(f"expected a JSON object, got {type(written).__name__}")
    with _broken_file(weights_path, SafetensorError, ValueError), safe_open(weights_path, "pt") as file:
        kept = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if "sha256" in kept and kept.pop("sha256") != _checksum(tensors):
            raise ValueError("its tensors do not have the checksum that it names")
    settings, base = kept.pop("settings", {}), kept.pop("base", {})
    if settings_from == "weights":
        written |= settings
    differing = [key for key, value in settings.items() if not _same(value, written.get(key))]
    if differing and settings_from is None:
        what = "; ".join(f"{key} is {settings[key]!r} there and {written.get(key)!r} here" for key in differing)
        raise OSError(
            f"{weights_path} and {config_path} do not belong together: {what}. A save was interrupted, or the config "
            "was edited. Save the adapter again, or say which to follow: settings_from='weights' or 'config'"
        )
    ours = kept if issubclass(config_class, QLoRAConfig) else {}
    try:
        config = config_class.from_peft(written | _as_written(overrides), **(ours | _not_in_peft(overrides)))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{config_path}: {error}") from error
    warn_of_another_base(model, base, folder)
    return config, tensors, weights_path


def _hint(folder: str) -> str:
    if not os.path.isfile(os.path.join(folder, "adapter_model.bin")):
        return ""
    return (
        "; adapter_model.bin is a pickle, which can run code and is not opened. If you trust it, convert it: "
        "safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')"
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two settings mean the same: an empty one is like none, and PEFT's lists of names have no order."""
    if isinstance(one, list) and isinstance(other, list):
        return sorted(map(str, one)) == sorted(map(str, other))
    return one == other or (not one and not other)


_IN_PEFT = {"lora_dropout"}
_NOT_IN_PEFT = {"quantization", "double_quant", "block_size", "scale", "quantize_head", "quantize_embeddings"}
_NOT_IN_PEFT |= {"gradient_checkpointing", "lora_dtype", "paged_adamw"}


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
    expected: dict[str, torch.Tensor],
    model: nn.Module,
    file: str,
    *,
    optional: dict[str, torch.Tensor] | None = None,
    strict: bool = True,
) -> dict[str, torch.Tensor]:
    """The file's tensors under the keys of ``expected``, which are PEFT's without their prefix.

    Args:
        optional: what the file may hold besides, by the same kind of keys.
        strict: False: missing and unexpected keys are a warning.

    Raises:
        ValueError: a key is missing or unexpected, or a shape or dtype does not fit: all of them are named.
    """
    known = (optional or {}) | expected
    canonical = {alias: names[0] for names in module_names(model).values() for alias in names[1:]}
    values, unexpected = {}, []
    for key, tensor in tensors.items():
        own = key.removeprefix(PREFIX)
        own = own if own in known else _canonical_key(own, canonical)
        if own in known:
            values[own] = tensor
        elif _peft_duplicate(own) not in expected:
            unexpected.append(key)
    missing = [PREFIX + key for key in expected if key not in values]
    wrong = [f"missing: {_few(missing)}"] if missing else []
    wrong += [f"unexpected: {_few(unexpected)}"] if unexpected else []
    misshapen = [
        f"{PREFIX}{key} (expected {target.dtype} {tuple(target.shape)}, got {value.dtype} {tuple(value.shape)})"
        for key, value in values.items()
        if value.shape != (target := known[key]).shape or value.is_floating_point() != target.is_floating_point()
    ]
    wrong += [f"of another shape or kind: {_few(misshapen)}"] if misshapen else []
    message = f"{file}: expected {len(expected)} tensors for this model and rank; {'; '.join(wrong)}"
    if misshapen or (wrong and strict):
        raise ValueError(message)
    if wrong:
        warnings.warn(message, stacklevel=3)
    return values


def _canonical_key(key: str, canonical: dict[str, str]) -> str:
    """The key of a shared module under its first name; PEFT writes such a module under each."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in canonical:
            return ".".join([canonical[name], *parts[end:]])
    return key


def _peft_duplicate(key: str) -> str:
    """With bias="all" PEFT 0.21 writes biases of modules to save thrice, twice under its wrapper's names."""
    return re.sub(r"\.(original_module|modules_to_save)\.", ".", key)


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
