"""LoraModel and QLoRAModel: a model with adapters on it."""

import os
from typing import Any

import torch
from torch import nn

from . import saving
from .config import LoraConfig, QLoRAConfig
from .conversion import Conversion, merge_all


class LoraModel(nn.Module):
    """A model with LoRA on its dense, frozen linear layers.

    The base is changed in place, all of it or, on an error, nothing. Calls, ``generate`` and attributes go
    through to it.

    Args:
        model: a Hugging Face model or any nn.Module.
        config: what to adapt.

    Raises:
        TypeError: an argument, or a layer that ``target_modules`` names, is of the wrong type.
        ValueError: ``target_modules`` or ``modules_to_save`` match nothing; ``model`` has adapters already.

    Source: Hu et al., "LoRA", 2021 (arXiv 2106.09685).
    """

    config_class = LoraConfig

    def __init__(self, model: nn.Module, config: LoraConfig):
        _check_types(model, config, self.config_class)
        super().__init__()
        self._adopt(Conversion(model, config))

    def _adopt(self, conversion: Conversion, trainable: bool = True) -> None:
        self._restore = conversion.apply(trainable)
        self.lora_config = conversion.config
        self.model = conversion.model
        self._adapted = list(conversion.layers)
        self._saved = list(conversion.saved)
        self.training = self.model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base's forward takes and returns."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet (unpickling), or no longer: do not look for it inside itself
                raise
            return getattr(self.model, name)

    def get_base_model(self) -> nn.Module:
        """The model inside, adapters included."""
        return self.model

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that train, for an optimizer."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def count_parameters(self) -> tuple[int, int]:
        """``(trainable, all)``; a 4-bit weight counts as the number of weights it stores."""
        trainable = sum(parameter.numel() for parameter in self.trainable_parameters())
        return trainable, sum(parameter.numel() for parameter in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words."""
        trainable, total = self.count_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable%: {100 * trainable / max(total, 1):.4f}"
        )

    def memory_footprint(self) -> int:
        """Bytes of the base as it is stored: parameters and buffers without LoRA, shared ones once."""
        tensors = {
            id(tensor): tensor.nbytes
            for source in (self.model.named_parameters(), self.model.named_buffers())
            for name, tensor in source
            if ".lora_" not in name
        }
        return sum(tensors.values())

    def save_pretrained(self, folder: str | os.PathLike, **_: Any) -> None:
        """Write the adapter (LoRA, modules to save, trained biases), not the base, in PEFT's two files.

        A save that fails leaves what was in ``folder`` before. Keywords (Hugging Face's Trainer passes some)
        are ignored.

        Raises:
            OSError: the files cannot be written.
            ValueError: the adapters have been merged.
        """
        layers, saved = self._parts()
        saving.save_adapter(self.model, self.lora_config, layers, saved, folder)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, folder: str | os.PathLike, *, is_trainable: bool = False, **overrides: Any
    ) -> "LoraModel":
        """Put a saved adapter, by lowbit or PEFT, onto ``model``.

        Args:
            model: a fresh dense base; QLoRAModel quantizes it as it was when the adapter was saved.
            folder: what save_pretrained wrote, or a hub name.
            is_trainable: train on; otherwise every parameter is frozen.
            overrides: settings that the shapes of the adapter do not depend on: quantization, double_quant,
                block_size, scale (an adapter by PEFT says nothing of them), lora_dropout, gradient_checkpointing.

        Raises:
            OSError: files that are missing (FileNotFoundError) or broken.
            ValueError, TypeError: the adapter does not fit ``model``; nothing has been changed then.
        """
        config, tensors, file = saving.read_adapter(folder, cls.config_class, overrides)
        _check_types(model, config, cls.config_class)
        conversion = Conversion(model, config, automatic_head=False)
        layers, saved, bias = conversion.layers, conversion.saved, config.bias
        values = saving.fit(tensors, model, layers, saved, bias, file)
        wrapper = cls.__new__(cls)
        nn.Module.__init__(wrapper)
        wrapper._adopt(conversion, is_trainable)
        with torch.no_grad():
            for key, target in saving.adapter_tensors(model, *wrapper._parts(), bias).items():
                target.copy_(values[key])
        return wrapper

    def merge_and_unload(self) -> nn.Module:
        """The plain model with nn.Linear layers that hold W + scaling * B A, in the base's own dtypes.

        In place; on an error the model is as before. This wrapper is spent afterwards. The rounding of the
        4-bit weight stays in: the result computes what the adapted model computed.
        """
        self._parts()
        merge_all(self.model, decode=isinstance(self.lora_config, QLoRAConfig))
        self._restore.apply(self.model)
        self._adapted = None
        return self.model

    def _parts(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """``(layers with LoRA, modules to save)``, by canonical name."""
        if self._adapted is None:
            raise ValueError("the adapters have been merged into the model: there are none any more")
        get = self.model.get_submodule
        return {name: get(name) for name in self._adapted}, {name: get(name) for name in self._saved}


class QLoRAModel(LoraModel):
    """A model whose linear layers are stored in 4 bits, with LoRA on those that the config names.

    Heads (``lm_head``, a classifier), modules to save and weights tied to an embedding stay dense. See
    :class:`LoraModel` for the rest.

    Raises:
        ValueError: also where a weight to quantize holds NaN or inf; its module is named.

    Source: Dettmers et al., "QLoRA", 2023 (arXiv 2305.14314).
    """

    config_class = QLoRAConfig


def _check_types(model: Any, config: Any, config_class: type) -> None:
    if isinstance(model, LoraModel):
        raise ValueError(
            f"model: expected one without adapters, got a {type(model).__name__}; call merge_and_unload() first"
        )
    if not isinstance(config, config_class):
        raise TypeError(f"config: expected a {config_class.__name__}, got {type(config).__name__}")
