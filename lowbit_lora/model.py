"""LoraModel and QLoRAModel: a model with its linear layers replaced, in place, by adapted ones."""

import copy
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from . import hf, saving, targets
from .config import LoraConfig, QLoRAConfig
from .layers import LoRABaseLayer, LoRALinear, QLoRALinear, QuantizedLinear


class LoraModel(nn.Module):
    """A model with LoRA on its target modules; only the adapter trains.

    ``model`` is changed in place: its target layers are replaced, its parameters frozen. A failure on the way leaves
    it as it was. Calls and attributes go through to it.

    Args:
        model: any nn.Module; Hugging Face models get their classification head and checkpointing handled.
        config: what to adapt.

    Raises:
        TypeError: ``model`` or ``config`` of the wrong type.
        ValueError: a target matches nothing, NaN or inf in a weight, ``model`` is wrapped already.
    """

    config_class: type[LoraConfig] = LoraConfig

    def __init__(self, model: nn.Module, config: LoraConfig):
        super().__init__()
        _check_wrappable(model, config, self.config_class)
        self.lora_config = copy.deepcopy(config)
        saved = targets.modules_to_save(model, config)
        lora = targets.lora_targets(model, config, saved)
        self._saved_names, self._lora_names = saved, lora

        replacements = self._build(model, lora, saved)
        self._undo = _Undo(model)
        try:
            if config.gradient_checkpointing:
                hf.enable_gradient_checkpointing(model)
            _swap(model, replacements)
        except BaseException:
            self._undo.run()
            raise
        self.model = model
        self._choose_trainable()

    def _build(self, model: nn.Module, lora: list[str], saved: list[str]) -> dict[str, nn.Module]:
        """The replacement of each module by name, made without touching ``model``."""
        made: dict[int, nn.Module] = {}  # by id: a module used under two names stays one module
        replacements = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        names = self._converted_names(model, lora, saved)
        for name in tqdm(names, desc="preparing layers", leave=False, disable=len(names) < 32):
            if id(modules[name]) not in made:
                try:
                    made[id(modules[name])] = self._convert(modules[name], name in lora)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{name}: {error}") from error
            replacements[name] = made[id(modules[name])]
        for name in saved:
            replacements[name] = _full_precision(modules[name])
        return replacements

    def _converted_names(self, model: nn.Module, lora: list[str], saved: list[str]) -> list[str]:
        return lora

    def _convert(self, linear: nn.Linear, with_lora: bool) -> nn.Module:
        return LoRALinear(linear, **self._lora_options()).train(linear.training)

    def _lora_options(self) -> dict[str, Any]:
        config = self.lora_config
        return {
            "rank": config.rank,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
        }

    def _choose_trainable(self) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for _, parameter in self._adapter_parameters():
            parameter.requires_grad_(True)

    def _adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What trains and is saved, by its name in the wrapped model."""
        bias = self.lora_config.bias
        adapted = {name for name, module in self.model.named_modules() if isinstance(module, LoRABaseLayer)}
        for name, parameter in self.model.named_parameters():
            owner, _, last = name.rpartition(".")
            is_bias = last == "bias" and (bias == "all" or (bias == "lora_only" and owner in adapted))
            in_saved = any(name.startswith(root + ".") for root in self._saved_names)
            if last.startswith("lora_") or is_bias or in_saved:
                yield name, parameter

    def forward(self, *args, **kwargs):
        """The wrapped model's forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def get_base_model(self) -> nn.Module:
        """The wrapped model, with its adapted layers."""
        return self.model

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters for the optimizer."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def count_parameters(self) -> tuple[int, int]:
        """(trainable, all); a 4-bit weight counts as the weights it holds."""
        trainable = sum(parameter.numel() for parameter in self.trainable_parameters())
        total = sum(parameter.numel() for parameter in self.model.parameters())
        for module in self.model.modules():
            if isinstance(module, QuantizedLinear):
                total += module.quantized_weight.numel()
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters train, of how many."""
        trainable, total = self.count_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def memory_footprint(self) -> int:
        """Bytes of all parameters and buffers, 4-bit weights as stored."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))

    def merge_and_unload(self) -> nn.Module:
        """The plain model: every adapted layer an nn.Linear with weight W + scaling * B A.

        The wrapped model is changed in place and returned; this wrapper is of no use afterwards. A failure leaves it
        as it was. 4-bit weights become dense ones of their original dtype.
        """
        replacements, merged = {}, {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            if isinstance(module, (LoRABaseLayer, QuantizedLinear)):
                merged.setdefault(id(module), module.merge().train(module.training))
                replacements[name] = merged[id(module)]
        for name in self._saved_names:
            replacements[name] = _original_precision(self.model.get_submodule(name))
        _swap(self.model, replacements)
        return self.model

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes the adapter alone, in PEFT's files; see :func:`lowbit_lora.saving.save_adapter`."""
        saving.save_adapter(folder, self._adapter_state(), self._written_config(), self._quantization_settings())

    def _written_config(self) -> dict[str, Any]:
        # Whole names, so that PEFT's own idea of "all-linear" or of a head cannot differ from what was trained.
        written = self.lora_config.to_peft()
        written["target_modules"] = self._lora_names
        written["modules_to_save"] = self._saved_names or None
        written["base_model_name_or_path"] = getattr(self.model, "name_or_path", None) or None
        return written

    def _quantization_settings(self) -> dict[str, Any] | None:
        return None

    def _adapter_state(self) -> dict[str, torch.Tensor]:
        adapted = {name for name, module in self.model.named_modules() if isinstance(module, LoRABaseLayer)}
        state = {saving.peft_key(name, adapted): parameter for name, parameter in self._adapter_parameters()}
        for root in self._saved_names:
            for name, buffer in self.model.get_submodule(root).state_dict().items():
                state[saving.peft_key(f"{root}.{name}", adapted)] = buffer
        return state

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | os.PathLike) -> "LoraModel":
        """``model`` with the adapter of ``folder`` (written by lowbit or PEFT); a hub name works where there is a network.

        Raises:
            OSError: files missing, truncated or corrupt.
            ValueError: the adapter does not fit this model, or needs what lowbit lacks. ``model`` is left as it was.
        """
        folder = hf.local_folder(folder)
        written, settings = saving.read_config(folder)
        state = saving.read_weights(folder)
        wrapped = cls(model, cls._config_from(written, settings))
        try:
            saving.load_state(wrapped._adapter_state(), state)
        except BaseException:
            wrapped._undo.run()
            raise
        return wrapped

    @classmethod
    def _config_from(cls, written: dict[str, Any], settings: dict[str, Any]) -> LoraConfig:
        return LoraConfig.from_peft(written)


