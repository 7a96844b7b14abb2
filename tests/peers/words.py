"""PEFT's words for lowbit's errors: PEFT's tests look for them. The errors, and their types, are lowbit's."""

import functools
import re

#: "function: what lowbit says" -> what PEFT says where the same is wrong.
_WORDS = {
    r"delete_adapter: adapters: expected none that is merged, got (\w+); unmerge": r"Cannot delete adapter(s) ['\1'] "
    "while they are merged. Please unmerge them first.",
    r"(?:set|delete)_adapter: adapter: expected one of .*, got '(.*)'": r"Adapter \1 does not exist",
    r"add_adapter: adapter: expected a new name, got '(.*)'": r"Adapter with name '\1' already exists",
    r"forward: adapters: expected none that is merged": "Cannot pass `adapter_names` when there are merged adapters, "
    "please call `unmerge_adapter` first.",
    r"forward: adapter: expected one of .*, got '(.*)'": r"Trying to infer with non-existing adapter(s): \1",
    r"adapter_names: expected adapters without DoRA": "Cannot pass `adapter_names` when DoRA is enabled.",
    r"expected finite merged weights, got NaN or inf": "NaNs detected in the merged weights. The adapter default seems "
    "to be broken",
    r"rank: expected a multiple of the convolution's groups=(\d+), got (\d+)": r"Targeting a Conv2d with groups=\1 and "
    r"rank \2. Currently, support is limited to conv layers where the rank is divisible by groups. Either choose a "
    "different rank or do not target this specific layer.",
    r"rank: expected even ranks for init_lora_weights='orthogonal', got \[(\d+)\]": "Orthogonal initialization "
    r"requires the LoRA rank to be even, got \1 instead.",
    r"lora_bias: expected False for an embedding": "lora_bias=True is not supported for Embedding",
    r"bias: expected 'none' in a further adapter": "LoraModel supports only 1 adapter with bias. When using multiple "
    "adapters, set bias to 'none' for all adapters.",
    r"adapter_names: expected (?:\d+, )?one for each (?:of the \d+ )?rows?": "Length of `adapter_names` should be the "
    "same as the number of inputs, but got another",
    r"adapter_names: expected modules to save that return a tensor": "Mixed batching is only supported for the "
    "following modules: Linear, Embedding, Conv1d, Conv2d, Conv3d.",
    r"expected at most one active adapter that trains a whole": "Only one adapter can be set at a time for "
    "ModulesToSaveWrapper",
    r"expected different trainable_token_indices": "Only one adapter can be set at a time for TrainableTokensWrapper",
    r"adapter_names: expected adapters without \w+ of a": "lora.ParamWrapper does not support mixed adapter batches "
    "yet.",
    r"expected adapters without target_parameters to combine": "add_weighted_adapter does not support targeting "
    "nn.Parameter",
    r"expected keys and values of embed_dim": "Only same embed for query/key/value is supported as of now for "
    "MultiheadAttention",
    r"use_dora: expected none with a torch.nn.MultiheadAttention": "MultiheadAttention does not support DoRA (yet), "
    "please set use_dora to False",
    r"trainable_token_indices: expected .*, which is tied": "trainable_token_indices cannot be applied to modules",
    r"exclude_modules=\[.*\] and layers_to_transform=None leave none": "All modules were excluded",
    r"target_modules: '.*' matches nothing": "No modules were targeted for adaptation. Target modules not found in the "
    "base model. Please check the target modules and try again.",
}


def in_peft(error: Exception, function: str) -> Exception:
    """The same error in PEFT's words, or the error itself."""
    for pattern, text in _WORDS.items():
        if found := re.search(pattern, f"{function}: {error}", re.S):
            return type(error)(found.expand(text))
    return error


def peft_errors(function):
    """A function whose errors are in PEFT's words."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            own = in_peft(error, function.__name__)
            if own is error:
                raise
            raise own from error

    return wrapped
