"""Putting adapters onto a model, in two phases: build everything beside it, then swap it in.

Whatever can fail (quantizing a weight with NaN, running out of memory, a target that matches nothing) does so
in the first phase, when the model has not been touched.
"""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowbit import QuantizedTensor
from lowbit.modules import decoded_weights, find_weights, quantized_weights, replace_weights

from . import dense, hf
from .config import LoraConfig, QLoRAConfig
from .layers import DEFAULT, Adapter, LoRABaseLayer, layer_class
from .targets import check_patterns, find_saved, find_targets, pattern_value

#: Where nn.Module keeps the hooks of a module; a layer with LoRA calls those of its base.
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks")
_HOOKS += ("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook")


class Conversion:
    """What wrapping ``model`` will change. Constructing it changes nothing; :meth:`apply` does.

    Args:
        config: what to adapt; a QLoRAConfig also stores all linear weights but those of heads and modules to save in
            4 bits.
        automatic_head: add a classification head to modules_to_save.

    Attributes:
        config: ``config`` with targets, modules to save and task type spelled out.
        layers: canonical name -> new layer with LoRA.
        saved: canonical name -> module that trains in full.

    Raises:
        ValueError, TypeError: see :func:`~lowbit_lora.targets.find_targets`; also for NaN or inf in a weight to
            quantize.
    """

    def __init__(self, model: nn.Module, config: LoraConfig, *, automatic_head: bool = True):
        _check_convertible(model)
        if config.gradient_checkpointing:
            hf.check_can_checkpoint(model)
        self.model = model

        task_type, head_names = hf.task_head(model, config.task_type)
        wanted = list(config.modules_to_save or [])
        if automatic_head:
            wanted += [name for name in head_names if name not in wanted]
        saved = find_saved(model, wanted, may_be_missing=hf.automatic_names(config.task_type))
        self.saved = {name: module for module, name in saved.items()}
        inside_saved = {sub for module in saved for sub in module.modules()}
        heads = {module for module in [hf.output_embedding(model)] if module is not None}
        heads |= {sub for name in head_names for sub in getattr(model, name).modules()}
        if _quantized_parameters(inside_saved):
            raise ValueError(
                f"modules_to_save: expected dense weights in {', '.join(self.saved)}, got a quantized one, which "
                "cannot train; leave the module dense (skip=[...] of lowbit.quantize_)"
            )
        targets = find_targets(model, config, inside_saved, heads)
        check_patterns(config, list(targets.values()))
        self.config = dataclasses.replace(
            config,
            target_modules=spelled_out(config, targets),
            modules_to_save=list(self.saved) or None,
            task_type=task_type,
        )

        self._weights = {}
        if isinstance(config, QLoRAConfig):
            fused = hf.read_by_fused_kernels(model)
            _check_not_fused(targets, fused)
            weights = find_weights(model, inside_saved | heads | fused.keys())
            self._weights = quantized_weights(weights, config.spec, config.scale)
        self._replacements = {module: new_layer(module) for module in targets}
        for module, name in targets.items():
            layer = self._replacements[module]
            layer.add_adapter(DEFAULT, adapter_of(config, name), init=config.init_lora_weights)
            layer.set_active([DEFAULT])
        self.layers = {name: self._replacements[module] for module, name in targets.items()}
        self._copies, self._cast_modules = _full_precision_copies(model, saved, inside_saved)

    def apply(self, trainable: bool = True) -> "Restore":
        """Change the model; returns what undoes the parts that merging does not."""
        model, config = self.model, self.config
        restore = Restore(
            requires_grad={n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)},
            dtypes={n: t.dtype for n, t in _named_tensors(model) if t in self._copies},
            nested={},
            checkpointing=config.gradient_checkpointing,
        )
        swap(model, self._replacements)
        replace_weights(model, self._weights)
        _replace_tensors(model, self._copies)
        for module, dtype in self._cast_modules.items():
            module = self._replacements.get(module, module)
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
            module.register_forward_hook(_CastOutputs(dtype))
        for name, module in model.named_modules():
            if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
                # It looks at its first layer alone, and nested tensors fail in those whose fused path LoRA turns off.
                restore.nested[name] = True
                module.use_nested_tensor = False
        if config.gradient_checkpointing:
            hf.enable_checkpointing(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if trainable:
            for parameter in trainable_parameters(model, self.layers, self.saved, config.bias):
                parameter.requires_grad_(True)
        dense.adopt(model)
        return restore


def new_layer(module: nn.Module) -> LoRABaseLayer:
    """A layer without adapters around a module, whose hooks it calls."""
    layer = layer_class(module)(module, rank=None, freeze=False)
    for name in _HOOKS:  # the very dictionaries, so that the hooks' handles go on working
        setattr(layer, name, getattr(module, name))
    return layer.train(module.training)


def adapter_of(config: LoraConfig, name: str) -> Adapter:
    """The settings of a config's adapter in the layer of a name."""
    rank = pattern_value(config.rank_pattern or {}, name, config.rank)
    alpha = pattern_value(config.alpha_pattern or {}, name, config.lora_alpha)
    return Adapter(rank, alpha, config.lora_dropout, config.use_rslora)


def spelled_out(config: LoraConfig, targets: dict[nn.Module, str]) -> str | list[str]:
    """target_modules, as names where it is "all-linear", of which PEFT's idea may differ, and a later one of ours."""
    wanted = config.target_modules
    return sorted(targets.values()) if isinstance(wanted, str) and wanted.lower() == "all-linear" else wanted


@dataclasses.dataclass
class Restore:
    """What wrapping changed besides the layers, by name, so that merging can put it back."""

    requires_grad: dict[str, bool]
    dtypes: dict[str, torch.dtype]
    nested: dict[str, bool]
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
        for name, value in self.nested.items():
            model.get_submodule(name).use_nested_tensor = value
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
def merge_all(model: nn.Module, *, decode: bool) -> None:
    """Put the base back in the place of each LoRA layer, with the merged weight; on an error nothing is changed.

    ``decode``: decode the quantized weights of all other layers too. A shared one becomes a shared dense one.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRABaseLayer)]
    bases = {layer.base_layer for layer in layers}
    merged = {layer: nn.Parameter(layer.merged_weight(), requires_grad=False) for layer in layers}
    others = (module for module in model.modules() if decode and module not in bases)
    dense_weights = decoded_weights(_quantized_parameters(others))
    _warn_of_untying(model, bases)
    for layer, weight in merged.items():
        layer.base_layer.weight = weight
    replace_weights(model, dense_weights)
    swap(model, {layer: layer.base_layer for layer in layers})


def _quantized_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module._parameters.values() if isinstance(p, QuantizedTensor)]


def _warn_of_untying(model: nn.Module, bases: set[nn.Module]) -> None:
    """Warn of each weight that a layer with LoRA shares with another layer."""
    owners = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, module in model.named_modules():
        if module in bases and owners[module.weight] > 1:
            warnings.warn(
                f"{name.removesuffix('.base_layer')}.weight is tied to that of another layer; merging unties them. Set "
                "config.tie_word_embeddings = False before saving the merged model",
                stacklevel=5,
            )


def trainable_parameters(
    model: nn.Module, layers: dict[str, nn.Module], saved: dict[str, nn.Module], bias: str
) -> list[nn.Parameter]:
    """What trains: LoRA, the modules to save, and biases."""
    found = [p for layer in layers.values() for name in layer.active for p in layer.factors(name)]
    found += [p for module in saved.values() for p in module.parameters() if p.is_floating_point()]
    return found + list(trainable_biases(model, layers, saved, bias).values())


def trainable_biases(
    model: nn.Module, layers: dict[str, nn.Module], saved: dict[str, nn.Module], bias: str
) -> dict[str, nn.Parameter]:
    """The biases that train, without those of modules to save, by the names they have once layers are wrapped."""
    if bias == "none":
        return {}
    in_saved = {p for module in saved.values() for p in module.parameters()}
    found = {}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        owner = owner.removesuffix(".base_layer")
        if "bias" in last and parameter not in in_saved and (bias == "all" or owner in layers):
            found[f"{owner}.base_layer.{last}" if owner in layers else name] = parameter
    return found


def _check_not_fused(targets: dict[nn.Module, str], fused: dict[nn.Module, str]) -> None:
    refused = [name for module, name in targets.items() if module in fused]
    if refused:
        others = sorted({name.rpartition(".")[2] for module, name in targets.items() if module not in fused})
        raise ValueError(
            f"target_modules: expected layers that the model calls, but its fused kernels read the weights of "
            f"{', '.join(refused[:3])}{' and others' if len(refused) > 3 else ''} from memory, which 4-bit weights do "
            f"not have. Name other layers, as in target_modules={others}; these then stay dense (LoraModel adapts them)"
        )


def _check_convertible(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "peft_config"):
        raise ValueError("model: expected one without adapters, got a PEFT model; merge or unload it first")
    if getattr(model, "is_quantized", False):
        raise ValueError("model: expected dense weights, got a model that is quantized already")
    for name, module in model.named_modules():
        if isinstance(module, LoRABaseLayer):
            raise ValueError(
                f"model: expected one without adapters, but {name or 'it'!r} is a {type(module).__name__}; "
                "call merge_and_unload() first"
            )


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
