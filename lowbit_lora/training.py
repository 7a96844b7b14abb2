"""What of a model trains, how it is stored, and what wrapping it changed that merging puts back."""

import dataclasses
import sys
from collections.abc import Iterable

from torch import nn

from lowbit import QuantizedTensor, models
from lowbit.modules import release_frozen

from .config import LoraConfig
from .layers import LoRABaseLayer, SavedModule, TrainedTokens
from .targets import adapted_modules, base_of, walk

#: Dense weights of so many bytes are named by the line that wrapping prints.
_LARGE = 2**20


def set_trainable(model: nn.Module, first: LoraConfig, names: Iterable[str], trains: bool) -> None:
    """Let the parameters of these adapters, and the biases that the first config names, train; and no others."""
    for part in adapted_modules(model).values():
        for name in part.adapters:
            for parameter in part.adapter_parameters(name):
                if parameter.is_floating_point():
                    parameter.requires_grad_(trains and name in names)
    for parameter in trainable_biases(model, first.bias).values():
        parameter.requires_grad_(trains)


def trainable_biases(
    model: nn.Module, bias: str, layers: dict[nn.Module, str] | None = None, skipped: set[nn.Module] = frozenset()
) -> dict[str, nn.Parameter]:
    """The base's biases that train, without those of modules to save, by the names in PEFT's files.

    ``layers``: those that will have LoRA, and ``skipped`` those to be saved, in a model that has not been changed yet.
    """
    if bias == "none":
        return {}
    if layers is None:
        layers = {part.base: name for name, part in adapted_modules(model).items() if isinstance(part, LoRABaseLayer)}
    found = {}
    for name, module in [*walk(model), *((name, base) for base, name in layers.items())]:
        base = base_of(module)
        if isinstance(module, (SavedModule, TrainedTokens)) or base in skipped or not (bias == "all" or base in layers):
            continue
        prefix = f"{layers[base]}.base_layer" if base in layers else name
        parameter = base._parameters.get("bias")
        if parameter is not None:
            found.setdefault(parameter, f"{prefix}.bias")
    return {name: parameter for parameter, name in found.items()}


def unique(named: Iterable[tuple[str, nn.Module]]) -> Iterable[tuple[nn.Module, str]]:
    """Each module once, with its first name."""
    first: dict[nn.Module, str] = {}
    for name, module in named:
        first.setdefault(module, name)
    return first.items()


@dataclasses.dataclass
class Restore:
    """What wrapping changed besides the layers, by name, so that merging can put it back."""

    requires_grad: dict[str, bool]
    nested: dict[nn.Module, bool]
    checkpointing: bool

    @classmethod
    def of(cls, model: nn.Module, checkpointing: bool) -> "Restore":
        """What has to be put back in a model that has not been changed yet."""
        return cls(
            {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
            {m: m.use_nested_tensor for m in model.modules() if isinstance(m, nn.TransformerEncoder)},
            checkpointing,
        )

    def apply(self, model: nn.Module) -> None:
        """Put it back."""
        release_frozen(model)
        for module, value in self.nested.items():
            module.use_nested_tensor = value
        if self.checkpointing:
            models.disable_checkpointing(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not isinstance(parameter, QuantizedTensor):  # which is frozen
                parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))


def storage_summary(model: nn.Module) -> str:
    """One line: how many bytes hold quantized weights, and which large weights are dense, and why."""
    stored, large = {}, {}
    heads = {base_of(module) for module in [models.output_embedding(model)] if module is not None}
    kept = models.kept_in_fp32(model)
    for module, name in unique([*walk(model), *adapted_modules(model).items()]):
        base = base_of(module)
        for key, parameter in [*base._parameters.items()] if not isinstance(module, SavedModule) else []:
            if isinstance(parameter, QuantizedTensor):
                stored[id(parameter)] = parameter
            elif parameter is not None and parameter.nbytes >= _LARGE:
                why = "embedding" if isinstance(base, nn.Embedding) else f"of a {type(base).__name__}"
                why = "head" if base in heads else "kept in fp32" if base in kept else why
                large.setdefault(id(parameter), f"{name}.{key} ({parameter.nbytes / 2**20:,.0f} MiB, {why})")
        if isinstance(module, SavedModule):
            large[id(module)] = f"{name} (trains whole)"
    wide = sum(parameter.numel() * parameter.dtype.itemsize for parameter in stored.values())
    small = sum(parameter.nbytes for parameter in stored.values())
    dense_names = [*large.values()]
    more = f" and {len(dense_names) - 5} more" if len(dense_names) > 5 else ""
    text = f"lowbit: {len(stored)} weights of {wide / 2**20:,.1f} MiB take {small / 2**20:,.1f} MiB"
    return text + (f"; dense: {', '.join(dense_names[:5])}{more}" if dense_names else "")


def print_storage(model: nn.Module) -> None:
    """Print :func:`storage_summary` to stderr."""
    print(storage_summary(model), file=sys.stderr)