class QLoRAModel(LoraModel):
    """A model with its linear weights stored in 4 bits and LoRA on its target modules.

    Every nn.Linear is stored in 4 bits, also those without LoRA; the modules to save (a classification head) and the
    output embedding stay as they are. At initialisation the output is exactly the quantized base's.

    Args and errors: see :class:`LoraModel`.
    """

    config_class = QLoRAConfig

    def _converted_names(self, model, lora, saved):
        return targets.quantized_names(model, saved, lora)

    def _convert(self, linear, with_lora):
        options = self._storage_options()
        if with_lora:
            layer = QLoRALinear.from_linear(linear, **options, **self._lora_options())
        else:
            layer = QuantizedLinear.from_linear(linear, **options)
        return layer.train(linear.training)

    def _storage_options(self) -> dict[str, Any]:
        config = self.lora_config
        return {
            "quantization": config.quantization,
            "double_quant": config.double_quant,
            "block_size": config.block_size,
        }

    def _quantization_settings(self):
        return self.lora_config.quantization_settings()

    @classmethod
    def _config_from(cls, written, settings):
        return QLoRAConfig.from_peft(written, **settings)


def _check_wrappable(model: nn.Module, config: LoraConfig, config_class: type[LoraConfig]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, config_class):
        raise TypeError(f"config: expected a {config_class.__name__}, got {type(config).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, (LoraModel, LoRABaseLayer, QuantizedLinear)):
            raise ValueError(
                f"model: expected one without adapters, but {name or 'it'} is a {type(module).__name__} "
                "(merge_and_unload() gives a plain model)"
            )


class _Undo:
    """Remembers a model's modules, gradient flags and checkpointing before a conversion, to put them back."""

    def __init__(self, model: nn.Module):
        self.children = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.checkpointing = [
            (module, module.gradient_checkpointing)
            for module in model.modules()
            if hasattr(module, "gradient_checkpointing")
        ]

    def run(self) -> None:
        for parent, name, child in self.children:
            parent._modules[name] = child
        for parameter, requires_grad in self.flags:
            parameter.requires_grad_(requires_grad)
        for module, enabled in self.checkpointing:
            module.gradient_checkpointing = enabled


def _swap(model: nn.Module, replacements: dict[str, nn.Module]) -> None:
    for name, replacement in replacements.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, replacement)


def _cast_floats(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def _cast_inputs(module: nn.Module, args: tuple) -> tuple:
    return tuple(_cast_floats(arg, torch.float32) for arg in args)


def _cast_output(dtype: torch.dtype, module: nn.Module, args: tuple, output: Any) -> Any:
    return _cast_floats(output, dtype)


def _full_precision(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in fp32; in a 16-bit model, with hooks that cast what goes in and what comes out."""
    trained = copy.deepcopy(module).float()
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if dtypes - {torch.float32}:
        (original,) = dtypes if len(dtypes) == 1 else (torch.float32,)
        trained._lowbit_original_dtype = original
        trained._lowbit_hooks = (
            trained.register_forward_pre_hook(_cast_inputs),
            trained.register_forward_hook(functools.partial(_cast_output, original)),
        )
    return trained


def _original_precision(module: nn.Module) -> nn.Module:
    """The reverse of :func:`_full_precision`, as a new module."""
    plain = copy.deepcopy(module)
    for hook in plain.__dict__.pop("_lowbit_hooks", ()):
        plain._forward_pre_hooks.pop(hook.id, None)
        plain._forward_hooks.pop(hook.id, None)
    return plain.to(plain.__dict__.pop("_lowbit_original_dtype", torch.float32))
