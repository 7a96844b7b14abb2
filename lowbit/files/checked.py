"""Files that say when they are truncated or corrupt (safetensors with a checksum, JSON) or hold the wrong tensors."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

_METADATA_KEY = "lowbit"


def tensors_to_bytes(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> bytes:
    """A safetensors file of the tensors, with a checksum of them and ``about``, ready for JSON, in its metadata."""
    # copy: safetensors refuses tensors that share memory.
    tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    return save(tensors, {"format": "pt", _METADATA_KEY: json.dumps(about | {"sha256": checksum(tensors)})})


def read_tensors(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """``(tensors, about)`` of a safetensors file; one that :func:`tensors_to_bytes` did not make has an empty about.

    Raises:
        OSError: the file is truncated or corrupt.
    """
    with _whole_file(path, SafetensorError, ValueError), safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if "sha256" in about and about.pop("sha256") != checksum(tensors):
            raise ValueError("its tensors do not have the checksum that it names")
    return tensors, about


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file is truncated or corrupt.
    """
    with _whole_file(path, ValueError), open(path, encoding="utf-8") as file:
        value = json.load(file)  # both JSON and UTF-8 errors are ValueErrors
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def check_fit(
    tensors: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    file: str,
    *,
    optional: dict[str, torch.Tensor],
    strict: bool,
    prefix: str = "",
) -> None:
    """Compare a file's tensors with those that are expected, and those that it may hold besides.

    Args:
        strict: False: missing and unexpected keys are a warning.
        prefix: to put before expected keys in errors.

    Raises:
        ValueError: a key is missing or unexpected, or a shape or dtype does not fit: all of them are named.
    """
    known = optional | expected
    misshapen = [
        f"{prefix}{key} (expected {target.dtype} {tuple(target.shape)}, got {value.dtype} {tuple(value.shape)})"
        for key, value in tensors.items()
        if (target := known.get(key)) is not None
        and (value.shape != target.shape or value.is_floating_point() != target.is_floating_point())
    ]
    wrong = {
        "missing": [prefix + key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in known],
        "of another shape or kind": misshapen,
    }
    listed = "; ".join(f"{what}: {_few(keys)}" for what, keys in wrong.items() if keys)
    message = f"{file}: expected {len(expected)} tensors for this model and rank; {listed}"
    if misshapen or (listed and strict):
        raise ValueError(message)
    if listed:
        warnings.warn(message, stacklevel=4)


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of tensors on the CPU, in the order of the names."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def _whole_file(path: str, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise OSError(f"{path}: expected a whole file, but it is truncated or corrupt ({error})") from error
