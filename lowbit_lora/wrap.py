"""Putting an adapter onto a model, in two phases: build everything beside it, then swap it in.

Whatever can fail (quantizing a weight with NaN, running out of memory, a target that matches nothing) does so
in the first phase, when the model has not been touched.
"""

import dataclasses
import warnings

import torch
from torch import nn

from lowbit import QuantizedTensor
from lowbit.adapted import share_hooks
from lowbit.lowrank import initial_factors, is_decomposing
from lowbit.modules import (
    adopt_frozen,
    find_weights,
    quantized_weights,
    replace_modules,
    replace_weights,
)
from lowbit.quantizers.quantize import quantize_to

from . import hf
from .base import of_base
from .config import LoraConfig, QLoRAConfig
from .layers import (
    DEFAULT,
    Adapted,
    Adapter,
    LoRABaseLayer,
    LoRAExperts,
    SavedModule,
    TrainedTokens,
    layer_class,
)
from .targets import (
    base_of,
    check_patterns,
    find_parameters,
    find_saved,
    find_targets,
    pattern_value,
    walk,
)
from .training import Restore, set_trainable, trainable_biases, unique


class Plan:
    """What adding an adapter to ``model`` will change. Constructing it changes nothing; :meth:`apply` does.

    Args:
        config: what to adapt; a QLoRAConfig also stores all linear weights but those of heads, of modules to save and
            of layers that the model keeps in fp32 in 4 bits.
        name: of the adapter.
        first: the config of the model's first adapter, or None where this one is the first.
        listed: the config comes from a file: an entry that matches nothing is passed over, and so is the model's head
            where it is not among modules_to_save.

    Attributes:
        config: ``config`` with targets, modules to save and task type spelled out.
        parts: canonical name -> module with a place for the adapter.

    Raises:
        ValueError, TypeError: see :func:`~lowbit_lora.targets.find_targets`; also for NaN or inf in a weight to
            quantize.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        name: str = DEFAULT,
        *,
        first: LoraConfig | None = None,
        listed: bool = False,
    ):
        if first is None:
            _check_convertible(model)
            if config.gradient_checkpointing:
                hf.check_can_checkpoint(model)
        else:
            _check_further(config, first)
        self.model, self.name, self.is_first = model, name, first is None
        task_type, heads = hf.task_head(model, config.task_type)
        wanted = list(config.modules_to_save or [])
        if not listed and config.modules_to_save != []:
            wanted += [head for head in heads if head not in wanted]
        saved = find_saved(model, wanted, may_be_missing=None if listed else hf.automatic_names(config.task_type))
        inside_saved = {sub for module in saved for sub in base_of(module).modules()}
        head_modules = {base_of(module) for module in [hf.output_embedding(model)] if module is not None}
        head_modules |= {sub for head in heads for sub in base_of(hf.unwrapped(model).get_submodule(head)).modules()}
        targets = find_targets(model, config, inside_saved | set(saved), head_modules, may_be_missing=listed)
        stacks = find_parameters(model, config, inside_saved | set(saved), may_be_missing=listed)
        if not targets and not stacks:
            raise ValueError(f"target_parameters: {config.target_parameters} match nothing")
        stack_names = [f"{module_name}.{key}" for module_name, keys in stacks.values() for key in keys]
        check_patterns(config, [*targets.values(), *stack_names])
        several = [*stacks, *(module for module in targets if not hasattr(base_of(module), "weight"))]
        if is_decomposing(config.init_lora_weights) and several:
            raise ValueError(
                "init_lora_weights: expected one that leaves the base alone for target_parameters and "
                f"torch.nn.MultiheadAttention, got {config.init_lora_weights!r}"
            )
        tokens = self._token_rows(config)
        self.config = dataclasses.replace(
            config,
            target_modules=spelled_out(config, targets),
            modules_to_save=list(saved.values()) or None,
            # With a task PEFT would look for a head in the file.
            task_type=None if config.modules_to_save == [] else config.task_type if listed else task_type,
        )
        self._weights = self._stored(config, targets, inside_saved, head_modules)
        self._fresh: dict[nn.Module, Adapted] = {}
        self.parts: dict[str, Adapted] = {}
        try:
            for module, layer_name in targets.items():
                self._add_lora(module, layer_name)
            for module, (module_name, keys) in stacks.items():
                self._add_experts(module, module_name, keys)
            for module, module_name in saved.items():
                self._part(module, module_name, SavedModule).add_adapter(name)
            for module, (module_name, indices) in tokens.items():
                self._part(module, module_name, TrainedTokens).add_adapter(name, indices)
            self._tie()
        except BaseException:
            self._withdraw()
            raise

    def _token_rows(self, config: LoraConfig) -> dict[nn.Module, tuple[str, list[int]]]:
        """embedding -> (its name, the indices of the rows that train)."""
        wanted = config.trainable_token_indices
        if not wanted:
            return {}
        if not isinstance(wanted, dict):
            embedding = hf.input_embedding(self.model)
            names = [name for name, module in walk(self.model) if module is embedding]
            if not names:
                raise ValueError("trainable_token_indices: expected {name of an embedding: indices} for this model")
            wanted = {names[0]: wanted}
        found = {}
        for entry, indices in wanted.items():
            for module, name in find_saved(self.model, [entry], may_be_missing=()).items():
                found[module] = (name, list(indices))
        return found

    def _stored(self, config, targets, inside_saved, heads) -> dict[nn.Parameter, nn.Parameter]:
        """A quantized parameter for each weight that the config stores so."""
        if not isinstance(config, QLoRAConfig) or not self.is_first:
            return {}
        fused = hf.read_by_fused_kernels(self.model)
        _check_not_fused(targets, fused)
        skipped = inside_saved | hf.kept_in_fp32(self.model) | fused.keys()
        skipped |= set() if config.quantize_head else heads
        weights = find_weights(self.model, skipped, embeddings=config.quantize_embeddings, head=config.quantize_head)
        if is_decomposing(config.init_lora_weights):  # these are quantized once what LoRA takes is out of them
            taken = {base_of(module).weight for module in targets}
            weights = {weight: name for weight, name in weights.items() if weight not in taken}
        return quantized_weights(weights, config.spec, config.scale)

    def _part(self, module: nn.Module, name: str, kind: type[Adapted], **options) -> Adapted:
        """The place for the adapter at a module: what is there already, or a new one."""
        module = self._fresh.get(module, module)
        if isinstance(module, Adapted):
            if not isinstance(module, kind):
                raise TypeError(
                    f"{name}: expected a module that no adapter changes in another way, got a {type(module).__name__}"
                )
            part = module
        else:
            try:
                part = kind(module, **options)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
            if isinstance(part, LoRABaseLayer):
                share_hooks(module, part)
            self._fresh[module] = part.train(module.training)
        self.parts[name] = part
        return part

    def _add_lora(self, module: nn.Module, name: str) -> None:
        config = self.config
        kind = type(module) if isinstance(module, LoRABaseLayer) else layer_class(base_of(module))
        options = {} if isinstance(module, Adapted) else {"rank": None, "freeze": False}
        layer = self._part(module, name, kind, **options)
        adapter, init = adapter_of(config, name, layer), config.init_lora_weights
        if not is_decomposing(init):
            layer.add_adapter(self.name, adapter, config.factor_dtype, init)
            for key, inner in layer.nested().items():
                inner_name = f"{name}.{key}"
                self.parts[inner_name] = inner
                inner.add_adapter(self.name, adapter_of(config, inner_name, inner), config.factor_dtype, init)
            return
        if not self.is_first or isinstance(layer.base_layer.weight, QuantizedTensor):
            raise ValueError(f"init_lora_weights: {init!r} changes dense weights, and {name} is quantized or adapted")
        layer.add_adapter(self.name, adapter, config.factor_dtype)
        self._decompose(layer, adapter, init, name)

    def _add_experts(self, module: nn.Module, name: str, keys: list[str]) -> None:
        """LoRA on these parameters of a module."""
        config, options = self.config, {} if isinstance(module, Adapted) else {"rank": None, "freeze": False}
        outer = self._part(module, name, LoRAExperts, parameter_names=keys, **options)
        layers = {name: outer} | {f"{name}.{key}": inner for key, inner in outer.nested().items()}
        theirs = [layer.weight_name for layer in layers.values()][::-1]
        if theirs != keys:  # PEFT's keys tell the parameters of a module apart by their number only
            raise ValueError(
                f"target_parameters: expected those of {name} that another adapter has, {', '.join(theirs)}, got "
                f"{', '.join(keys)}"
            )
        for layer_name, layer in layers.items():
            self.parts[layer_name] = layer
            adapter = adapter_of(config, layer_name, layer)
            layer.add_adapter(self.name, adapter, config.factor_dtype, config.init_lora_weights)

    @torch.no_grad()
    def _decompose(self, layer: LoRABaseLayer, adapter: Adapter, init: str, name: str) -> None:
        """Factors from the layer's weight, and what then remains of it in the base."""
        config, parameter = self.config, layer.base_layer.weight
        if parameter in self._weights:
            raise ValueError(f"init_lora_weights: {init!r} expects a weight of its own, and {name} shares one")

        def store(weight: torch.Tensor) -> torch.Tensor:
            stored = weight.T if layer.out_dim else weight.view(parameter.shape)
            return quantize_to(stored.contiguous(), config.spec, config.scale)

        def decoded(weight: torch.Tensor) -> torch.Tensor:
            decoded = store(weight).dequantize()
            return decoded.T if layer.out_dim else decoded.flatten(1)

        weight = parameter.detach().T if layer.out_dim else parameter.detach().flatten(1)
        options = {"quantize": decoded, "loftq_iterations": config.loftq_iterations} if init == "loftq" else {}
        try:
            lora_a, lora_b, residual = initial_factors(weight, adapter.rank, adapter.scaling, init, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        for factor, value in zip(layer.factors(self.name), (lora_a, lora_b), strict=True):
            factor.copy_(value.view(factor.shape))
        residual = weight if residual is None else residual
        if isinstance(config, QLoRAConfig):
            self._weights[parameter] = nn.Parameter(store(residual), requires_grad=False)
        else:
            stored = (residual.T if layer.out_dim else residual.view(parameter.shape)).contiguous()
            self._weights[parameter] = nn.Parameter(stored, requires_grad=False)
            layer.initial[self.name] = (lora_a.to(layer.factors(self.name)[0].dtype), lora_b)

    def _tie(self) -> None:
        """Modules that share a weight with a saved one, or with an embedding some of whose rows train."""
        for name, part in list(self.parts.items()):
            if not isinstance(part, (SavedModule, TrainedTokens)) or self.name not in part.adapters:
                continue
            own = {p: key for key, p in part.base.named_parameters()}
            for module, other in unique(walk(self.model)):
                shared = [p for p in base_of(module)._parameters.values() if p is not None and p in own]
                if not shared or base_of(module) in set(part.base.modules()):
                    continue
                if isinstance(part, TrainedTokens):
                    tied = self._fresh.get(module, module)
                    if isinstance(tied, Adapted) and not isinstance(tied, TrainedTokens):
                        raise ValueError(
                            f"trainable_token_indices: expected {other}, which is tied to {name}, without another "
                            "kind of adapter"
                        )
                    if not isinstance(tied, Adapted):
                        self.parts[other] = self._fresh[module] = TrainedTokens(module, tied_to=part)
                elif self.config.ensure_weight_tying:
                    saved = self._part(self._fresh.get(module, module), other, SavedModule)
                    if self.name not in saved.adapters:
                        saved.add_adapter(self.name)
                    copies = dict(part.modules_to_save[self.name].named_parameters())
                    target = saved.modules_to_save[self.name]
                    for key, p in base_of(module)._parameters.items():
                        if p in own:
                            target._parameters[key] = copies[own[p]]
                elif isinstance(self._fresh.get(module, module), SavedModule):
                    continue
                else:
                    warnings.warn(
                        f"modules_to_save: {name} is tied to {other}, which keeps the base's weight: a copy of {name} "
                        "trains apart from it, as in PEFT. ensure_weight_tying=True trains one for both",
                        stacklevel=6,
                    )

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the adapter's file holds, by PEFT's keys without their prefix, before the model is changed."""
        tensors = {}
        for name, part in self.parts.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in part.adapter_tensors(self.name).items()}
        layers = {part.base: name for name, part in self.parts.items() if isinstance(part, LoRABaseLayer)}
        inside = {
            inner
            for part in self.parts.values()
            if not isinstance(part, LoRABaseLayer)
            for inner in part.base.modules()
        }
        return tensors | trainable_biases(self.model, self.config.bias, layers, inside)

    def of_base(self) -> dict[str, torch.Tensor]:
        """What the adapter's file may hold of the base itself; see :func:`lowbit_lora.base.of_base`."""
        tensors = of_base(self.model, self.parts)
        return {key: tensor for key, tensor in tensors.items() if tensor not in self._weights}

    def _withdraw(self) -> None:
        for part in self.parts.values():
            if part not in self._fresh.values() and self.name in part.adapters:
                part.delete_adapter(self.name)

    def apply(self, trainable: bool = True) -> "Restore | None":
        """Change the model; returns what undoes the parts that merging does not, for the first adapter."""
        model, config = self.model, self.config
        restore = None
        if self.is_first:
            restore = Restore.of(model, config.gradient_checkpointing)
        replace_modules(model, self._fresh)
        replace_weights(model, self._weights)
        if config.use_dora and self._weights:
            for part in self.parts.values():
                if isinstance(part, LoRABaseLayer):
                    part.reset_magnitude(self.name)
        if self.is_first:
            for module in model.modules():
                if isinstance(module, nn.TransformerEncoder):
                    # It looks at its first layer alone; nested tensors fail in those whose fused path LoRA turns off.
                    module.use_nested_tensor = False
            if config.gradient_checkpointing:
                hf.enable_checkpointing(model)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for part in self.parts.values():
                part.set_active([self.name])
            set_trainable(model, config, [self.name], trainable)
        else:
            for part in self.parts.values():
                for parameter in part.adapter_parameters(self.name):
                    parameter.requires_grad_(False)
        adopt_frozen(model)
        return restore


def adapter_of(config: LoraConfig, name: str, layer: LoRABaseLayer) -> Adapter:
    """The settings of a config's adapter in a layer and its name."""
    name = layer.config_name(name)
    rank = pattern_value(config.rank_pattern or {}, name, config.rank)
    alpha = pattern_value(config.alpha_pattern or {}, name, config.lora_alpha)
    return layer.adapter_type(rank, alpha, config.lora_dropout, config.use_rslora, config.use_dora, config.lora_bias)


def spelled_out(config: LoraConfig, targets: dict[nn.Module, str]) -> str | list[str]:
    """target_modules, as names where it is "all-linear", of which PEFT's idea may differ, and a later one of ours."""
    wanted = config.target_modules
    return sorted(targets.values()) if isinstance(wanted, str) and wanted.lower() == "all-linear" else wanted


def _check_further(config: LoraConfig, first: LoraConfig) -> None:
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected a LoraConfig, got {type(config).__name__}")
    if isinstance(config, QLoRAConfig) and (not isinstance(first, QLoRAConfig) or config.spec != first.spec):
        stored = first.spec if isinstance(first, QLoRAConfig) else "a dense base"
        raise ValueError(f"config: expected how the base is stored ({stored}), got {config.spec}; take a LoraConfig")
    if config.bias != "none":
        raise ValueError(
            f"bias: expected 'none' in a further adapter, got {config.bias!r}: the model has one set of biases"
        )
    if is_decomposing(config.init_lora_weights):
        raise ValueError(
            f"init_lora_weights: {config.init_lora_weights!r} changes the base, which the first adapter shares"
        )


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
        if isinstance(module, Adapted):
            raise ValueError(
                f"model: expected one without adapters, but {name or 'it'!r} is a {type(module).__name__}; "
                "call merge_and_unload() first"
            )
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"model: expected weights in memory, but accelerate keeps those of {name or 'it'!r} elsewhere; load "
                "the model without offloading"
            )
