"""LoraModel and QLoRAModel: a model with adapters on it."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowbit import models
from lowbit.adapted import adapted_modules, buffers_of
from lowbit.checks import check_choice, check_new_name
from lowbit.modules import forget_quantization, replace_modules
from lowbit.quantizers.requantize import Quantizer

from .calibrate import CalibrationReport
from .calibrate.model import check_dense, checked_settings, choose_of_dense, split_options
from .calibrate.saving import remember
from .config import CALIBRATED, LoraConfig, QLoRAConfig
from .exchange import StoredAdapters
from .hf.trainer import SeenAsPeft, check_head_is_called
from .layers import DEFAULT, LoRABaseLayer
from .merge import Merge, MergeData, quantized
from .optim import get_paged_optimizer, parameter_groups
from .recovery import MergeReport
from .training import print_storage
from .wrap import Plan, check_base


class LoraModel(SeenAsPeft, StoredAdapters):
    """A model with LoRA on layers of its dense, frozen base.

    The base is changed in place, all of it or, on an error, nothing. Calls, ``generate`` and attributes go
    through to it; not the methods that would save the base, or change its layers (``get_base_model()`` has them).

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
        self._check(model, config, adapter_name)
        nn.Module.__init__(self)
        self._adopt(Plan(model, config, adapter_name))

    @classmethod
    def _check(cls, model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
        check_base(model)
        if not isinstance(config, cls.config_class):
            own = cls.config_class.__name__
            hint = f"; write {own}.from_peft(config)" if hasattr(config, "peft_type") else ""
            raise TypeError(f"config: expected a {own}, got {type(config).__name__}{hint}")
        check_new_name("adapter", adapter_name, {})

    def _adopt(self, plan: Plan, trainable: bool = True) -> None:
        self._restore = plan.apply(trainable)
        self._start = {name: buffer.clone() for name, buffer in buffers_of(plan.model).items()}
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
            ValueError: no adapter of a name, another number of names than rows, or adapters are merged.
        """
        if kwargs.get("fused_lm_head"):
            check_head_is_called(self.model)
        if adapter_names is None:
            return self.model(*args, **kwargs)
        sizes = [len(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim()]
        if sizes and len(adapter_names) not in sizes:
            raise ValueError(
                f"adapter_names: expected one for each of the {sizes[0]} rows of the batch, got {len(adapter_names)}"
            )
        with self.adapters_by_row(adapter_names):
            return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)  # not super(): see SeenAsPeft
        except AttributeError:
            if name == "model":  # not there yet (unpickling), or no longer: do not look for it inside itself
                raise
            if not models.passes_on(self.model, name):
                text = f"{type(self).__name__} has no attribute {name!r}; get_base_model().{name} is the base's own"
                raise AttributeError(text) from None
            return getattr(self.model, name)

    # ---- the model

    def get_base_model(self) -> nn.Module:
        """The model inside, adapters included."""
        return self.model

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that train, for an optimizer."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def optimizer_groups(
        self, lr: float, *, weight_decay: float = 0.0, lora_plus_ratio: float = 1.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer of torch's: see :func:`lowbit_lora.optim.parameter_groups`."""
        return parameter_groups(self, lr, weight_decay, lora_plus_ratio)

    def create_optimizer(self, lr: float = 2e-5, weight_decay: float = 0.01, **options: Any) -> torch.optim.Optimizer:
        """The optimizer that the config asks for: AdamW, paged with ``QLoRAConfig(paged_adamw=True)``.

        Arguments and errors are those of :func:`lowbit_lora.get_paged_optimizer`.
        """
        return get_paged_optimizer(self, lr, weight_decay, paged=getattr(self._first, "paged_adamw", False), **options)

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
        stored = {*self.model.parameters(), *self.model.buffers()}
        for part in adapted_modules(self.model).values():
            for name in part.adapters:
                stored -= set(part.adapter_tensors(name).values())
        return sum(tensor.nbytes for tensor in stored)

    def merge_and_unload(
        self,
        names: Iterable[str] | None = None,
        *,
        into: str = "dense",
        dtype: torch.dtype | None = None,
        safe: bool = False,
        minimum_cosine: float = 0.5,
        quantizer: Quantizer | None = None,
        batches: Iterable | None = None,
        held_out: Iterable | None = None,
        method: str = "sequential",
        progress: bool = True,
        **options: Any,
    ) -> nn.Module:
        """The plain model, without places for adapters, that computes W + scaling * B A.

        In place; on an error the model is as before. This wrapper is spent afterwards; its ``merge_report`` says what
        was done.

        Args:
            names: the adapters; by default the active ones.
            into: "dense": quantized weights are decoded, and their rounding stays in: the result computes what the
                adapted model computed. "quantized": the merged weights are quantized again, in the same bytes.
                Without ``batches`` this loses nearly all that was trained, as ``merge_report`` says of each layer.
                With them codes and scales are chosen so that the model's outputs stay. Quantized weights that no
                adapter changes keep their bytes.
            dtype: of the merged dense weights; by default the base's.
            safe: refuse merged weights with NaN or inf.
            minimum_cosine, quantizer: of into="quantized" without batches: refuse where less is left of a layer's
                change; from merged fp32 values and the old weight to the new one. By default a search of scales,
                weighted by what the layers saw in training after :meth:`track_input_squares`.
            batches: of into="quantized": data like that of the training, as :func:`lowbit_lora.calibrate` takes it.
            held_out: other such batches, with labels if the model is none of language, on which the share of the
                adapters' gain in loss that survives is measured (``merge_report.recovery``). By default the last fifth
                of ``batches``, which are then not calibrated on; an empty list measures nothing.
            method: with batches: "sequential", "static" or "scale", as for :func:`lowbit_lora.calibrate`.
            progress: with batches or held_out: show a bar, and print the report.
            options: with batches: damping, sweeps, shift, ridge, tokens_at_once and activations, as for
                :func:`lowbit_lora.calibrate`.

        Raises:
            TypeError, ValueError: no adapter of a name, adapters are merged already, what is refused, or batches that
                do not fit. Nothing has changed then.
            MemoryError, OSError: the system says that there is too little memory or disk; nothing has changed.
        """
        names = self._active if names is None else self._known(list(names))
        self._unmerged_parts()
        check_choice("into", into, ("dense", "quantized"))
        data = MergeData(batches, held_out, method, progress, options)
        data.check(into, quantizer)
        if into == "dense":
            merge, self.merge_report = Merge(self.model, names, safe, dtype), MergeReport()
        else:
            merge, self.merge_report = quantized(self.model, names, safe, dtype, minimum_cosine, quantizer, data)
        merge.apply(decode=isinstance(self._first, QLoRAConfig))
        plain = self._released()
        if into == "quantized":
            remember(plain, self.merge_report.calibration)
        return plain

    def unload(self) -> nn.Module:
        """The base without any adapter. This wrapper is spent afterwards.

        Raises:
            ValueError: the factors were taken out of a quantized base (PiSSA, OLoRA, LoftQ, calibrated), which holds
                what they left.
        """
        if self._first.changes_base and isinstance(self._first, QLoRAConfig):
            raise ValueError(
                f"unload: expected a base as it was, but init_lora_weights={self._first.init_lora_weights!r} took the "
                "factors out of it before it was quantized; use merge_and_unload"
            )
        self.unmerge_adapter()
        for part in self._parts().values():
            if isinstance(part, LoRABaseLayer):
                part.put_back_initial()
        replace_modules(self.model, {part: part.base for part in self._parts().values()})
        return self._released()

    def _released(self) -> nn.Module:
        self._restore.apply(self.model)
        forget_quantization(self.model)
        self.configs = {}
        return self.model


class QLoRAModel(LoraModel):
    """A model whose linear layers are stored in 4 bits, with LoRA on those that the config names.

    Heads (``lm_head``, a classifier), modules to save and weights tied to an embedding stay dense. A model that was
    loaded with :class:`lowbit_lora.LowbitConfig` keeps its weights as they are; of the config only the part about LoRA
    counts. See :class:`LoraModel` for the rest.

    Raises:
        ValueError: also where a weight to quantize holds NaN or inf; its module is named.

    Source: Dettmers et al., "QLoRA", 2023 (arXiv 2305.14314).
    """

    config_class = QLoRAConfig
    #: What :meth:`calibrated` did.
    calibration: CalibrationReport | None = None

    @classmethod
    def calibrated(
        cls,
        model: nn.Module,
        config: QLoRAConfig,
        batches: Iterable,
        method: str = "sequential",
        *,
        adapter_name: str = DEFAULT,
        **options: Any,
    ) -> "QLoRAModel":
        """A dense model, quantized by what it does with data, on which the adapter begins with what that takes away.

        So the model is nearer to the dense one before it is trained than :func:`lowbit_lora.calibrate` can make it. The
        factors of each linear layer in a block are those of :func:`lowbit.lowrank.residual_factors`, and the base is
        quantized a second time without what they hold; others begin with B at zero. Base and adapter belong together:
        ``save_base(folder)`` writes the one and ``save_pretrained(folder)`` the other, as PEFT's files; ``calibration``
        is the report.

        Args:
            model: what :func:`lowbit_lora.calibrate` takes; changed in place, all of it or, on an error, nothing.
            config: with the default ``init_lora_weights``; its ``scale`` has no say.
            batches, method: as :func:`lowbit_lora.calibrate` takes them.
            adapter_name: of the adapter.
            options: the other options of :func:`lowbit_lora.calibrate`, but spec and skip, of which the config knows.

        Raises:
            TypeError, ValueError, MemoryError, OSError: those of the constructor, and of :func:`lowbit_lora.calibrate`.
        """
        cls._check(model, config, adapter_name)
        if config.init_lora_weights != "default":
            raise ValueError(f"init_lora_weights: expected 'default', got {config.init_lora_weights!r}")
        own, others = split_options(options)
        settings = checked_settings(method, config.spec, **own)
        check_dense(model)
        reports = []

        def find(names: dict[nn.Parameter, str], ranks: dict[nn.Parameter, int]):
            found, report = choose_of_dense(model, names, batches, settings, ranks=ranks, **others)
            reports.append(report)
            starts = {weight: found.starts[name] for weight, name in names.items() if name in found.starts}
            return {weight: found.weights[name] for weight, name in names.items()}, starts

        config = dataclasses.replace(config, init_lora_weights=CALIBRATED)
        plan = Plan(model, config, adapter_name, choose=find)
        wrapper = cls.__new__(cls)
        nn.Module.__init__(wrapper)
        wrapper._adopt(plan)
        (wrapper.calibration,) = reports
        remember(model, wrapper.calibration)
        return wrapper
