"""The Hugging Face glue: heads, names and checkpointing. Everything here also accepts a plain nn.Module.

transformers itself is never imported: what is asked of a model is asked through the methods it has.
"""

import os

from torch import nn

#: End of a transformers class name -> (PEFT's task type, attributes that may hold the head).
_HEADS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "ForImageClassification": (None, ("classifier",)),
}


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that maps hidden states to the vocabulary (``lm_head``), or None."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def task_head(model: nn.Module, task_type: str | None = None) -> tuple[str | None, list[str]]:
    """``(task type, names of the fresh head)`` of a classification model; ``(task_type, [])`` else."""
    for ending, (task, names) in _HEADS.items():
        if type(model).__name__.endswith(ending) or (task is not None and task == task_type):
            return task_type or task, [name for name in names if isinstance(getattr(model, name, None), nn.Module)]
    return task_type, []


def automatic_names(task_type: str | None) -> tuple[str, ...]:
    """Names that PEFT lists in modules_to_save for a task, whether or not the model has them."""
    return next((names for task, names in _HEADS.values() if task is not None and task == task_type), ())


def read_by_fused_kernels(model: nn.Module) -> dict[nn.Module, str]:
    """The layers whose weight a fused kernel of the model reads from memory, past the layer, with their names.

    Where mamba_ssm is installed, transformers' state space mixers hand these weights to its kernels. A 4-bit weight has
    no memory that such a kernel could read.
    """
    found = {}
    for name, mixer in model.named_modules():
        if "A_log" in mixer._parameters:
            names = [n for n in ("x_proj", "dt_proj", "out_proj") if isinstance(getattr(mixer, n, None), nn.Linear)]
            found |= {getattr(mixer, n): f"{name}.{n}" if name else n for n in names}
    return found


def base_name(model: nn.Module) -> str | None:
    """Where the base came from (path or hub name), if it says so."""
    return getattr(getattr(model, "config", None), "name_or_path", None) or None


def check_can_checkpoint(model: nn.Module) -> None:
    """ValueError unless the model has Hugging Face's activation checkpointing."""
    if not hasattr(model, "gradient_checkpointing_enable") or not getattr(
        model, "supports_gradient_checkpointing", True
    ):
        raise ValueError(
            "gradient_checkpointing: expected a Hugging Face model that supports it, got "
            f"{type(model).__name__}; use torch.utils.checkpoint in the model itself"
        )


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward.

    The non-reentrant kind also works where no input of a block requires a gradient, as with a frozen
    embedding; so ``enable_input_require_grads`` is not needed.
    """
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def disable_checkpointing(model: nn.Module) -> None:
    """Undo :func:`enable_checkpointing`."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def local_folder(folder: str | os.PathLike) -> str:
    """``folder`` itself, or the local copy of a hub repository of that name.

    Raises:
        FileNotFoundError: it is neither.
    """
    folder = os.fspath(folder)
    if os.path.isdir(folder):
        return folder
    # Only "owner/name" can be a repository; anything else is a path that does not exist.
    if not os.path.isabs(folder) and folder.count("/") == 1 and not folder.startswith("."):
        try:
            from huggingface_hub import snapshot_download

            return snapshot_download(folder, allow_patterns=["adapter_*"])
        except Exception as error:  # no network, no such repository, no huggingface_hub: all the same to the caller
            raise FileNotFoundError(
                f"{folder}: expected a folder or a hub repository with an adapter, got {error}"
            ) from error
    raise FileNotFoundError(f"{folder}: expected a folder with an adapter, found none")
