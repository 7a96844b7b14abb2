"""``model.save_pretrained`` of a model that LowbitConfig quantized."""

import contextlib
import os
import weakref
from collections.abc import Iterator
from typing import Any

from lowbit.checks import check_choice
from lowbit.files.folder import written_beside

from . import bitsandbytes
from .config import METHOD


class SavePretrained:
    """transformers' ``save_pretrained`` with a ``format``; a failure leaves the files that there were.

    It stands in the model's ``__dict__``, so it holds no strong reference to the model: a cycle would keep a deleted
    model in memory until the next collection. Copies and pickles of the model have their own.
    """

    def __init__(self, model):
        self._model = weakref.ref(model)

    def __call__(self, save_directory: str | os.PathLike, *args: Any, format: str = METHOD, **kwargs: Any) -> None:
        """Save the model to a folder.

        Args:
            save_directory, args, kwargs: as of transformers' own ``save_pretrained``.
            format: "lowbit", or "bitsandbytes": a folder that transformers loads with bitsandbytes.

        Raises:
            ValueError: bitsandbytes has no place for one of the weights (it is named), or an unknown format.
            OSError: the folder cannot be written. The files in it are then as they were.
        """
        check_choice("format", format, (METHOD, "bitsandbytes"))
        model = self._model()
        save = type(model).save_pretrained
        settings = bitsandbytes.settings(model) if format == "bitsandbytes" else model.config.quantization_config
        with _quantization_config(model.config, settings):
            if kwargs.get("distributed_checkpoint"):  # several processes write into one folder
                save(model, save_directory, *args, **kwargs)
                return
            if kwargs.get("push_to_hub"):
                kwargs.setdefault("repo_id", os.path.basename(os.path.normpath(save_directory)))
            with written_beside(save_directory, stale=_is_weights) as folder:
                save(model, folder, *args, **kwargs)

    def __getstate__(self):
        return (self._model(),)

    def __setstate__(self, state):
        self._model = weakref.ref(state[0])


def _is_weights(name: str) -> bool:
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
