"""What of a model trains, and how it is stored."""

import sys
from collections.abc import Container

from torch import nn

from lowbit import models
from lowbit.modules import storage_summary
from lowbit.names import first_names

from .config import LoraConfig
from .layers import SavedModule, TrainedTokens
from .targets import adapted_modules, base_of, lora_layers, output_layers, walk


def set_trainable(model: nn.Module, first: LoraConfig, names: Container[str], trains: bool) -> None:
    """Let the parameters of these adapters, and the biases that the first config names, train; and no others."""
    for part in adapted_modules(model).values():
        for name in part.adapters:
            for parameter in part.adapter_parameters(name):
                if parameter.is_floating_point():
                    parameter.requires_grad_(trains and name in names)
    for parameter in trainable_biases(model, first.bias).values():
        parameter.requires_grad_(trains)


def trainable_biases(
    model: nn.Module, bias: str, layers: dict[nn.Module, str] | None = None, skipped: Container[nn.Module] = ()
) -> dict[str, nn.Parameter]:
    """The base's biases that train, without those of modules to save, by the names in PEFT's files.

    ``layers``: those that will have LoRA, and ``skipped`` those to be saved, in a model that has not been changed yet.
    """
    if bias == "none":
        return {}
    if layers is None:
        layers = {part.base: name for name, part in lora_layers(adapted_modules(model)).items()}
    found: dict[nn.Parameter, str] = {}
    for name, module in [*walk(model), *((name, base) for base, name in layers.items())]:
        base = base_of(module)
        if isinstance(module, (SavedModule, TrainedTokens)) or base in skipped or not (bias == "all" or base in layers):
            continue
        prefix = f"{layers[base]}.base_layer" if base in layers else name
        parameter = base._parameters.get("bias")
        if parameter is not None:
            found.setdefault(parameter, f"{prefix}.bias")
    return {name: parameter for parameter, name in found.items()}


def print_storage(model: nn.Module) -> None:
    """Print how the weights of a model with adapters are stored, to stderr."""
    places = [*walk(model), *adapted_modules(model).items()]
    bases = first_names((name, base_of(module)) for name, module in places)
    reasons = dict.fromkeys(models.kept_in_fp32(model), "kept in fp32") | dict.fromkeys(output_layers(model), "head")
    saved = {base_of(module) for _, module in places if isinstance(module, SavedModule)}
    print(storage_summary(bases, reasons, saved), file=sys.stderr)
