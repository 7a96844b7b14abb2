"""The adapter's files: PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``.

What PEFT's files have no place for stands in the metadata of the safetensors file: PEFT warns of keys that it does not
know in the JSON, and a third file would be one more to keep in step. It is a checksum of the tensors, the settings of
the JSON that say what the tensors mean, what the base looks like, and how it was quantized. By the settings the two
files know that they belong together. PEFT's own files have no such metadata, and are read without these checks.
"""

import json
import os
import re
import warnings
from typing import Any

import torch
from torch import nn

from lowbit import models
from lowbit.adapted import module_names, weights_of
from lowbit.files.checked import check_fit, read_json, read_tensors, tensors_to_bytes
from lowbit.files.fingerprint import differences, fingerprint
from lowbit.files.hub import local_folder
from lowbit.files.pair import replace_pair

from .config import LoraConfig, QLoRAConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
#: What PEFT puts before the names of modules.
PREFIX = "base_model.model."
#: Settings of adapter_config.json that say nothing about what the tensors mean: these may be edited.
_EDITABLE = {"base_model_name_or_path", "inference_mode", "task_type", "lora_dropout", "init_lora_weights"}
#: What may be set anew on loading: PEFT's settings, and those of ours.
_PEFT_OVERRIDES = {"lora_dropout"}
_OWN_OVERRIDES = QLoRAConfig.__dataclass_fields__.keys() - LoraConfig.__dataclass_fields__.keys()
_OWN_OVERRIDES |= {"gradient_checkpointing", "lora_dtype"}


def save_adapter(
    model: nn.Module, config: LoraConfig, tensors: dict[str, torch.Tensor], folder: str | os.PathLike
) -> None:
    """Write both files into ``folder``, or on any failure (an OSError) leave both as they were.

    ``tensors``: the adapter's, by PEFT's keys without their prefix.
    """
    weights = {name: w for name, w in weights_of(model, adapted=False).items() if name not in tensors}
    written = config.to_peft() | {"base_model_name_or_path": models.base_name(model)}
    about = config.quantization_settings() if isinstance(config, QLoRAConfig) else {}
    about["base"] = fingerprint(model, weights)
    about["settings"] = {key: value for key, value in written.items() if key not in _EDITABLE}
    content = tensors_to_bytes({PREFIX + key: tensor for key, tensor in tensors.items()}, about)
    settings = json.dumps(written, indent=2, sort_keys=True).encode()
    # The weights first: they know the settings that they belong to, so that a reader sees where the config is old.
    replace_pair(os.fspath(folder), (WEIGHTS_FILE, content), (CONFIG_FILE, settings))


def read_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    config_class: type[LoraConfig],
    overrides: dict[str, Any],
    settings_from: str | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor], str]:
    """``(config, tensors by key, path of the weights)`` of an adapter by lowbit or PEFT.

    Warns where ``model`` is not the base that the adapter was trained on. For the arguments and errors see
    :meth:`lowbit_lora.LoraModel.from_pretrained`.
    """
    if settings_from not in (None, "weights", "config"):
        raise ValueError(f"settings_from: expected 'weights' or 'config', got {settings_from!r}")
    unknown = overrides.keys() - _PEFT_OVERRIDES - _OWN_OVERRIDES
    if unknown:
        raise TypeError(f"expected overrides among {sorted(_PEFT_OVERRIDES | _OWN_OVERRIDES)}, got {sorted(unknown)}")
    folder = local_folder(folder, "adapter_*", "an adapter")
    config_path, weights_path = (os.path.join(folder, name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    for path in (config_path, weights_path):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: expected an adapter's file, found none{_hint(folder)}")
    written = read_json(config_path)
    tensors, about = read_tensors(weights_path)
    settings, base = about.pop("settings", {}), about.pop("base", {})
    if settings_from == "weights":
        written |= settings
    elif settings_from is None:
        _check_settings(settings, written, f"{weights_path} and {config_path}")
    written |= {name: value for name, value in overrides.items() if name in _PEFT_OVERRIDES}
    ours = about if issubclass(config_class, QLoRAConfig) else {}
    ours |= {name: value for name, value in overrides.items() if name in _OWN_OVERRIDES}
    try:
        config = config_class.from_peft(written, **ours)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{config_path}: {error}") from error
    differing = differences(model, weights_of(model, adapted=True), base)
    if differing:
        warnings.warn(
            f"{folder}: the adapter was trained on {base.get('name')}, and this base, {models.described(model)}, is "
            f"another: {'; '.join(differing)}",
            stacklevel=3,
        )
    return config, tensors, weights_path


def _hint(folder: str) -> str:
    if not os.path.isfile(os.path.join(folder, "adapter_model.bin")):
        return ""
    return (
        "; adapter_model.bin is a pickle, which can run code and is not opened. If you trust it, convert it: "
        "safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')"
    )


def _check_settings(of_weights: dict[str, Any], of_config: dict[str, Any], files: str) -> None:
    """OSError unless the two files have the same settings, as far as the weights name them."""
    differing = [
        f"{key} is {value!r} there and {of_config.get(key)!r} here"
        for key, value in of_weights.items()
        if not _same(value, of_config.get(key))
    ]
    if differing:
        raise OSError(
            f"{files} do not belong together: {'; '.join(differing)}. A save was interrupted, or the config was "
            "edited. Save the adapter again, or say which to follow: settings_from='weights' or 'config'"
        )


def _same(one: Any, other: Any) -> bool:
    """Whether two settings mean the same: an empty one is like none, and PEFT's lists of names have no order."""
    if isinstance(one, list) and isinstance(other, list):
        return sorted(map(str, one)) == sorted(map(str, other))
    return one == other or (not one and not other)


def fit(
    tensors: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    model: nn.Module,
    file: str,
    *,
    optional: dict[str, torch.Tensor] | None = None,
    strict: bool = True,
) -> dict[str, torch.Tensor]:
    """The file's tensors under the keys of ``expected``, and of what is ``optional``, if they are those.

    See :func:`lowbit.files.checked.check_fit`; unless ``strict``, unexpected ones keep their keys.
    """
    optional = optional or {}
    values = by_own_keys(tensors, optional | expected, model)
    check_fit(values, expected, file, optional=optional, strict=strict, prefix=PREFIX)
    return values


def by_own_keys(
    tensors: dict[str, torch.Tensor], known: dict[str, torch.Tensor], model: nn.Module
) -> dict[str, torch.Tensor]:
    """The file's tensors under the keys of ``known``, PEFT's without their prefix; others keep theirs."""
    canonical = {alias: names[0] for names in module_names(model).values() for alias in names[1:]}
    values = {}
    for key, tensor in tensors.items():
        own = key.removeprefix(PREFIX)
        own = own if own in known else _canonical_key(own, canonical)
        if own in known:
            values[own] = tensor
        elif _peft_duplicate(own) not in known:
            values[key] = tensor
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


def model_card(model: nn.Module, repo_id: str) -> str:
    """The README.md of an adapter's repository, by whose head the hub knows an adapter."""
    base = models.base_name(model)
    on_hub = base and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base) and not os.path.exists(base)
    of_base = f"base_model: {base}\n" if on_hub else ""
    return (
        f"---\n{of_base}library_name: peft\ntags:\n- lora\n- lowbit\n---\n\n# {repo_id}\n\n"
        f"A LoRA adapter for {models.described(model)}, trained with lowbit. PEFT and lowbit load it:\n\n"
        f"```python\nmodel = peft.PeftModel.from_pretrained(base, {repo_id!r})\n"
        f"model = lowbit_lora.LoraModel.from_pretrained(base, {repo_id!r})\n```\n"
    )
