"""The batches to calibrate on: checked against the model before any work, counted and hashed."""

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lowbit import models
from lowbit.adapted import base_of

Batch = dict[str, Any]


def checked(model: nn.Module, batches: Iterable) -> list[Batch]:
    """The batches as dictionaries of arguments of the model, on its device.

    Args:
        batches: dictionaries of tensors as the model's forward takes them, or tensors of its main input alone.

    Raises:
        TypeError: a batch that is neither.
        ValueError: there are none, or one is empty; the model's main input is missing; a key that its forward has no
            argument for; a token id that its vocabulary does not have.
    """
    if isinstance(batches, (Mapping, torch.Tensor)):
        raise TypeError(f"batches: expected a list of batches, got one {type(batches).__name__}; put it into a list")
    main = getattr(model, "main_input_name", "input_ids")
    accepted = arguments(model)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values()) and not hasattr(model, "config")
    embedding = base_of(models.input_embedding(model))
    vocabulary = embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else None
    device = next(model.parameters()).device
    found = []
    for number, batch in enumerate(batches):
        where = f"batches[{number}]"
        if isinstance(batch, torch.Tensor):
            batch = {main: batch}
        if not isinstance(batch, Mapping):
            raise TypeError(f"{where}: expected a dictionary of tensors, or a tensor, got {type(batch).__name__}")
        unknown = [key for key in batch if key not in accepted]
        if unknown and not takes_any:
            raise ValueError(
                f"{where}: expected arguments of {type(model).__name__}.forward, got {unknown[0]!r}; is this a batch "
                "of another model?"
            )
        if main in accepted and main not in batch and "inputs_embeds" not in batch:
            raise ValueError(f"{where}: expected the key {main!r} of {type(model).__name__}, got {', '.join(batch)}")
        tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        if any(value.numel() == 0 for value in tensors.values()) or not tensors:
            raise ValueError(f"{where}: expected tensors with elements, got an empty batch")
        ids = tensors.get("input_ids")
        if ids is not None and vocabulary is not None:
            _check_ids(where, ids, vocabulary, model)
        found.append({key: value.to(device) if key in tensors else value for key, value in batch.items()})
    if not found:
        raise ValueError("batches: expected at least one batch to calibrate on, got none")
    return found


def _check_ids(where: str, ids: torch.Tensor, vocabulary: int, model: nn.Module) -> None:
    if ids.is_floating_point():
        raise TypeError(f"{where}['input_ids']: expected integers, got {ids.dtype}")
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{where}['input_ids']: expected token ids from 0 to {vocabulary - 1}, the vocabulary of "
            f"{type(model).__name__}, got {low if low < 0 else high}; is this a batch of another model?"
        )


def first_row(batch: Batch) -> Batch:
    """The first row of a batch, where all of its tensors have rows; else the batch."""
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    if len(tensors) < len(batch) or len({value.shape[0] for value in tensors if value.dim()}) != 1:
        return batch
    return {key: value[:1] for key, value in batch.items()}


def arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of the model's forward, by name."""
    return inspect.signature(model.forward).parameters


def is_kept(batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor | None:
    """Which tokens count, bool [rows, tokens]: those that ``attention_mask`` does not hide. None: all do.

    ``hidden`` [rows, tokens, width]: None is returned too where its tokens are others, as those of an image.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool() if hidden is None or hidden.shape[:2] == mask.shape else None


def token_count(batches: list[Batch]) -> int:
    """Rows times tokens of all batches, without padding; of images, rows alone."""
    count = 0
    for batch in batches:
        kept = is_kept(batch)
        if kept is not None:
            count += int(kept.sum())
        else:
            first = batch.get("input_ids", next(v for v in batch.values() if isinstance(v, torch.Tensor)))
            count += first.numel() if first.dim() == 2 else first.shape[0]
    return count


def digest(batches: list[Batch]) -> str:
    """SHA-256 of the batches' keys, shapes and values, in hexadecimal."""
    hashed = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            value = batch[key]
            if not isinstance(value, torch.Tensor):
                hashed.update(f"{key}={value!r};".encode())
                continue
            hashed.update(f"{key}:{value.dtype}{tuple(value.shape)};".encode())
            hashed.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
