"""Operations on the adapters of a model: adding, choosing, renaming, combining and merging them in place."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowbit import QuantizedTensor
from lowbit.adapted import Adapted, RowAdapters, adapted_modules
from lowbit.checks import check_new_name, named_errors
from lowbit.lowrank import combine
from lowbit.quantizers.requantize import Quantizer, Survival, check_survivals

from .config import LoraConfig
from .layers import LoRABaseLayer, LoRAExperts, LoRALinear, TrainedTokens
from .targets import lora_layers
from .training import let_train, set_trainable
from .wrap import Plan, fill_factors

#: What ``adapter_names`` calls a row without an adapter, as in PEFT.
BASE = "__base__"


class AdapterOperations(nn.Module):
    """A module with a ``model`` on which there are adapters; what :class:`~lowbit_lora.LoraModel` can do with these.

    Raises:
        ValueError: in each method, for a name of no adapter, and once the adapters are merged into the model for good.
            What an error stops has changed nothing.
    """

    model: nn.Module
    #: The config of each adapter.
    configs: dict[str, LoraConfig]
    _active: tuple[str, ...]

    @contextlib.contextmanager
    def adapters_by_row(self, adapter_names: list[str]) -> Iterator[None]:
        """Context in which each row of a batch has an adapter of its own, also in ``generate``; see :meth:`forward`."""
        self._known([name for name in adapter_names if name != BASE])
        parts = self._unmerged_parts().values()
        rows = RowAdapters.of(adapter_names, next(self.parameters()).device)
        for part in parts:
            part.rows = rows
        try:
            yield
        finally:
            for part in parts:
                part.rows = None

    @property
    def lora_config(self) -> LoraConfig:
        """The config of the first active adapter; of the first one if none is active."""
        return self.configs[self._active[0] if self._active else next(iter(self.configs))]

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The names of the adapters that the model computes with."""
        return self._active

    def add_adapter(self, name: str, config: LoraConfig) -> None:
        """Add an adapter that changes nothing yet, by a new name. It is not active: ``set_adapter(name)`` makes it so.

        ``config`` may name modules that have no adapter yet. Its ``bias`` has to be "none": biases belong to the first.

        Raises:
            ValueError, TypeError: as for the constructor; the name is taken; the config stores the base in another way.
        """
        self._add(name, config)

    def _add(self, name: str, config: LoraConfig, listed: bool = False) -> list[nn.Module]:
        """As :meth:`add_adapter`; returns the places for adapters that are new."""
        check_new_name("adapter", name, self.configs)
        self._parts()
        plan = Plan(self.model, config, name, first=self._first, listed=listed)
        plan.apply()
        self.configs[name] = plan.config
        return list(plan.fresh.values())

    @property
    def _first(self) -> LoraConfig:
        return next(iter(self.configs.values()))

    def add_weighted_adapter(
        self,
        names: list[str],
        weights: list[float],
        name: str,
        method: str = "cat",
        *,
        saved_from: str | None = None,
        **options: Any,
    ) -> None:
        """Add an adapter that stands for several, each times its weight. It is not active.

        Args:
            names: the adapters.
            weights: a number for each; may be negative.
            name: a new one.
            method: "cat" (exact; the ranks add up), "svd", "linear", "ties", "dare_linear", "dare_ties",
                "magnitude_prune", or one of the last four with "_svd": see :mod:`lowbit.lowrank`.
            saved_from: the one of them whose modules to save (the head) the new one gets copies of; by default the
                first that has any. Such modules are trained whole, and have no weighted sum that fits.
            options: rank, density, majority_sign and generator, as in :mod:`lowbit.lowrank`.

        Raises:
            ValueError, TypeError: an argument out of range.
        """
        self._parts()
        names = list(self._known(names))
        check_new_name("adapter", name, self.configs)
        if len(names) != len(weights):
            raise ValueError(f"weights: expected {len(names)}, one for each adapter, got {len(weights)}")
        if saved_from is not None and saved_from not in names:
            raise ValueError(f"saved_from: expected one of {', '.join(names)}, got {saved_from!r}")
        self.configs[name] = add_weighted(self.model, names, list(weights), name, saved_from, method=method, **options)

    def set_adapter(self, names: str | Iterable[str]) -> None:
        """Compute and train with these adapters, and no others; their parts are added. ValueError while merged."""
        names = self._known([names] if isinstance(names, str) else names)
        parts = self._unmerged_parts().values()
        for part in parts:
            part.check_active(names)
        trains = any(p.requires_grad for part in parts for name in part.adapters for p in part.adapter_parameters(name))
        for part in parts:
            part.set_active(names)
        set_trainable(self.model, self._first, names, trains)
        self._active = names

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter. ValueError if it is active, or is the first one and trains biases."""
        self._known([name])
        if name in self._active:
            others = ", ".join(other for other in self.configs if other != name) or "none"
            raise ValueError(f"adapter: expected one that is not active, got {name!r}; set_adapter one of: {others}")
        if self.configs[name].bias != "none":
            raise ValueError(f"adapter: {name!r} trained biases, which stay in the model; keep it")
        for part in self._parts().values():
            if name in part.adapters:
                part.delete_adapter(name)
        del self.configs[name]

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name, a new one. Its parameters stay the same objects."""
        self._known([old])
        check_new_name("adapter", new, self.configs)
        for part in self._parts().values():
            if old in part.adapters:
                part.rename_adapter(old, new)
        self.configs = {new if name == old else name: config for name, config in self.configs.items()}
        self._active = tuple(new if name == old else name for name in self._active)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which the model computes what its base does, with trained biases. ValueError while merged."""
        with computing_with(self._unmerged_parts().values(), ()):
            yield

    def merge_adapter(
        self,
        names: Iterable[str] | None = None,
        *,
        safe: bool = False,
        into: str = "dense",
        minimum_cosine: float = 0.5,
        quantizer: Quantizer | None = None,
    ) -> list[Survival]:
        """Put the merged weights into the base layers, until :meth:`unmerge_adapter`.

        The arguments and errors are those of :meth:`lowbit_lora.LoraModel.merge_and_unload`. Returns how much is left
        of the change of each layer that is quantized again.
        """
        names = self._active if names is None else self._known(names)
        options = {"safe": safe, "into": into, "minimum_cosine": -1.0, "quantizer": quantizer}
        layers = lora_layers(self._unmerged_parts())
        try:
            for layer_name, layer in layers.items():
                with named_errors(layer_name):
                    layer.merge([name for name in names if name in layer.adapters], **options)
            survivals = [replace(one.survival, name=name) for name, one in layers.items() if one.survival is not None]
            check_survivals(survivals, minimum_cosine)
        except BaseException:
            self.unmerge_adapter()
            raise
        return survivals

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back: the very tensors, so that stored bytes are what they were."""
        for layer in lora_layers(self._parts()).values():
            layer.unmerge()

    def track_input_squares(self, on: bool = True) -> None:
        """Keep what linear layers with LoRA see in training: the mean square of each input channel, in fp32.

        Off by default. ``merge_and_unload(into="quantized")`` without batches then weights its search of scales by
        these. They live as long as this model does; no file holds them.
        """
        for layer in lora_layers(self._parts()).values():
            if isinstance(layer, LoRALinear) and isinstance(layer.stored_weight, QuantizedTensor):
                layer.track_input_squares(on)

    def _parts(self) -> dict[str, Adapted]:
        """What holds adapters, by canonical name."""
        if not self.configs:
            raise ValueError("the adapters have been merged into the model, or unloaded: there are none any more")
        return adapted_modules(self.model)

    def _unmerged_parts(self) -> dict[str, Adapted]:
        parts = self._parts()
        for part in parts.values():
            if part.merged:
                raise ValueError(f"adapters: expected none that is merged, got {', '.join(part.merged)}; unmerge first")
        return parts

    def _known(self, names: Iterable[str]) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(names))
        for name in names:
            if name not in self.configs:
                raise ValueError(f"adapter: expected one of {', '.join(self.configs)}, got {name!r}")
        return names


