"""Merging adapters into the base for good, into dense weights or into quantized ones."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lowbit import QuantizedTensor
from lowbit.adapted import Adapted, adapted_modules
from lowbit.modules import decoded_weights, replace_modules, replace_weights
from lowbit.quantizers.requantize import Quantizer, Survival, check_survivals

from .adapters import computing_with
from .calibrate import calibrate_merged, inputs
from .calibrate.model import evaluating
from .layers import LoRABaseLayer, SavedModule, TrainedTokens
from .recovery import Losses, MergeReport, has_loss, held_out_of, mean_loss, show

#: From a layer with LoRA to the quantizer of its weight; None: the layer's own.
QuantizerOf = Callable[[LoRABaseLayer], Quantizer | None]


class Merge:
    """What merging adapters will change. Constructing it changes nothing; :meth:`apply` does.

    Args:
        model: with adapters.
        names: the adapters.
        safe, dtype: as for :meth:`lowbit_lora.LoraModel.merge_and_unload`.
        quantizer_of: None: quantized weights become dense.

    Attributes:
        survivals: for each layer that is quantized again, what is left of its weight's change.

    Raises:
        ValueError: NaN or inf with ``safe``.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        safe: bool,
        dtype: torch.dtype | None,
        quantizer_of: QuantizerOf | None = None,
    ):
        self._model, self._names = model, tuple(names)
        self._is_quantizing = quantizer_of is not None
        self._tensors: dict[Adapted, dict[str, torch.Tensor]] = {}
        self.survivals: list[Survival] = []
        trained: dict[torch.Tensor, torch.Tensor] = {}  # of modules to save: what tied ones share stays shared
        for name, part in tqdm(adapted_modules(model).items(), "Merging", leave=False, disable=None):
            tensors = {} if isinstance(part, TrainedTokens) and part.tied_to else part.merged_tensors(self._names)
            if safe and not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise ValueError(f"{name}: expected finite merged weights, got NaN or inf")
            if isinstance(part, SavedModule) and tensors:
                sources = part.adapter_tensors(part.check_active(self._names)[0])
                tensors = {key: trained.setdefault(sources[key], tensor) for key, tensor in tensors.items()}
            elif isinstance(part, LoRABaseLayer) and part.weight_name in tensors:
                if quantizer_of is not None and isinstance(part.stored_weight, QuantizedTensor):
                    weight, survival = part.requantized(self._names, quantizer_of(part), name)
                    tensors[part.weight_name] = weight
                    self.survivals.append(survival)
                elif dtype is not None:
                    tensors[part.weight_name] = nn.Parameter(tensors[part.weight_name].to(dtype), requires_grad=False)
            self._tensors[part] = tensors
        for part in self._tensors:
            if isinstance(part, TrainedTokens) and part.tied_to:
                self._tensors[part] = self._tensors[part.tied_to]

    @contextlib.contextmanager
    def tried(self) -> Iterator[None]:
        """Context in which the model, whose active adapters have to be these, computes with what is merged."""
        before = []
        try:
            for part, tensors in self._tensors.items():
                if isinstance(part, LoRABaseLayer) and tensors:
                    before.append((part, {key: part.base._parameters[key] for key in tensors}))
                    part.base._parameters.update(tensors)
                    part.merged = part.active
            yield
        finally:
            for part, parameters in before:
                part.base._parameters.update(parameters)
                part.merged = ()

    @torch.no_grad()
    def apply(self, decode: bool) -> None:
        """Put the base back in the place of each module with adapters, with the adapters merged in.

        ``decode``: where merged weights are dense, decode the quantized weights of all other layers too. A shared one
        becomes a shared dense one.
        """
        model = self._model
        bases = {inner for part in self._tensors for inner in part.base.modules()}
        others = [p for m in model.modules() if m not in bases for p in m._parameters.values()]
        decode = decode and not self._is_quantizing
        dense_weights = decoded_weights(p for p in others if decode and isinstance(p, QuantizedTensor))
        _warn_of_untying(model, self._tensors)
        for part, tensors in self._tensors.items():
            _put(part.base, tensors)
        replace_weights(model, dense_weights)
        replace_modules(model, {part: part.base for part in self._tensors})


