"""What of a model trains, and how it is stored."""

import sys
from collections.abc import Container, Iterable

from torch import nn

from lowbit import models
from lowbit.adapted import Adapted, adapted_modules, base_of, walk
from lowbit.modules import storage_summary
from lowbit.names import first_names

from .config import LoraConfig
from .layers import SavedModule
from .targets import lora_layers, output_layers


def let_train(parts: Iterable[Adapted], name: str, trains: bool) -> None:
    """Let the parameters of an adapter in these modules train, or freeze them."""
    for part in parts:
        for parameter in part.adapter_parameters(name):
            if parameter.is_floating_point():
                parameter.requires_grad_(trains)


def set_trainable(model: nn.Module, first: LoraConfig, names: Container[str], trains: bool) -> None:
    """Let the parameters of these adapters, and the biases that the first config names, train; and no others."""
    for part in adapted_modules(model).values():
        for name in part.adapters:
            let_train([part], name, trains and name in names)
    for parameter in trainable_biases(model, first.bias).values():
        parameter.requires_grad_(trains)


def trainable_biases(model: nn.Module, bias: str, parts: dict[str, Adapted] | None = None) -> dict[str, nn.Parameter]:
    """The base's biases that train, without those of modules to save, by the names in PEFT's files.

    ``parts``: in a model that has not been changed yet, the modules that will have adapters.
    """
    if bias == "none":
        return {}
    parts = adapted_modules(model) if parts is None else parts
    layers = {layer.base: name for name, layer in lora_layers(parts).items()}
    others = [part.base for part in parts.values() if part.base not in layers]
    skipped = {inner for base in others for inner in base.modules()}
    places = [(name, base_of(module)) for name, module in walk(model)]
    found: dict[nn.Parameter, str] = {}
    for name, base in [*places, *((name, base) for base, name in layers.items())]:
        parameter = base._parameters.get("bias")
        if parameter is not None and base not in skipped and (bias == "all" or base in layers):
            found.setdefault(parameter, f"{layers[base]}.base_layer.bias" if base in layers else f"{name}.bias")
    return {name: parameter for parameter, name in found.items()}


def print_storage(model: nn.Module) -> None:
    """Print how the weights of a model with adapters are stored, to stderr."""
    places = [*walk(model), *adapted_modules(model).items()]
    bases = first_names((name, base_of(module)) for name, module in places)
    reasons = dict.fromkeys(models.kept_in_fp32(model), "kept in fp32") | dict.fromkeys(output_layers(model), "head")
    saved = {base_of(module) for _, module in places if isinstance(module, SavedModule)}
    print(storage_summary(bases, reasons, saved), file=sys.stderr)