@contextlib.contextmanager
def computing_with(parts: Iterable[Adapted], names: Iterable[str]) -> Iterator[None]:
    """Context in which these adapters are the active ones of what holds them."""
    before = [(part, part.active) for part in parts]
    try:
        for part, _ in before:
            part.set_active(names)
        yield
    finally:
        for part, active in before:
            part.set_active(active)


@torch.no_grad()
def add_weighted(
    model: nn.Module, names: list[str], weights: list[float], new: str, saved_from: str | None = None, **options
) -> LoraConfig:
    """Add an adapter that stands for several to each layer that has one of them; returns its config.

    A layer without an adapter leaves that out of its sum. The arguments and errors are those of
    :meth:`AdapterOperations.add_weighted_adapter`; errors name the layer.
    """
    parts = adapted_modules(model)
    layers = lora_layers(parts)
    made = {}
    for layer_name, layer in layers.items():
        own = {name: weight for name, weight in zip(names, weights, strict=True) if name in layer.adapters}
        if own:
            with named_errors(layer_name):
                made[layer_name] = _combined(layer, own, options)
    for layer_name, (lora_a, lora_b) in made.items():
        layer, rank = layers[layer_name], len(lora_a)
        dtype = next(layer.factors(name)[0].dtype for name in names if name in layer.adapters)
        layer.add_adapter(new, layer.adapter_type(rank, rank), dtype)
        fill_factors(layer, new, lora_a, lora_b / layer.adapters[new].scaling)
    saved, rows = [], {}
    for module_name, part in parts.items():
        source = next((name for name in ([saved_from] if saved_from else names) if name in part.adapters), None)
        if module_name in layers or source is None:
            continue
        if isinstance(part, TrainedTokens):
            rows[module_name] = part.adapters[source].tolist()
            part.add_adapter(new, rows[module_name])
        else:
            saved.append(module_name)
            part.add_adapter(new)
        for key, target in part.adapter_tensors(new).items():
            target.copy_(part.adapter_tensors(source)[key])
    let_train(parts.values(), new, False)
    # The config names an attention layer once, for both of its parts.
    nested = {f"{name}.{key}" for name, layer in layers.items() for key in layer.nested()}
    ranks = {name: len(lora_a) for name, (lora_a, _) in made.items() if name not in nested}
    rank = max(ranks.values())
    others = {name: value for name, value in ranks.items() if value != rank}
    return LoraConfig(
        rank=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=others,
        modules_to_save=saved or None,
        trainable_token_indices=rows or None,
    )


def _combined(layer: LoRABaseLayer, weights: dict[str, float], options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """``(A, B)`` for a layer's adapters, each times its weight."""
    if isinstance(layer, LoRAExperts):
        raise ValueError("expected adapters without target_parameters to combine, as in PEFT")
    if any(layer.adapters[name].use_dora or layer.adapters[name].lora_bias for name in weights):
        raise ValueError("expected adapters without DoRA and lora_bias to combine")
    factors = [(*(f.flatten(1) for f in layer.factors(name)), layer.adapters[name].scaling) for name in weights]
    return combine(factors, [*weights.values()], **options)
