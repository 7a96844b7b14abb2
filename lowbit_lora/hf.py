"""The Hugging Face glue: heads, names and checkpointing. Everything here also accepts a plain nn.Module.

transformers itself is never imported: what is asked of a model is asked through the methods it has.
"""

import os

from torch import nn

#: End of a transformers class name -> PEFT's task type.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
#: Names that PEFT lists in modules_to_save for a task, whether or not the model has them.
_PEFT_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's or DDP's wrapper."""
    while True:
        inner = model._modules.get("_orig_mod", model)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is model:
            return model
        model = inner


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that maps hidden states to the vocabulary (``lm_head``), or None."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that maps ids to vectors, or None."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        return get() if callable(get) else None
    except NotImplementedError:
        return None


def task_head(model: nn.Module, task_type: str | None = None) -> tuple[str | None, list[str]]:
    """``(PEFT's task type, names of the head's modules)`` of a model for a task; ``(task_type, [])`` of any other.

    A transformers class for a task (``...For...``) is a pretrained model and, beside it, a head that begins with random
    values: everything that is not the pretrained part. The head of a language model is no such thing: it is pretrained.
    """
    model = unwrapped(model)
    kind = type(model).__name__
    task_type = task_type or next((task for end, task in _TASKS.items() if kind.endswith(end)), None)
    children = dict(model.named_children())
    pretrained = children.get(getattr(model, "base_model_prefix", None))
    named = [name for name in _PEFT_HEADS.get(task_type, ()) if name in children]
    if not hasattr(model, "base_model_prefix") or "For" not in kind:
        return task_type, named
    if output_embedding(model) is not None:
        return task_type, []
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in children.items()}
    if pretrained is None and sizes:
        pretrained = children[max(sizes, key=sizes.get)]
    return task_type, [name for name, child in children.items() if child is not pretrained and sizes[name]]


def automatic_names(task_type: str | None) -> tuple[str, ...]:
    """Names that PEFT lists in modules_to_save for a task, whether or not the model has them."""
    return _PEFT_HEADS.get(task_type, ())


def kept_in_fp32(model: nn.Module) -> set[nn.Module]:
    """The modules that a transformers model keeps in fp32 where the rest is in 16 bits, such as T5's ``wo``."""
    kept = set()
    for module in model.modules():
        names = {
            name
            for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
            for name in getattr(module, attribute, None) or ()
        }
        if names:
            kept |= {inner for name, inner in module.named_modules() if names & set(name.split("."))}
    return kept


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
