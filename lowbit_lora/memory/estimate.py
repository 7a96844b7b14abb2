"""Estimates of one process: what is stored, and the peak of a training step."""

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit import models
from lowbit.checks import check_choice, check_count

from ..config import LoraConfig, QLoRAConfig
from ..model import LoraModel, QLoRAModel
from .simulate import equal_blocks, highest_in_step

METHODS = ("full", "lora", "qlora")
_UNMASKED = "lowbit_sdpa_without_masks"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """What trains, and on how much at once.

    Args:
        method: "full", "lora" or "qlora".
        batch, length: rows of a step, and tokens of each.
        checkpointing: activations are recomputed in the backward.
        dtype: of the base's dense weights and of the activations; the factors of LoRA are in fp32.
        rank: of LoRA, on every linear layer but the head.
        options: more of QLoRAConfig or LoraConfig.
    """

    method: str = "qlora"
    batch: int = 1
    length: int = 512
    checkpointing: bool = False
    dtype: str = "bfloat16"
    rank: int = 8
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check_choice("method", self.method, METHODS)
        check_choice("dtype", self.dtype, _DTYPES)
        for name in ("batch", "length", "rank"):
            check_count(name, getattr(self, name))


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step with torch's AdamW (fused).

    ``weights`` are the base's as stored, ``adapters`` what was added to train, ``gradients`` and ``states`` belong to
    whatever trains. ``activations`` is the most that the forward and the backward hold beside all these, for the
    backward or for a moment, and ``in_backward`` the same with the gradients that are there by then. ``block`` are the
    weights and adapters of the largest block, ``outside`` those that are in no block (embeddings, head).
    """

    weights: int
    adapters: int
    gradients: int
    states: int
    activations: int
    in_backward: int
    block: int
    outside: int

    @property
    def peak(self) -> int:
        """The most at any moment: in the forward or the backward, or when the optimizer steps."""
        return self.weights + self.adapters + self.states + max(self.gradients, self.in_backward)


def from_config(config: Any, task: str | None = None) -> nn.Module:
    """The model of a transformers config, on the meta device.

    Args:
        config: a PretrainedConfig, or a dictionary with its ``model_type``.
        task: "causal-lm" or "classification"; by default what ``config.architectures`` says, or what the type is for.

    Raises:
        ValueError: transformers has no such model for the task.
    """
    import transformers

    if isinstance(config, dict):
        entries = {key: value for key, value in config.items() if key != "model_type"}
        config = transformers.AutoConfig.for_model(config["model_type"], **entries)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.use_cache = False
    if task is None:
        named = (config.architectures or [""])[0]
        is_lm = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        is_encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
        task = "causal-lm" if named.endswith("ForCausalLM") or (is_lm and not is_encoder) else "classification"
    check_choice("task", task, ("causal-lm", "classification"))
    kind = "AutoModelForCausalLM" if task == "causal-lm" else "AutoModelForSequenceClassification"
    with torch.device("meta"):
        model = getattr(transformers, kind).from_config(config)
    _without_masks(model)
    return model


def _without_masks(model: nn.Module) -> None:
    """Let attention be as for rows without padding, where transformers finds that no mask is needed.

    It looks at the values for that, and tensors that have none get a mask.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(_UNMASKED, lambda *args, **kwargs: None)
        model.set_attn_implementation(_UNMASKED)


def estimate(config: Any, setting: Setting, task: str | None = None) -> Estimate:
    """The memory of a model of this config; see :func:`from_config`.

    Raises:
        ValueError: also for a model whose step depends on values.
    """
    base = from_config(config, task)
    vocabulary = base.config.get_text_config().vocab_size
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions and setting.length > positions:
        raise ValueError(f"length: expected at most {positions} for this model, got {setting.length}")
    is_lm = models.output_embedding(base) is not None
    model = _to_train(base.to(_DTYPES[setting.dtype]), setting)
    trained = [p for p in model.parameters() if p.requires_grad]
    everything = _nbytes(model.parameters()) + _nbytes(model.buffers())
    gradients = _nbytes(trained)
    adapters = 0 if setting.method == "full" else gradients

    def inputs() -> dict[str, torch.Tensor]:
        ids = torch.zeros(setting.batch, setting.length, dtype=torch.long).clamp(max=vocabulary - 1)
        return {"input_ids": ids, "labels": ids.clone() if is_lm else ids[:, 0].clone()}

    blocks = equal_blocks(model)
    sizes = [0] if blocks is None else [_nbytes(block.parameters()) for block in blocks[2]]
    highest = highest_in_step(model, inputs)
    return Estimate(
        weights=everything - adapters,
        adapters=adapters,
        gradients=gradients,
        states=2 * gradients,  # AdamW keeps two of each parameter's dtype
        activations=highest.without_gradients - everything,
        in_backward=highest.whole - everything,
        block=max(sizes),
        outside=everything - sum(sizes),
    )


def _to_train(base: nn.Module, setting: Setting) -> nn.Module:
    if setting.method == "full":
        if setting.checkpointing:
            models.enable_checkpointing(base)
        return base.train()
    wrapper, config = (LoraModel, LoraConfig) if setting.method == "lora" else (QLoRAModel, QLoRAConfig)
    options = {"rank": setting.rank, "gradient_checkpointing": setting.checkpointing} | setting.options
    with torch.device("meta"), contextlib.redirect_stderr(io.StringIO()):  # what it prints of the storage
        return wrapper(base, config(**options)).train()


def _nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in dict.fromkeys(tensors))
