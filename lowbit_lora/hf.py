"""What is known about Hugging Face models, in one place; every function also takes a plain nn.Module."""

import os

from torch import nn

_HEADED_TASKS = ("ForSequenceClassification", "ForTokenClassification")
_HEAD_NAMES = ("classifier", "score")


def classification_heads(model: nn.Module) -> list[str]:
    """Names of the freshly initialised head of a sequence or token classification model, which has to train."""
    if not type(model).__name__.endswith(_HEADED_TASKS):
        return []
    return [name for name, _ in model.named_children() if name in _HEAD_NAMES]


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The language model head, or None."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if callable(get) else None
    except NotImplementedError:
        return None


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward.

    Raises:
        ValueError: the model does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} does not support it (expected a Hugging Face model "
            "with supports_gradient_checkpointing)"
        )
    # The reentrant kind drops the gradient where no input of a checkpointed block requires one: here, everywhere.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def local_folder(path: str | os.PathLike) -> str:
    """``path`` if it is a folder, else the local copy of that hub repository's adapter files.

    Raises:
        FileNotFoundError: neither a folder nor a repository that could be had.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return path
    if os.path.isabs(path) or path.startswith(".") or path.count("/") > 1:
        raise FileNotFoundError(f"{path}: no such folder")
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(path, allow_patterns=["adapter_*", "lowbit_config.json"])
    except Exception as error:  # the hub client raises many kinds; all mean that there is nothing to load
        raise FileNotFoundError(f"{path}: no such folder, and no hub repository of that name: {error}") from error
