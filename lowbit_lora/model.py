"""LoraModel and QLoRAModel: a model with adapters on it."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from . import adapters, saving
from .config import LoraConfig, QLoRAConfig
from .conversion import Conversion, merge_all
from .layers import DEFAULT, LoRABaseLayer, RowAdapters

#: What ``adapter_names`` calls a row without an adapter, as in PEFT.
BASE = "__base__"


class LoraModel(nn.Module):
    """A model with LoRA on its dense, frozen linear layers.

    The base is changed in place, all of it or, on an error, nothing. Calls, ``generate`` and attributes go
    through to it.

    Args:
        model: a Hugging Face model or any nn.Module.
        config: what to adapt.

    Raises:
        TypeError: an argument, or a layer that ``target_modules`` names, is of the wrong type.
        ValueError: ``target_modules`` or ``modules_to_save`` match nothing; ``model`` has adapters already.

    Source: Hu et al., "LoRA", 2021 (arXiv 2106.09685).
    """

    config_class = LoraConfig

    def __init__(self, model: nn.Module, config: LoraConfig):
        _check_types(model, config, self.config_class)
        super().__init__()
        self._adopt(Conversion(model, config))

    def _adopt(self, conversion: Conversion, trainable: bool = True) -> None:
        self._restore = conversion.apply(trainable)
        #: The config of each adapter.
        self.configs: dict[str, LoraConfig] = {DEFAULT: conversion.config}
        self.model = conversion.model
        self._adapted = list(conversion.layers)
        self._active = (DEFAULT,)
        self._saved = list(conversion.saved)
        self.training = self.model.training

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """What the base's forward takes and returns.

        Args:
            adapter_names: for each row of the batch the adapter it is for, or "__base__" (PEFT's name) for none. All
                rows share one product with each weight of the base. Gradients reach each adapter from its rows.

        Raises:
            ValueError: no adapter of a name, or adapters are merged.
        """
        if adapter_names is None:
            return self.model(*args, **kwargs)
        with self.adapters_by_row(adapter_names):
            return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def adapters_by_row(self, adapter_names: list[str]) -> Iterator[None]:
        """Context in which each row of a batch has an adapter of its own, also in ``generate``; see :meth:`forward`."""
        names = self._known(sorted({name for name in adapter_names if name != BASE}))
        layers = self._layers()
        for layer in layers:
            adapters.check_not_merged(layer)
        names = (*names, BASE)
        index = torch.tensor([names.index(name) for name in adapter_names], device=next(self.parameters()).device)
        for layer in layers:
            layer.rows = RowAdapters(names, index)
        try:
            yield
        finally:
            for layer in layers:
                layer.rows = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet (unpickling), or no longer: do not look for it inside itself
                raise
            return getattr(self.model, name)

    # ---- adapters

    @property
    def lora_config(self) -> LoraConfig:
        """The config of the first active adapter; of the first one if none is active."""
        return self.configs[self._active[0] if self._active else next(iter(self.configs))]

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The names of the adapters that the model computes with."""
        return self._active

    def add_adapter(self, name: str, config: LoraConfig) -> None:
        """Add an adapter that changes nothing yet. It is not active: ``set_adapter(name)`` makes it so.

        Args:
            name: a new one.
            config: what to adapt, also layers that have no adapter yet. ``modules_to_save`` and ``bias`` belong to the
                first adapter; here they have to be unset.

        Raises:
            ValueError, TypeError: as for the constructor; the name is taken; the config says how to store the base, and
                differently from how it is stored. Nothing has changed then.
        """
        self._parts()
        config = adapters.add(self.model, name, config, self.configs)
        self.configs[name] = config
        self._adapted += [new for new in adapters.layer_names(self.model) if new not in self._adapted]

    def add_weighted_adapter(
        self, names: list[str], weights: list[float], name: str, method: str = "cat", **options: Any
    ) -> None:
        """Add an adapter that stands for several, each times its weight. It is not active.

        Args:
            names: the adapters.
            weights: a number for each; may be negative.
            name: a new one.
            method: "cat" (exact; the ranks add up), "svd", "linear", "ties", "dare_linear", "dare_ties",
                "magnitude_prune", or one of the last four with "_svd": see :mod:`lowbit_lora.combine`.
            options: rank, density, majority_sign and generator, as there.

        Raises:
            ValueError, TypeError: an argument out of range; no adapter of a name. Nothing has changed then.
        """
        names = self._known(list(names))
        adapters.check_new_name(name, self.configs)
        if len(names) != len(weights):
            raise ValueError(f"weights: expected {len(names)}, one for each adapter, got {len(weights)}")
        layers = self._parts()[0]
        self.configs[name] = adapters.add_weighted(
            layers, list(names), list(weights), name, self.lora_config, method=method, **options
        )

    def set_adapter(self, names: str | Iterable[str]) -> None:
        """Compute and train with these adapters, and no others; their parts are added.

        Raises:
            ValueError: there is no adapter of a name, or adapters are merged.
        """
        names = self._known([names] if isinstance(names, str) else list(names))
        for layer in self._layers():
            adapters.check_not_merged(layer)
        trains = any(p.requires_grad for layer in self._layers() for p in adapters.parameters(layer))
        for layer in self._layers():
            layer.set_active(names)
            for name in layer.adapters:
                for parameter in layer.factors(name):
                    parameter.requires_grad_(trains and name in names)
        self._active = names

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter that is not active.

        Raises:
            ValueError: there is none of that name, it is active, or it is the first one while that holds modules to
                save or biases.
        """
        self._known([name])
        if name in self._active:
            others = ", ".join(other for other in self.configs if other != name) or "none"
            raise ValueError(f"adapter: expected one that is not active, got {name!r}; set_adapter one of: {others}")
        if self.configs[name].modules_to_save or self.configs[name].bias != "none":
            raise ValueError(f"adapter: {name!r} trained whole modules or biases, which stay in the model; keep it")
        for layer in self._layers():
            if name in layer.adapters:
                layer.delete_adapter(name)
        del self.configs[name]

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name. Its parameters stay the same objects.

        Raises:
            ValueError: there is no ``old``, or there is a ``new``.
        """
        self._known([old])
        adapters.check_new_name(new, self.configs)
        for layer in self._layers():
            if old in layer.adapters:
                layer.rename_adapter(old, new)
        self.configs = {new if name == old else name: config for name, config in self.configs.items()}
        self._active = tuple(new if name == old else name for name in self._active)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which the model computes what its base does. Modules to save and trained biases stay in it.

        Raises:
            ValueError: adapters are merged.
        """
        active = [(layer, layer.active) for layer in self._layers()]
        for layer, _ in active:
            adapters.check_not_merged(layer)
        try:
            for layer, _ in active:
                layer.set_active(())
            yield
        finally:
            for layer, names in active:
                layer.set_active(names)

    def merge_adapter(self, names: Iterable[str] | None = None, *, safe: bool = False) -> None:
        """Put the merged, dense weights into the base layers, until :meth:`unmerge_adapter`.

        Args:
            names: the adapters; by default the active ones.
            safe: refuse weights with NaN or inf.

        Raises:
            ValueError: adapters are merged already; no adapter of a name; a weight that is not finite. Nothing has
                changed then.
        """
        names = self._active if names is None else self._known(list(names))
        done = []
        try:
            for layer in self._layers():
                layer.merge([name for name in names if name in layer.adapters], safe=safe)
                done.append(layer)
        except BaseException:
            for layer in done:
                layer.unmerge()
            raise

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back: the very tensors, so that stored bytes are what they were."""
        for layer in self._layers():
            layer.unmerge()

    def _layers(self) -> list[LoRABaseLayer]:
        return list(self._parts()[0].values())

    def _known(self, names: list[str]) -> tuple[str, ...]:
        for name in names:
            if name not in self.configs:
                raise ValueError(f"adapter: expected one of {', '.join(self.configs)}, got {name!r}")
        return tuple(dict.fromkeys(names))

    def get_base_model(self) -> nn.Module:
        """The model inside, adapters included."""
        return self.model

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that train, for an optimizer."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def count_parameters(self) -> tuple[int, int]:
        """``(trainable, all)``; a 4-bit weight counts as the number of weights it stores."""
        trainable = sum(parameter.numel() for parameter in self.trainable_parameters())
        return trainable, sum(parameter.numel() for parameter in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words."""
        trainable, total = self.count_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable%: {100 * trainable / max(total, 1):.4f}"
        )

    def memory_footprint(self) -> int:
        """Bytes of the base as it is stored: parameters and buffers without LoRA, shared ones once."""
        tensors = {
            id(tensor): tensor.nbytes
            for source in (self.model.named_parameters(), self.model.named_buffers())
            for name, tensor in source
            if ".lora_" not in name
        }
        return sum(tensors.values())

    def save_pretrained(self, folder: str | os.PathLike, **_: Any) -> None:
        """Write the adapters (LoRA, modules to save, trained biases), not the base, in PEFT's two files each.

        The adapter "default" goes into ``folder``, any other into a folder of its name in it, as PEFT's do; each has
        the modules to save with it. A save that fails leaves what was in its folder before. Keywords (Hugging Face's
        Trainer passes some) are ignored.

        Raises:
            OSError: the files cannot be written.
            ValueError: the adapters have been merged.
        """
        layers, saved = self._parts()
        first = next(iter(self.configs.values()))
        for name, config in self.configs.items():
            config = dataclasses.replace(config, modules_to_save=first.modules_to_save, task_type=first.task_type)
            own_folder = folder if name == DEFAULT else os.path.join(folder, name)
            saving.save_adapter(self.model, config, layers, saved, own_folder, name)

    def load_adapter(self, folder: str | os.PathLike, name: str) -> None:
        """Add a saved adapter, by lowbit or PEFT. It is not active: ``set_adapter(name)`` makes it so.

        Args:
            folder: what save_pretrained wrote, or a hub name.
            name: a new one.

        Raises:
            OSError: files that are missing (FileNotFoundError) or broken.
            ValueError, TypeError: the adapter does not fit the model, or its modules to save hold other values than the
                model's, which has one set of them. Nothing has changed then.
        """
        adapters.check_new_name(name, self.configs)
        config, tensors, file = saving.read_adapter(folder, LoraConfig, {})
        before = len(self._adapted)
        self.add_adapter(name, dataclasses.replace(config, modules_to_save=None))
        try:
            layers, saved = self._parts()
            own_saved = saved if config.modules_to_save else {}
            values = saving.fit(tensors, self.model, layers, own_saved, "none", file, name)
            targets = saving.adapter_tensors(self.model, layers, own_saved, "none", name)
            factors = {key: target for key, target in targets.items() if ".lora_" in key}
            for key in targets.keys() - factors.keys():
                if not torch.equal(values[key].to(targets[key]), targets[key]):
                    raise ValueError(
                        f"{file}: {key}: expected the model's own values: it has one head for all adapters"
                    )
        except BaseException:
            self.delete_adapter(name)
            adapters.unwrap(self.model, self._adapted[before:])
            del self._adapted[before:]
            raise
        with torch.no_grad():
            for key, target in factors.items():
                target.copy_(values[key])

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, folder: str | os.PathLike, *, is_trainable: bool = False, **overrides: Any
    ) -> "LoraModel":
        """Put a saved adapter, by lowbit or PEFT, onto ``model``.

        Args:
            model: a fresh dense base; QLoRAModel quantizes it as it was when the adapter was saved.
            folder: what save_pretrained wrote, or a hub name.
            is_trainable: train on; otherwise every parameter is frozen.
            overrides: settings that the shapes of the adapter do not depend on: quantization, double_quant,
                block_size, scale (an adapter by PEFT says nothing of them), lora_dropout, gradient_checkpointing.

        Raises:
            OSError: files that are missing (FileNotFoundError) or broken.
            ValueError, TypeError: the adapter does not fit ``model``; nothing has been changed then.
        """
        config, tensors, file = saving.read_adapter(folder, cls.config_class, overrides)
        _check_types(model, config, cls.config_class)
        conversion = Conversion(model, config, automatic_head=False)
        layers, saved, bias = conversion.layers, conversion.saved, config.bias
        values = saving.fit(tensors, model, layers, saved, bias, file)
        wrapper = cls.__new__(cls)
        nn.Module.__init__(wrapper)
        wrapper._adopt(conversion, is_trainable)
        with torch.no_grad():
            for key, target in saving.adapter_tensors(model, *wrapper._parts(), bias).items():
                target.copy_(values[key])
        return wrapper

    def merge_and_unload(self) -> nn.Module:
        """The plain model with nn.Linear layers that hold W + scaling * B A, in the base's own dtypes.

        In place; on an error the model is as before. This wrapper is spent afterwards. The rounding of the
        4-bit weight stays in: the result computes what the adapted model computed.
        """
        self._parts()
        merge_all(self.model, decode=isinstance(self.lora_config, QLoRAConfig))
        self._restore.apply(self.model)
        self._adapted = None
        return self.model

    def _parts(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """``(layers with LoRA, modules to save)``, by canonical name."""
        if self._adapted is None:
            raise ValueError("the adapters have been merged into the model: there are none any more")
        get = self.model.get_submodule
        return {name: get(name) for name in self._adapted}, {name: get(name) for name in self._saved}


class QLoRAModel(LoraModel):
    """A model whose linear layers are stored in 4 bits, with LoRA on those that the config names.

    Heads (``lm_head``, a classifier), modules to save and weights tied to an embedding stay dense. See
    :class:`LoraModel` for the rest.

    Raises:
        ValueError: also where a weight to quantize holds NaN or inf; its module is named.

    Source: Dettmers et al., "QLoRA", 2023 (arXiv 2305.14314).
    """

    config_class = QLoRAConfig


def _check_types(model: Any, config: Any, config_class: type) -> None:
    if isinstance(model, LoraModel):
        raise ValueError(
            f"model: expected one without adapters, got a {type(model).__name__}; call merge_and_unload() first"
        )
    if not isinstance(config, config_class):
        raise TypeError(f"config: expected a {config_class.__name__}, got {type(config).__name__}")
