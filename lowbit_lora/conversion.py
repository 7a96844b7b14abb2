"""Putting adapters onto a model, in two phases: build everything beside it, then swap it in.

Whatever can fail (quantizing a weight with NaN, running out of memory, a target that matches nothing) does so
in the first phase, when the model has not been touched.
"""

import dataclasses
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import lowbit

from . import dense, hf
from .config import LoraConfig
from .layers import LoRABaseLayer, LoRALinear, QLoRALinear, QuantizedLinear
from .targets import find_saved, find_targets, is_plain_linear, module_names

# Below this many weights a model converts before a progress bar could be read.
_PROGRESS_FROM = 50_000_000


class Conversion:
    """What wrapping ``model`` will change. Constructing it changes nothing; :meth:`apply` does.

    Args:
        quantize: store every linear layer but heads and modules to save in 4 bits (for a QLoRAConfig).
        automatic_head: add a classification head to modules_to_save.

    Attributes:
        config: ``config`` with targets, modules to save and task type spelled out.
        layers: canonical name -> new layer with LoRA.
        saved: canonical name -> module that trains in full.

    Raises:
        ValueError, TypeError: see :func:`~lowbit_lora.targets.find_targets`; also for NaN or inf in a weight to
            quantize.
    """

    def __init__(self, model: nn.Module, config: LoraConfig, *, quantize: bool, automatic_head: bool = True):
        _check_convertible(model)
        if config.gradient_checkpointing:
            hf.check_can_checkpoint(model)
        self.model = model
        self._quantize = quantize

        task_type, head_names = hf.task_head(model, config.task_type)
        wanted = list(config.modules_to_save or [])
        if automatic_head:
            wanted += [name for name in head_names if name not in wanted]
        saved = find_saved(model, wanted, may_be_missing=hf.automatic_names(config.task_type))
        self.saved = {name: module for module, name in saved.items()}
        inside_saved = {sub for module in saved for sub in module.modules()}
        heads = {module for module in [hf.output_embedding(model)] if module is not None}
        heads |= {sub for name in head_names for sub in getattr(model, name).modules()}
        targets = find_targets(model, config.target_modules, inside_saved, heads)
        resolved = config.target_modules
        if isinstance(resolved, str) and resolved.lower() == "all-linear":
            # PEFT's own idea of "all-linear" may differ, and so may a later one of ours.
            resolved = sorted(targets.values())
        self.config = dataclasses.replace(
            config,
            target_modules=resolved,
            modules_to_save=list(self.saved) or None,
            task_type=task_type,
        )

        self._replacements = self._build_layers(targets, inside_saved | heads)
        self.layers = {name: self._replacements[module] for module, name in targets.items()}
        self._copies, self._cast_modules = _full_precision_copies(model, saved, inside_saved)

    def _build_layers(self, targets: dict[nn.Module, str], dense: set[nn.Module]) -> dict[nn.Module, nn.Module]:
        to_quantize = _quantizable(self.model, dense) if self._quantize else {}
        names = {**to_quantize, **targets}
        size = sum(module.weight.numel() for module in names)
        # disable=None shows the bar on a terminal only.
        progress = tqdm(names.items(), "Quantizing", leave=False, disable=None if size > _PROGRESS_FROM else True)
        quantized: dict[int, lowbit.QuantizedTensor] = {}  # two layers that share a weight share its 4-bit form
        replacements = {}
        for module, name in progress:
            if module in to_quantize and id(module.weight) not in quantized:
                quantized[id(module.weight)] = self._quantized(module.weight, name)
            new = self._new_layer(module, quantized.get(id(module.weight)), module in targets)
            replacements[module] = new.train(module.training)
        return replacements

    def _quantized(self, weight: torch.Tensor, name: str) -> lowbit.QuantizedTensor:
        config = self.config
        try:
            return lowbit.quantize(
                weight,
                format=config.quantization.value,
                block_size=config.block_size,
                double_quant=config.double_quant,
            )
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}.weight: {error}") from error

    def _new_layer(self, module: nn.Linear, quantized: lowbit.QuantizedTensor | None, with_lora: bool) -> nn.Module:
        if not with_lora:
            return QuantizedLinear(quantized, module.bias)
        config = self.config
        options: dict[str, Any] = {
            "rank": config.rank,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
        }
        if quantized is None:
            return LoRALinear(module, **options)
        return QLoRALinear.from_linear(module, **options, quantized=quantized)

    def apply(self, trainable: bool = True) -> "Restore":
        """Change the model; returns what undoes the parts that merging does not."""
        model, config = self.model, self.config
        restore = Restore(
            requires_grad={n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)},
            dtypes={n: t.dtype for n, t in _named_tensors(model) if t in self._copies},
            fast_paths={},
            checkpointing=config.gradient_checkpointing,
        )
        swap(model, self._replacements)
        for old, new in self._replacements.items():
            # The very Parameter objects, so that tied weights stay tied through .to() and saving.
            new.bias = old.bias
            if isinstance(new, LoRALinear):
                new.weight = old.weight
        _replace_tensors(model, self._copies)
        for module, dtype in self._cast_modules.items():
            module = self._replacements.get(module, module)
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
            module.register_forward_hook(_CastOutputs(dtype))
        for name, module in model.named_modules():
            if isinstance(module, nn.TransformerEncoderLayer) and module.linear1 in self._replacements.values():
                # Its fused inference path reads linear1.weight itself, past our layers; 0 turns it off.
                restore.fast_paths[name] = module.activation_relu_or_gelu
                module.activation_relu_or_gelu = 0
        if config.gradient_checkpointing:
            hf.enable_checkpointing(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if trainable:
            for parameter in trainable_parameters(model, self.layers, self.saved, config.bias):
                parameter.requires_grad_(True)
        dense.adopt(model)
        return restore


@dataclasses.dataclass
class Restore:
    """What wrapping changed besides the layers, by name, so that merging can put it back."""

    requires_grad: dict[str, bool]
    dtypes: dict[str, torch.dtype]
    fast_paths: dict[str, int]
    checkpointing: bool

    def apply(self, model: nn.Module) -> None:
        """Put it back."""
        dense.release(model)
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in list(hooks.items()):
                    if hook is _cast_inputs or isinstance(hook, _CastOutputs):
                        del hooks[key]
                        module._forward_pre_hooks_with_kwargs.pop(key, None)
        tensors = {n: t for n, t in _named_tensors(model) if n in self.dtypes and t.dtype != self.dtypes[n]}
        _replace_tensors(model, {t: _like(t, t.detach().to(self.dtypes[n])) for n, t in tensors.items()})
        for name, value in self.fast_paths.items():
            model.get_submodule(name).activation_relu_or_gelu = value
        if self.checkpointing:
            hf.disable_checkpointing(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))


def swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever its module hangs; all of them or, if interrupted, none."""
    done = []
    try:
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child is not None and child in replacements:
                    done.append((parent, name, child))
                    parent._modules[name] = replacements[child]
    except BaseException:
        for parent, name, child in done:
            parent._modules[name] = child
        raise


@torch.no_grad()
def merge_all(model: nn.Module) -> None:
    """Replace every layer of ours by a plain nn.Linear; a shared 4-bit weight becomes a shared dense one."""
    plain: dict[int, nn.Parameter] = {}
    merged = {}
    for module in model.modules():
        if not isinstance(module, (LoRABaseLayer, QuantizedLinear)):
            continue
        linear = module.merge().train(module.training)
        if not isinstance(module, LoRABaseLayer):
            linear.weight = plain.setdefault(id(module.weight_packed), linear.weight)
        merged[module] = linear
    swap(model, merged)


def trainable_parameters(
    model: nn.Module, layers: dict[str, nn.Module], saved: dict[str, nn.Module], bias: str
) -> list[nn.Parameter]:
    """What trains: LoRA, the modules to save, and biases."""
    found = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    found += [p for module in saved.values() for p in module.parameters() if p.is_floating_point()]
    return found + list(trainable_biases(model, layers, saved, bias).values())


def trainable_biases(
    model: nn.Module, layers: dict[str, nn.Module], saved: dict[str, nn.Module], bias: str
) -> dict[str, nn.Parameter]:
    """The biases that train, by name, without those of modules to save."""
    if bias == "none":
        return {}
    in_saved = {p for module in saved.values() for p in module.parameters()}
    found = {}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if "bias" in last and parameter not in in_saved and (bias == "all" or owner in layers):
            found[name] = parameter
    return found


def _check_convertible(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "peft_config"):
        raise ValueError("model: expected one without adapters, got a PEFT model; merge or unload it first")
    if getattr(model, "is_quantized", False):
        raise ValueError("model: expected dense weights, got a model that is quantized already")
    for name, module in model.named_modules():
        if isinstance(module, (LoRABaseLayer, QuantizedLinear)):
            raise ValueError(
                f"model: expected one without adapters, but {name or 'it'!r} is a {type(module).__name__}; "
                "call merge_and_unload() first"
            )


def _quantizable(model: nn.Module, dense: set[nn.Module]) -> dict[nn.Module, str]:
    """The layers to store in 4 bits, with their names."""
    owners = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(module)
    found = {m: n[0] for m, n in module_names(model).items() if is_plain_linear(m) and m not in dense}
    # A weight tied to an embedding stays dense: the embedding needs it, and a copy would untie the two.
    return {m: n for m, n in found.items() if m.weight.numel() and all(o in found for o in owners[id(m.weight)])}


def _named_tensors(model: nn.Module):
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _like(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def _replace_tensors(model: nn.Module, replacements: dict[torch.Tensor, torch.Tensor]) -> None:
    """Put each tensor wherever the old one hangs, so that tied ones stay tied."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor in replacements:
                    tensors[name] = replacements[tensor]


def _full_precision_copies(
    model: nn.Module, saved: dict[nn.Module, str], inside: set[nn.Module]
) -> tuple[dict[torch.Tensor, torch.Tensor], dict[nn.Module, torch.dtype]]:
    """``(16-bit tensor -> fp32 copy, module -> dtype of the rest of the model)`` for the modules to save.

    A module outside that is tied to one of them (an lm_head to a saved embedding) comes along.
    """

    def low(tensor: torch.Tensor | None) -> bool:
        return tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16)

    tensors = {t for m in saved for t in [*m.parameters(), *m.buffers()] if low(t)}
    modules = {m: t.dtype for m in saved for t in m.parameters() if low(t)}
    for module in model.modules():
        own = [t for t in module._parameters.values() if low(t)]
        if module not in inside and any(t in tensors for t in own):
            modules[module] = own[0].dtype
            tensors |= set(own)
    return {t: _like(t, t.detach().float()) for t in tensors}, modules


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _cast_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a module that trains in fp32 inside a 16-bit model."""
    return _cast(args, torch.float32), {name: _cast(value, torch.float32) for name, value in kwargs.items()}


class _CastOutputs:
    """Forward hook that hands the result on in the model's dtype. A class, so that it can be pickled."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return _cast(output, self.dtype)
