"""LoraModel and QLoRAModel: a model with adapters on it."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from . import adapters, files, merge
from .config import LoraConfig, QLoRAConfig
from .layers import DEFAULT, Adapted, LoRABaseLayer, RowAdapters
from .targets import adapted_modules
from .wrap import Plan, print_storage, set_trainable, swap

#: What ``adapter_names`` calls a row without an adapter, as in PEFT.
BASE = "__base__"


class LoraModel(nn.Module):
    """A model with LoRA on layers of its dense, frozen base.

    The base is changed in place, all of it or, on an error, nothing. Calls, ``generate`` and attributes go
    through to it.

    Args:
        model: a Hugging Face model or any nn.Module.
        config: what to adapt.
        adapter_name: of the first adapter.

    Raises:
        TypeError: an argument, or a layer that ``target_modules`` names, is of the wrong type.
        ValueError: ``target_modules`` or ``modules_to_save`` match nothing; ``model`` has adapters already.

    Source: Hu et al., "LoRA", 2021 (arXiv 2106.09685).
    """

    config_class = LoraConfig

    def __init__(self, model: nn.Module, config: LoraConfig, adapter_name: str = DEFAULT):
        _check_types(model, config, self.config_class)
        adapters.check_new_name(adapter_name, {})
        super().__init__()
        self._adopt(Plan(model, config, adapter_name))

    def _adopt(self, plan: Plan, trainable: bool = True) -> None:
        self._restore = plan.apply(trainable)
        #: The config of each adapter.
        self.configs: dict[str, LoraConfig] = {plan.name: plan.config}
        self.model = plan.model
        self._active = (plan.name,)
        self.training = self.model.training
        if isinstance(plan.config, QLoRAConfig):
            print_storage(self.model)

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
            config: what to adapt, also modules that have no adapter yet. ``bias`` belongs to the first adapter; here it
                has to be "none".

        Raises:
            ValueError, TypeError: as for the constructor; the name is taken; the config says how to store the base, and
                differently from how it is stored. Nothing has changed then.
        """
        self._add(name, config)

    def _add(self, name: str, config: LoraConfig, listed: bool = False) -> list[nn.Module]:
        """The modules that have a place for adapters only now."""
        adapters.check_new_name(name, self.configs)
        before = set(self._parts().values())
        plan = Plan(self.model, config, name, first=self._first, listed=listed)
        plan.apply()
        self.configs[name] = plan.config
        return [part for part in self._parts().values() if part not in before]

    @property
    def _first(self) -> LoraConfig:
        return next(iter(self.configs.values()))

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
        self._parts()
        names = list(self._known(list(names)))
        adapters.check_new_name(name, self.configs)
        if len(names) != len(weights):
            raise ValueError(f"weights: expected {len(names)}, one for each adapter, got {len(weights)}")
        self.configs[name] = adapters.add_weighted(
            self.model, names, list(weights), name, method=method, **options
        )

    def set_adapter(self, names: str | Iterable[str]) -> None:
        """Compute and train with these adapters, and no others; their parts are added.

        Raises:
            ValueError: there is no adapter of a name, or adapters are merged.
        """
        names = self._known([names] if isinstance(names, str) else list(names))
        parts = self._unmerged_parts().values()
        for part in parts:
            part.check_active(names)
        trains = any(p.requires_grad for part in parts for name in part.adapters for p in part.adapter_parameters(name))
        for part in parts:
            part.set_active(names)
        set_trainable(self.model, self._first, names, trains)
        self._active = names

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter that is not active.

        Raises:
            ValueError: there is none of that name, it is active, or it is the first one and trains biases.
        """
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
        """Give an adapter another name. Its parameters stay the same objects.

        Raises:
            ValueError: there is no ``old``, or there is a ``new``.
        """
        self._known([old])
        adapters.check_new_name(new, self.configs)
        for part in self._parts().values():
            if old in part.adapters:
                part.rename_adapter(old, new)
        self.configs = {new if name == old else name: config for name, config in self.configs.items()}
        self._active = tuple(new if name == old else name for name in self._active)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which the model computes what its base does. Trained biases stay in it.

        Raises:
            ValueError: adapters are merged.
        """
        active = [(part, part.active) for part in self._unmerged_parts().values()]
        try:
            for part, _ in active:
                part.set_active(())
            yield
        finally:
            for part, names in active:
                part.set_active(names)

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
            for part in self._parts().values():
                if isinstance(part, LoRABaseLayer):
                    part.merge([name for name in names if name in part.adapters], safe=safe)
                    done.append(part)
        except BaseException:
            for part in done:
                part.unmerge()
            raise

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back: the very tensors, so that stored bytes are what they were."""
        for part in self._parts().values():
            if isinstance(part, LoRABaseLayer):
                part.unmerge()

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

    def _known(self, names: list[str]) -> tuple[str, ...]:
        for name in names:
            if name not in self.configs:
                raise ValueError(f"adapter: expected one of {', '.join(self.configs)}, got {name!r}")
        return tuple(dict.fromkeys(names))

    # ---- the model

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
        """Bytes of the base as it is stored: parameters and buffers without the adapters' own, shared ones once."""
        own = {id(t) for p in adapted_modules(self.model).values() for n in p.adapters for t in p.adapter_tensors(n).values()}
        tensors = {id(tensor): tensor.nbytes for tensor in [*self.model.parameters(), *self.model.buffers()]}
        return sum(size for key, size in tensors.items() if key not in own)

    # ---- files

    def adapter_state_dict(self, name: str | None = None) -> dict[str, torch.Tensor]:
        """What the file of an adapter holds, by PEFT's keys; the tensors are the model's own.

        ``name``: the adapter; by default the active one.
        """
        (name,) = self._known([self._only_active() if name is None else name])
        tensors = adapters.tensors_of(self.model, name, self.configs[name].bias)
        return {files.PREFIX + key: tensor for key, tensor in tensors.items()}

    def _only_active(self) -> str:
        if len(self._active) != 1:
            raise ValueError(f"adapter: expected a name where {len(self._active)} are active")
        return self._active[0]

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        adapters_to_save: Iterable[str] | None = None,
        is_main_process: bool = True,
        **_: Any,
    ) -> None:
        """Write the adapters (LoRA, modules to save, trained biases), not the base, in PEFT's two files each.

        The adapter "default" goes into ``folder``, any other into a folder of its name in it, as PEFT's do. A save that
        fails leaves what was in its folder before.

        Args:
            adapters_to_save: their names; by default all.
            is_main_process: False writes nothing, for the other ranks of a distributed run.
            _: other keywords, of which Hugging Face's Trainer passes some, are ignored.

        Raises:
            OSError: the files cannot be written.
            ValueError: the adapters have been merged.
        """
        self._parts()
        names = list(self.configs) if adapters_to_save is None else self._known(list(adapters_to_save))
        for name in names if is_main_process else []:
            config, tensors = adapters.to_save(self.model, name, self.configs[name])
            files.save_adapter(self.model, config, tensors, folder if name == DEFAULT else os.path.join(folder, name))

    def load_adapter(self, folder: str | os.PathLike, name: str, *, is_trainable: bool = False) -> None:
        """Add a saved adapter, by lowbit or PEFT. It is not active: ``set_adapter(name)`` makes it so.

        Args:
            folder: what save_pretrained wrote, or a hub name.
            name: a new one, or one that is there, whose values it takes in place (hot-swapping): no memory is
                allocated anew, and what was captured in a CUDA graph or compiled computes with the new values.
            is_trainable: let it train, if it is active.

        Raises:
            OSError: files that are missing (FileNotFoundError) or broken.
            ValueError, TypeError: the adapter does not fit the model. Nothing has changed then.
        """
        config, tensors, file = files.read_adapter(folder, LoraConfig, {})
        if name in self.configs:
            adapters.swap_values(self.model, name, config, self.configs[name], tensors, file)
            return
        fresh = self._add(name, dataclasses.replace(config, bias="none"), listed=True)
        try:
            targets = adapters.tensors_of(self.model, name)
            values = files.fit(tensors, targets, self.model, file)
        except BaseException:
            self.delete_adapter(name)
            swap(self.model, {part: part.base for part in fresh if not part.adapters})
            raise
        with torch.no_grad():
            for key, target in targets.items():
                target.copy_(values[key])
        set_trainable(self.model, self._first, self._active, is_trainable or self._trains())

    def _trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | os.PathLike,
        *,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        **overrides: Any,
    ) -> "LoraModel":
        """Put a saved adapter, by lowbit or PEFT, onto ``model``.

        Args:
            model: a fresh dense base; QLoRAModel quantizes it as it was when the adapter was saved.
            folder: what save_pretrained wrote, or a hub name.
            adapter_name: the adapter's name in the model.
            is_trainable: train on; otherwise every parameter is frozen, and the model is left in eval mode.
            overrides: settings that the shapes of the adapter do not depend on: quantization, double_quant,
                block_size, scale (an adapter by PEFT says nothing of them), lora_dropout, gradient_checkpointing.

        Raises:
            OSError: files that are missing (FileNotFoundError) or broken.
            ValueError, TypeError: the adapter does not fit ``model``; nothing has been changed then.
        """
        config, tensors, file = files.read_adapter(folder, cls.config_class, overrides)
        _check_types(model, config, cls.config_class)
        config = adapters.with_saved_of_file(model, config, tensors)
        plan = Plan(model, config, adapter_name, listed=True)
        values = files.fit(tensors, plan.tensors(), model, file)
        wrapper = cls.__new__(cls)
        nn.Module.__init__(wrapper)
        wrapper._adopt(plan, is_trainable)
        with torch.no_grad():
            for key, target in adapters.tensors_of(model, adapter_name, config.bias).items():
                target.copy_(values[key])
        return wrapper if is_trainable else wrapper.eval()

    def merge_and_unload(
        self,
        names: Iterable[str] | None = None,
        *,
        into: str = "dense",
        dtype: torch.dtype | None = None,
        safe: bool = False,
        minimum_cosine: float = 0.5,
        quantizer: merge.Quantizer = merge.search_quantizer,
    ) -> nn.Module:
        """The plain model, without places for adapters, that computes W + scaling * B A.

        In place; on an error the model is as before. This wrapper is spent afterwards.

        Args:
            names: the adapters; by default the active ones.
            into: "dense": quantized weights are decoded, and their rounding stays in: the result computes what the
                adapted model computed. "quantized": the merged weights are quantized again, which loses much of what
                was trained; ``merge_report`` of this wrapper then says how much is left in each layer.
            dtype: of the merged dense weights; by default the base's.
            safe: refuse merged weights with NaN or inf.
            minimum_cosine: of into="quantized": refuse where less is left of a layer's change.
            quantizer: of into="quantized": from merged fp32 values and the old weight to the new one; by default with
                the scales that a search finds.

        Raises:
            ValueError: no adapter of a name, adapters are merged already, an unknown ``into``, a weight that is not
                finite, a cosine that is too small.
        """
        names = self._active if names is None else self._known(list(names))
        self._unmerged_parts()
        if into not in ("dense", "quantized"):
            raise ValueError(f"into: expected 'dense' or 'quantized', got {into!r}")
        self.merge_report = merge.merge_all(
            self.model,
            names,
            decode=isinstance(self._first, QLoRAConfig),
            safe=safe,
            dtype=dtype,
            quantizer=quantizer if into == "quantized" else None,
            minimum_cosine=minimum_cosine,
        )
        return self._released()

    def unload(self) -> nn.Module:
        """The base without any adapter, as it is stored. This wrapper is spent afterwards."""
        self.unmerge_adapter()
        swap(self.model, {part: part.base for part in self._parts().values()})
        return self._released()

    def _released(self) -> nn.Module:
        self._restore.apply(self.model)
        self.configs = {}
        return self.model


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
        hint = f"; write {config_class.__name__}.from_peft(config)" if hasattr(config, "peft_type") else ""
        raise TypeError(f"config: expected a {config_class.__name__}, got {type(config).__name__}{hint}")
