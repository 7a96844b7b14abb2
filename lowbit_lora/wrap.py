"""Putting an adapter onto a model, in two phases: build everything beside it, then swap it in.

Whatever can fail (quantizing a weight with NaN, running out of memory, a target that matches nothing) does so
in the first phase, when the model has not been touched.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from lowbit import QuantizedTensor, models, modules
from lowbit.adapted import Adapted, base_of, share_hooks, walk, with_nested
from lowbit.checks import named_errors
from lowbit.lowrank import factors_of_weight, is_decomposing
from lowbit.modules import BeforeFreezing
from lowbit.names import few, first_names, pattern_value
from lowbit.quantizers.quantize import quantize_to

from . import targets
from .base_tensors import of_base
from .config import CALIBRATED, LoraConfig, QLoRAConfig
from .layers import Adapter, LoRABaseLayer, LoRAExperts, LoRALinear, SavedModule, TrainedTokens, layer_class
from .offload_activations import checkpoint
from .targets import lora_layers
from .training import let_train, set_trainable, trainable_biases

#: From names of weights, and ranks, to quantized weights and (A, B).
Choose = Callable[
    [dict[nn.Parameter, str], dict[nn.Parameter, int]],
    tuple[dict[nn.Parameter, torch.Tensor], dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]]],
]


class Plan:
    """What adding an adapter to ``model`` will change. Constructing it changes nothing; :meth:`apply` does.

    Args:
        model: one that :func:`check_base` accepts, or one with a ``first`` adapter.
        config: what to adapt; a QLoRAConfig also stores all linear weights but those of heads, of modules to save and
            of layers that the model keeps in fp32 in 4 bits.
        name: of the adapter.
        first: the config of the model's first adapter, or None where this one is the first.
        listed: the config comes from a file: an entry that matches nothing is passed over, and so is the model's head
            where it is not among modules_to_save.
        choose: what finds the quantized weights, and the first factors of linear layers for scaling 1, together: from
            the names of the weights and the ranks of those with factors.

    Attributes:
        config: ``config`` with targets, modules to save and task type spelled out.
        parts: canonical name -> module with a place for the adapter.
        fresh: module -> its place, where there was none.

    Raises:
        ValueError, TypeError: also for NaN or inf in a weight to quantize; see :mod:`lowbit_lora.targets`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        name: str,
        *,
        first: LoraConfig | None = None,
        listed: bool = False,
        choose: Choose | None = None,
    ):
        if first is not None:
            _check_further(config, first)
        elif config.gradient_checkpointing:
            models.check_can_checkpoint(model, by_function=config.gradient_checkpointing == "offload")
        if config.init_lora_weights == CALIBRATED and choose is None:
            _check_calibrated(model, listed)
        self.model, self.name, self.is_first = model, name, first is None
        task_type, heads = models.task_head(model, config.task_type)
        wanted = list(config.modules_to_save or [])
        if not listed and config.modules_to_save != []:
            wanted += [head for head in heads if head not in wanted]
        saved = targets.find_saved(model, wanted, wanted if listed else models.automatic_names(config.task_type))
        inside_saved = {sub for module in saved for sub in base_of(module).modules()}
        heads_inside = [base_of(models.unwrapped(model).get_submodule(head)).modules() for head in heads]
        head_modules = targets.output_layers(model).union(*heads_inside)
        found = targets.find_targets(model, config, inside_saved | set(saved), head_modules, listed)
        stacks = targets.find_parameters(model, config, inside_saved | set(saved), listed)
        targets.check_found(config, found, stacks)
        tokens = self._token_rows(config)
        if targets.is_all_linear(config.target_modules):
            # Spelled out: PEFT's idea of it may differ, and a later one of ours.
            config = dataclasses.replace(config, target_modules=sorted(found.values()))
        # With a task PEFT would look for a head in the file.
        task_type = None if config.modules_to_save == [] else config.task_type if listed else task_type
        self.config = dataclasses.replace(config, modules_to_save=list(saved.values()) or None, task_type=task_type)
        to_store = self._to_store(found, inside_saved, head_modules)
        self._weights: dict[nn.Parameter, nn.Parameter] = {}
        if to_store and not choose:
            self._weights = modules.quantized_weights(to_store, config.spec, config.scale)
        self.fresh: dict[nn.Module, Adapted] = {}
        self.parts: dict[str, Adapted] = {}
        try:
            for module, layer_name in found.items():
                self._add_lora(module, layer_name)
            for module, (module_name, keys) in stacks.items():
                self._add_experts(module, module_name, keys)
            for module, module_name in saved.items():
                self._part(module, module_name, SavedModule).add_adapter(name)
            for module, (module_name, indices) in tokens.items():
                self._part(module, module_name, TrainedTokens).add_adapter(name, indices)
            for part_name, part in list(self.parts.items()):
                if isinstance(part, (SavedModule, TrainedTokens)):
                    self._tie(part, part_name)
            if choose:
                self._choose(choose, to_store)
        except BaseException:
            self._withdraw()
            raise

    def _token_rows(self, config: LoraConfig) -> dict[nn.Module, tuple[str, list[int]]]:
        """embedding -> (its name, the indices of the rows that train)."""
        wanted = config.trainable_token_indices
        if not wanted:
            return {}
        if not isinstance(wanted, dict):
            embedding = models.input_embedding(self.model)
            names = [name for name, module in walk(self.model) if module is embedding]
            if not names:
                raise ValueError("trainable_token_indices: expected {name of an embedding: indices} for this model")
            wanted = {names[0]: wanted}
        return {
            module: (name, list(indices))
            for entry, indices in wanted.items()
            for module, name in targets.find_saved(self.model, [entry]).items()
        }

    def _to_store(self, found: dict[nn.Module, str], inside_saved: set, heads: set) -> dict[nn.Parameter, str]:
        """The weights that the config stores in few bits, but those that LoRA takes something out of before."""
        config = self.config
        # What a model was loaded with that transformers quantized, such as modules to keep dense, holds.
        if not isinstance(config, QLoRAConfig) or not self.is_first or modules.is_quantized(self.model):
            return {}
        fused = models.read_by_fused_kernels(self.model)
        _check_not_fused(found, fused)
        skipped = inside_saved | models.kept_in_fp32(self.model) | fused.keys()
        skipped |= set() if config.quantize_head else heads
        options = {"embeddings": config.quantize_embeddings, "head": config.quantize_head}
        weights = modules.find_weights(self.model, skipped, **options)
        if is_decomposing(config.init_lora_weights):  # these are quantized once what LoRA takes is out of them
            taken = {base_of(module).weight for module in found}
            weights = {weight: name for weight, name in weights.items() if weight not in taken}
        return weights

    def _part(self, module: nn.Module, name: str, kind: type[Adapted], **options) -> Adapted:
        """The place for the adapter at a module: what is there already, or a new one."""
        part = self.fresh.get(module, module)
        if not isinstance(part, Adapted):
            is_lora = issubclass(kind, LoRABaseLayer)
            options |= {"rank": None, "freeze": False} if is_lora else {}
            with named_errors(name):
                part = kind(module, **options)
            if is_lora:
                share_hooks(module, part)
            self.fresh[module] = part.train(module.training)
        elif not isinstance(part, kind):
            raise TypeError(
                f"{name}: expected a module that no adapter changes in another way, got a {type(part).__name__}"
            )
        self.parts[name] = part
        return part

    def _add_lora(self, module: nn.Module, name: str) -> None:
        kind = type(module) if isinstance(module, LoRABaseLayer) else layer_class(base_of(module))
        layer = self._part(module, name, kind)
        if is_decomposing(self.config.init_lora_weights):
            self._decompose(layer, name)
        else:
            self._add_to(with_nested(layer, name))

    def _add_experts(self, module: nn.Module, name: str, keys: list[str]) -> None:
        """LoRA on these parameters of a module."""
        layers = with_nested(self._part(module, name, LoRAExperts, parameter_names=keys), name)
        theirs = [layer.weight_name for layer in layers.values()][::-1]
        if theirs != keys:  # PEFT's keys tell the parameters of a module apart by their number only
            raise ValueError(
                f"target_parameters: expected those of {name} that another adapter has, {', '.join(theirs)}, got "
                f"{', '.join(keys)}"
            )
        self._add_to(layers)

    def _add_to(self, layers: dict[str, LoRABaseLayer]) -> None:
        config = self.config
        for name, layer in layers.items():
            self.parts[name] = layer
            adapter = adapter_of(config, name, layer)
            init = "default" if config.init_lora_weights == CALIBRATED else config.init_lora_weights
            layer.add_adapter(self.name, adapter, config.factor_dtype, init)

    @torch.no_grad()
    def _decompose(self, layer: LoRABaseLayer, name: str) -> None:
        """Factors from the layer's weight, and what then remains of it in the base."""
        config, weight, init = self.config, layer.base_layer.weight, self.config.init_lora_weights
        if not self.is_first or isinstance(weight, QuantizedTensor):
            raise ValueError(f"init_lora_weights: {init!r} changes dense weights, and {name} is quantized or adapted")
        if weight in self._weights:
            raise ValueError(f"init_lora_weights: {init!r} expects a weight of its own, and {name} shares one")
        adapter, store = adapter_of(config, name, layer), None
        if isinstance(config, QLoRAConfig):
            store = functools.partial(quantize_to, spec=config.spec, scale=config.scale)
        layer.add_adapter(self.name, adapter, config.factor_dtype)
        with named_errors(name):
            lora_a, lora_b, kept = factors_of_weight(
                weight, bool(layer.out_dim), adapter.rank, adapter.scaling, init, store, config.loftq_iterations
            )
        fill_factors(layer, self.name, lora_a, lora_b)
        self._weights[weight] = nn.Parameter(kept, requires_grad=False)
        if store is None:
            layer.initial[self.name] = (lora_a.to(config.factor_dtype), lora_b)

    @torch.no_grad()
    def _choose(self, choose: Choose, names: dict[nn.Parameter, str]) -> None:
        """Quantized weights, and factors for linear layers whose weight is their own."""
        layers: dict[nn.Parameter, list[LoRALinear]] = {}
        for layer in lora_layers(self.parts).values():
            if isinstance(layer, LoRALinear) and layer.stored_weight in names:
                layers.setdefault(layer.stored_weight, []).append(layer)
        alone = {weight: sharing[0] for weight, sharing in layers.items() if len(sharing) == 1}
        ranks = {weight: layer.adapters[self.name].rank for weight, layer in alone.items()}
        quantized, factors = choose(names, ranks)
        self._weights = {weight: nn.Parameter(tensor, requires_grad=False) for weight, tensor in quantized.items()}
        for weight, start in factors.items():
            share = alone[weight].adapters[self.name].scaling ** -0.5
            fill_factors(alone[weight], self.name, *(factor * share for factor in start))

    def _tie(self, part: SavedModule | TrainedTokens, name: str) -> None:
        """Modules that share a weight with one that trains whole, or with an embedding some of whose rows train."""
        own = {parameter: key for key, parameter in part.base.named_parameters()}
        inside = set(part.base.modules())
        for module, other in first_names(walk(self.model)).items():
            base = base_of(module)
            if base in inside or own.keys().isdisjoint(base._parameters.values()):
                continue
            if isinstance(part, TrainedTokens):
                self._part(module, other, TrainedTokens, tied_to=part)
            elif self.config.ensure_weight_tying:
                saved = self._part(module, other, SavedModule)
                if self.name not in saved.adapters:
                    saved.add_adapter(self.name)
                copies = dict(part.modules_to_save[self.name].named_parameters())
                for key, parameter in base._parameters.items():
                    if parameter in own:
                        saved.modules_to_save[self.name]._parameters[key] = copies[own[parameter]]
            elif not isinstance(self.fresh.get(module, module), SavedModule):
                warnings.warn(
                    f"modules_to_save: {name} is tied to {other}, which keeps the base's weight: a copy of {name} "
                    "trains apart from it, as in PEFT. ensure_weight_tying=True trains one for both",
                    stacklevel=4,
                )

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the adapter's file holds, by PEFT's keys without their prefix, before the model is changed."""
        tensors = {}
        for name, part in self.parts.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in part.adapter_tensors(self.name).items()}
        return tensors | trainable_biases(self.model, self.config.bias, self.parts)

    def of_base(self) -> dict[str, torch.Tensor]:
        """What the adapter's file may hold of the base itself; see :func:`lowbit_lora.base_tensors.of_base`."""
        tensors = of_base(self.model, self.parts)
        return {key: tensor for key, tensor in tensors.items() if tensor not in self._weights}

    def _withdraw(self) -> None:
        for part in self.parts.values():
            if part not in self.fresh.values() and self.name in part.adapters:
                part.delete_adapter(self.name)

    def apply(self, trainable: bool = True) -> BeforeFreezing | None:
        """Change the model; returns what undoes the parts that merging does not, for the first adapter."""
        model, config = self.model, self.config
        restore = None
        if self.is_first:
            restore = BeforeFreezing.of(model, models.disable_checkpointing if config.gradient_checkpointing else None)
        modules.replace_modules(model, self.fresh)
        modules.replace_weights(model, self._weights)
        if config.use_dora and self._weights:
            for layer in lora_layers(self.parts).values():
                layer.reset_magnitude(self.name)
        if restore:
            if config.gradient_checkpointing:
                models.enable_checkpointing(model, checkpoint if config.gradient_checkpointing == "offload" else None)
            restore.freeze(model)
            for part in self.parts.values():
                part.set_active([self.name])
            set_trainable(model, config, [self.name], trainable)
        else:
            let_train(self.parts.values(), self.name, False)
        modules.adopt_frozen(model)
        return restore


