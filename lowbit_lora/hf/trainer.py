"""What transformers' Trainer, TRL and accelerate ask of a model with adapters.

They do not ask what a model can do. ``isinstance(model, peft.PeftModel)`` decides whose ``forward`` names the columns
and the labels, whether a checkpoint holds the adapter or the whole model and how it is loaded again, whether a
quantized model may train, and whether DPO and GRPO need a second model as their reference.
"""

import functools
import os
import sys
from dataclasses import replace
from typing import Any

from torch import nn

from lowbit import models
from lowbit.adapted import Adapted

from ..config import LoraConfig
from ..layers import DEFAULT, SavedModule


class SeenAsPeft(nn.Module):
    """What makes a model with adapters pass for a ``peft.PeftModel``, and the attributes that are then asked for.

    A :class:`~lowbit_lora.LoraModel` is one. PEFT is never imported for it: who asks has done so. FSDP2 gives a model a
    class that inherits from its ``__class__``: in that one ``super()`` may be PeftModel.
    """

    model: nn.Module
    configs: dict[str, LoraConfig]

    def _class(self) -> type:
        own, peft_model = type(self), getattr(sys.modules.get("peft"), "PeftModel", None)
        return own if peft_model is None or issubclass(own, peft_model) else _with_peft(own, peft_model)

    def _set_class(self, value: type) -> None:
        object.__dict__["__class__"].__set__(self, value)

    #: What isinstance asks besides type(): the own class, and once PEFT is imported one that is a PeftModel too.
    __class__ = property(_class, _set_class)  # fully_shard of FSDP2 sets it

    def __reduce_ex__(self, protocol: int) -> tuple:
        return object.__new__, (type(self),), self.__dict__.copy()  # pickle refuses an object of another __class__

    @property
    def base_model(self) -> "SeenAsPeft":
        """The module whose ``model`` is the base: this one. PEFT has two of them, one inside the other."""
        return self

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter, or a list of names if there is not exactly one."""
        names = list(self.active_adapters)
        return names[0] if len(names) == 1 else names

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The config of each adapter, ours; with it another one begins at zero, as TRL adds its reference."""
        return {
            name: replace(config, init_lora_weights="default") if config.changes_base else config
            for name, config in self.configs.items()
        }

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Say in a folder's README.md, as Trainer wrote it, that an adapter is there, and of which base."""
        from huggingface_hub import ModelCard, ModelCardData

        path = os.path.join(output_dir, "README.md")
        card = ModelCard.load(path) if os.path.exists(path) else ModelCard.from_template(ModelCardData())
        card.data["library_name"] = "peft"
        card.data["tags"] = sorted({*(card.data.get("tags") or ()), "lora", "lowbit"})
        if models.base_name(self.model):
            card.data["base_model"] = models.base_name(self.model)
        card.save(path)


@functools.cache
def _with_peft(own: type, peft_model: type) -> type:
    """A class that is both, of the name of ``own`` and with its attributes only."""
    hidden = dict.fromkeys(set(dir(peft_model)) - set(dir(own)), _Hidden())
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (own, peft_model), hidden | names)


class _Hidden:
    """An attribute of PeftModel that a model has none of. Under FSDP2 Trainer gives it one: ``generate``."""

    def __get__(self, model: nn.Module | None, owner: type) -> "_Hidden":
        if model is None:
            return self
        raise AttributeError  # so that Python calls __getattr__


def check_head_is_called(model: nn.Module) -> None:
    """ValueError if an adapter is on the output layer, whose weight TRL's fused loss reads instead of calling it."""
    head = models.output_embedding(model)
    if isinstance(head, Adapted) and not isinstance(head, SavedModule):
        raise ValueError(
            "fused_lm_head: TRL computes the loss from the weight of the output layer, and would neither use nor train "
            f"the adapter in its {type(head).__name__}; leave it out of target_modules and trainable_token_indices, or "
            "train it whole: modules_to_save=['lm_head']"
        )


def save_adapters_only(accelerator: Any) -> None:
    """Let ``accelerator.save_state`` and ``load_state`` store the adapters of a LoraModel, and not its base.

    They are in folders ``adapter``, ``adapter_1``..., one for each such model. What else there is to a state is stored
    as ever. Under FSDP and DeepSpeed accelerate saves the model before it asks, and this changes nothing: under FSDP2
    the state has the base too, in 4 bits with SHARDED_STATE_DICT, decoded with FULL_STATE_DICT.

    Args:
        accelerator: an ``accelerate.Accelerator``. Call this before save_state and before load_state.
    """

    def save(wrapped: list[nn.Module], weights: list[dict], folder: str) -> None:
        if len(weights) == len(wrapped):
            found = _adapters(wrapped, folder)
            for model, path, _ in found:
                model.save_pretrained(path, is_main_process=accelerator.is_main_process)
            for _, _, index in reversed(found):
                del weights[index]

    def load(wrapped: list[nn.Module], folder: str) -> None:
        found = _adapters(wrapped, folder)
        for model, path, _ in found:
            for name in model.configs:
                model.load_adapter(path if name == DEFAULT else os.path.join(path, name), name)
        for _, _, index in reversed(found):
            del wrapped[index]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _adapters(wrapped: list[nn.Module], folder: str) -> list[tuple[nn.Module, str, int]]:
    """``(model, its folder, its place in the list)`` of each model with adapters."""
    found = []
    for index, model in enumerate(models.unwrapped(model) for model in wrapped):
        if isinstance(model, SeenAsPeft):
            found.append((model, os.path.join(folder, f"adapter_{len(found)}" if found else "adapter"), index))
    return found