@dataclass
class MergeData:
    """What a merge into quantized weights is chosen and measured by.

    See :meth:`lowbit_lora.LoraModel.merge_and_unload`.
    """

    batches: Iterable | None = None
    held_out: Iterable | None = None
    method: str = "sequential"
    progress: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def check(self, into: str, quantizer: Quantizer | None) -> None:
        """TypeError or ValueError for arguments that do not go together."""
        if into == "dense" and (self.batches is not None or self.held_out is not None):
            raise ValueError("batches, held_out: expected into='quantized' with them, got into='dense'")
        if self.batches is not None and quantizer is not None:
            raise ValueError("quantizer: expected None with batches, by which the weights are chosen")
        if self.options and self.batches is None:
            raise TypeError(f"options: expected batches with them, got {', '.join(self.options)} alone")

    def split(self, model: nn.Module) -> tuple[list[inputs.Batch] | None, list[inputs.Batch], list[str]]:
        """The batches to calibrate on, those to measure on, and what is to be said of the choice."""
        batches = None if self.batches is None else inputs.checked(model, self.batches)
        if self.held_out is not None:
            held_out = list(self.held_out)
            held_out = inputs.checked(model, held_out) if held_out else []
            if not all(has_loss(model, batch) for batch in held_out):
                raise ValueError(f"held_out: expected batches with labels that {type(model).__name__} takes a loss of")
            return batches, held_out, []
        if batches is None:
            return None, [], []
        if not all(has_loss(model, batch) for batch in batches):
            return batches, [], ["recovery not measured: the batches have no labels"]
        kept, held_out = held_out_of(batches)
        if not held_out:
            return batches, [], ["recovery not measured: one batch alone; give held_out"]
        return kept, held_out, [f"the last {len(held_out)} of {len(batches)} batches were held out to measure it"]


def quantized(
    model: nn.Module,
    names: tuple[str, ...],
    safe: bool,
    dtype: torch.dtype | None,
    minimum_cosine: float,
    quantizer: Quantizer | None,
    data: MergeData,
) -> tuple[Merge, MergeReport]:
    """A merge into quantized weights, to be applied, and what it keeps.

    The arguments and errors are those of :meth:`lowbit_lora.LoraModel.merge_and_unload`.
    """
    parts = adapted_modules(model).values()
    with computing_with(parts, names), evaluating(model):
        batches, held_out, notes = data.split(model)
        report, chosen = MergeReport(notes=notes), {}
        if batches is not None:
            chosen, done = calibrate_merged(model, batches, data.method, progress=data.progress, **data.options)
            report.calibration = done
            report.notes += done.notes
        merge = Merge(model, names, safe, dtype, lambda layer: _quantizer(layer, chosen, quantizer))
        if batches is None:
            check_survivals(merge.survivals, minimum_cosine)
        report.layers = merge.survivals
        if held_out:
            adapter, labels = mean_loss(model, held_out)
            with computing_with(parts, ()):
                base, _ = mean_loss(model, held_out)
            with merge.tried():
                merged, _ = mean_loss(model, held_out)
            report.losses = Losses(base, adapter, merged, len(held_out), labels)
        if data.progress and (batches is not None or held_out):
            show(report)
    return merge, report


def _quantizer(
    layer: LoRABaseLayer, chosen: dict[nn.Parameter, QuantizedTensor], other: Quantizer | None
) -> Quantizer | None:
    """What returns the weight that was chosen for a layer; where none was, ``other``."""
    new = chosen.get(layer.stored_weight)
    return other if new is None else lambda values, old: new


def _put(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Let a module hold these parameters and buffers, given by their dotted names."""
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        owner = module.get_submodule(owner)
        (owner._buffers if key in owner._buffers else owner._parameters)[key] = tensor


def _warn_of_untying(model: nn.Module, merged: dict[Adapted, dict[str, torch.Tensor]]) -> None:
    """Warn of each weight that a layer with LoRA shares with another module."""
    owners = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, part in adapted_modules(model).items():
        if isinstance(part, LoRABaseLayer) and merged[part] and owners[part.base._parameters.get(part.weight_name)] > 1:
            warnings.warn(
                f"{name}.{part.weight_name} is tied to that of another layer; merging unties them. Set "
                "config.tie_word_embeddings = False before saving the merged model",
                stacklevel=5,
            )