def fill_factors(layer: LoRABaseLayer, name: str, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
    """Copy these values, matrices, into the factors of a layer's adapter; without gradients."""
    for factor, value in zip(layer.factors(name), (lora_a, lora_b), strict=True):
        factor.copy_(value.view(factor.shape))


def adapter_of(config: LoraConfig, name: str, layer: LoRABaseLayer) -> Adapter:
    """The settings of a config's adapter in a layer and its name."""
    name = layer.config_name(name)
    rank = pattern_value(config.rank_pattern or {}, name, config.rank)
    alpha = pattern_value(config.alpha_pattern or {}, name, config.lora_alpha)
    return layer.adapter_type(rank, alpha, config.lora_dropout, config.use_rslora, config.use_dora, config.lora_bias)


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
    if config.changes_base:
        raise ValueError(
            f"init_lora_weights: {config.init_lora_weights!r} changes the base, which the first adapter shares"
        )


def _check_calibrated(model: nn.Module, from_file: bool) -> None:
    """ValueError unless factors that are calibrated come from a file, and the base that they belong to is there."""
    if not from_file:
        raise ValueError(
            "init_lora_weights: 'calibrated' takes data; call QLoRAModel.calibrated(model, config, batches)"
        )
    if not modules.has_quantized_weights(model):
        raise ValueError(
            "model: expected the calibrated base that the adapter began with, as save_base() wrote it, got a dense "
            "model, of which the adapter would make a worse one"
        )


def _check_not_fused(found: dict[nn.Module, str], fused: dict[nn.Module, str]) -> None:
    refused = [name for module, name in found.items() if module in fused]
    if refused:
        others = sorted({name.rpartition(".")[2] for module, name in found.items() if module not in fused})
        raise ValueError(
            f"target_modules: expected layers that the model calls, but its fused kernels read the weights of "
            f"{few(refused)} from memory, which 4-bit weights do not have. Name other layers, as in "
            f"target_modules={others}; these then stay dense (LoraModel adapts them)"
        )


def _refuse_peft(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    """ValueError if PEFT begins to wrap a model that has adapters of ours; torch calls this for each new child module.

    Every wrapper of PEFT's takes the model in as its child before it does anything else.
    """
    if name not in ("model", "base_model") or module is None:
        return
    if not any(kind.__module__.partition(".")[0] == "peft" for kind in type(owner).__mro__):
        return
    if any(isinstance(inner, Adapted) for inner in module.modules()):
        raise ValueError(
            f"model: PEFT's {type(owner).__name__} expects a model without adapters, but this {type(module).__name__} "
            "has lowbit_lora's, whose own add_adapter(name, config) adds another. For PEFT, take these out first "
            "(unload() or merge_and_unload()), or begin with a model that is only quantized (lowbit.quantize_): "
            "lowbit_lora.hf.peft.register(peft_config) gives it lowbit's product"
        )


register_module_module_registration_hook(_refuse_peft)


class _DenseModules(nn.ModuleDict):
    """The copies of one module that PEFT trains, decoded: quantized weights are frozen."""

    def __setitem__(self, name: str, module: nn.Module) -> None:
        super().__setitem__(name, modules.dequantize_(module))


def _decode_copies(owner: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
    """What PEFT keeps its copies of a module to save in; torch calls this for each new child module."""
    kind = type(owner)
    if name == "modules_to_save" and kind.__name__ == "ModulesToSaveWrapper" and kind.__module__.startswith("peft."):
        return _DenseModules(module)
    return None


register_module_module_registration_hook(_decode_copies)


def check_base(model: nn.Module) -> None:
    """TypeError/ValueError unless ``model`` is a module without adapters whose weights are at hand."""
    models.check_module(model)
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            raise ValueError(
                f"model: expected one without adapters, but {name or 'it'!r} is a {type(module).__name__}; "
                "call merge_and_unload() first"
            )
    if hasattr(model, "peft_config"):
        raise ValueError("model: expected one without adapters, got a PEFT model; merge or unload it first")
    modules.check_weights_at_hand(model)
