"""``model.save_pretrained`` of a model that LowbitConfig quantized: whole folders or none, and their format."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from lowbit.checks import check_choice
from lowbit.files.folder import written_beside

from . import bitsandbytes
from .config import METHOD, LowbitConfig


def install() -> None:
    """Have ``save_pretrained`` of transformers' models call :func:`save` for those that LowbitConfig quantized.

    It has no place for a format, nor for where the files go first. In the class it also serves copies and pickles; one
    in each model would be a cycle, which keeps a deleted model in memory until the next collection.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.save_pretrained
    if original.__module__ == __name__:
        return

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        is_ours = isinstance(getattr(self.config, "quantization_config", None), LowbitConfig)
        write = functools.partial(original, self)
        return save(self, write, save_directory, *args, **kwargs) if is_ours else write(save_directory, *args, **kwargs)

    save_pretrained.__module__ = __name__
    PreTrainedModel.save_pretrained = save_pretrained


def save(model, write, save_directory: str | os.PathLike, *args: Any, format: str = METHOD, **kwargs: Any) -> None:
    """Save a model to a folder, all of it or, on an error, nothing.

    Args:
        model: one that LowbitConfig quantized.
        write: transformers' own ``save_pretrained`` of it, which takes the ``args`` and ``kwargs``.
        format: "lowbit", or "bitsandbytes": a folder that transformers loads with bitsandbytes.

    Raises:
        ValueError: bitsandbytes has no place for one of the weights (it is named), or an unknown format.
        OSError: the folder cannot be written. The files in it are then as they were.
    """
    check_choice("format", format, (METHOD, "bitsandbytes"))
    settings = bitsandbytes.settings(model) if format == "bitsandbytes" else model.config.quantization_config
    with _quantization_config(model.config, settings):
        if kwargs.get("distributed_checkpoint"):  # several processes write into one folder
            write(save_directory, *args, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", os.path.basename(os.path.normpath(save_directory)))
        with written_beside(save_directory, stale=is_weights) as folder:
            write(folder, *args, **kwargs)


def is_weights(name: str) -> bool:
    """Whether a file holds weights, or says which of several does."""
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))


@contextlib.contextmanager
def _quantization_config(config, value) -> Iterator[None]:
    before = config.quantization_config
    config.quantization_config = value
    try:
        yield
    finally:
        config.quantization_config = before
