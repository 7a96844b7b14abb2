"""What is asked of any model, above all of one of transformers. Everything here also accepts a plain nn.Module.

transformers itself is never imported: what is asked of a model is asked through the methods it has.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

#: End of a transformers class name -> PEFT's task type.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
#: Names that PEFT lists in modules_to_save for a task, whether or not the model has them.
_PEFT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

#: The methods of transformers' base classes that a wrapper passes on; all of ``generate``'s are besides. The others
#: save or load the base, replace or tie its layers, or speak of transformers' own adapters.
# fmt: off
_PASSED_ON = {
    "activation_checkpointing_disable", "activation_checkpointing_enable", "add_model_tags", "can_generate",
    "disable_input_require_grads", "enable_input_require_grads", "get_compiled_call", "get_decoder", "get_encoder",
    "get_input_embeddings", "get_memory_footprint", "get_output_embeddings", "get_parameter_or_buffer",
    "get_position_embeddings", "gradient_checkpointing_disable", "gradient_checkpointing_enable",
    "named_non_persistent_buffers", "num_parameters", "set_attn_implementation", "set_experts_implementation",
    "warn_if_padding_and_no_attention_mask",
}
# fmt: on


def check_module(model: object) -> None:
    """TypeError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


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


def embeddings(model: nn.Module) -> list[nn.Module]:
    """The layers that map ids to vectors, and hidden states to the vocabulary: those of the two that the model has."""
    return [module for module in (input_embedding(model), output_embedding(model)) if module is not None]


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


def described(model: nn.Module) -> str:
    """A model's class, and where it came from, for people."""
    name = base_name(model)
    return type(unwrapped(model)).__name__ + (f" {name!r}" if name else "")


def shape_of_config(model: nn.Module) -> dict[str, str | int]:
    """Those settings of a model's config that most tell models apart."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    values = {name: getattr(getattr(model, "config", None), name, None) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, (str, int))}


def check_can_checkpoint(model: nn.Module, by_function: bool = False) -> None:
    """ValueError unless the model has Hugging Face's activation checkpointing, and takes a function for it if it is to.

    Models of the Hub may be older than transformers 4.35, and call torch's function themselves.
    """
    if not hasattr(model, "gradient_checkpointing_enable") or not getattr(
        model, "supports_gradient_checkpointing", True
    ):
        raise ValueError(
            "gradient_checkpointing: expected a Hugging Face model that supports it, got "
            f"{type(model).__name__}; use torch.utils.checkpoint in the model itself"
        )
    if by_function and "value" in inspect.signature(model._set_gradient_checkpointing).parameters:
        raise ValueError(
            "gradient_checkpointing: expected True or False for a model that calls torch's checkpoint itself, such as "
            f"{type(model).__name__}, got 'offload'"
        )


def enable_checkpointing(model: nn.Module, function: Callable[..., Any] | None = None) -> None:
    """Recompute activations in the backward.

    ``function``: what blocks call with what to compute and its inputs, instead of torch's checkpoint. It may free the
    first block's input too: the graph does not hold it as a leaf, which ``enable_input_require_grads`` makes of it.

    The non-reentrant kind also works where no input of a block requires a gradient, as with a frozen
    embedding; so ``enable_input_require_grads`` is not needed.
    """
    kwargs = {"use_reentrant": False}
    has_hooks = bool(getattr(model, "_require_grads_hooks", None))
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if function is not None:
        for module in model.modules():
            if "_gradient_checkpointing_func" in vars(module):
                module._gradient_checkpointing_func = function
        if not has_hooks and getattr(model, "_require_grads_hooks", None):
            model.disable_input_require_grads()  # newer versions of transformers have just turned it on


def disable_checkpointing(model: nn.Module) -> None:
    """Undo :func:`enable_checkpointing`."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def passes_on(model: nn.Module, name: str) -> bool:
    """Whether a wrapper shows an attribute of the model as its own: data, and methods that respect the adapters.

    A model's own methods compute with its layers, adapters included; those that save or upload would do so with the
    base.
    """
    kind = next((kind for kind in type(unwrapped(model)).__mro__ if name in vars(kind)), None)
    if kind is None or not inspect.isroutine(vars(kind)[name]):
        return True
    package, _, rest = kind.__module__.partition(".")
    if package == "transformers" and not rest.startswith(("models.", "generation.")):
        return name in _PASSED_ON
    return not name.startswith(("save", "push_to"))
