"""What to adapt and how: LoraConfig, QLoRAConfig, and their form in PEFT's ``adapter_config.json``."""

import contextlib
import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lowbit import WeightSpec
from lowbit.quantizers.quantize import check_scale

from .init import RANDOM_METHODS

BIAS_MODES = ("none", "all", "lora_only")


class QuantizationType(str, enum.Enum):
    """How the frozen weights are stored."""

    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"


@dataclass
class LoraConfig:
    """LoRA: a frozen weight W becomes W + scaling * B A, with A [rank, in] and B [out, rank].

    Args:
        rank: columns of B; at least 1.
        target_modules: which linear layers get LoRA: a list of names or dotted suffixes ("query",
            "attention.self.query"), one string as a regular expression that the whole name has to match, or
            "all-linear" (every linear layer but the output head).
        exclude_modules: of the layers that target_modules names, those that get no LoRA: names or suffixes in a list,
            or a regular expression.
        layers_to_transform: numbers of the blocks that get LoRA; the number is the first one in a layer's name
            ("model.layers.3.self_attn.q_proj" is in block 3).
        layers_pattern: names of the list of blocks ("layers"), where other numbers come first.
        rank_pattern: the rank of layers whose name, a suffix of it, or a regular expression for it is a key; the first
            key that matches counts.
        alpha_pattern: the same for lora_alpha.
        lora_alpha: scaling is lora_alpha / rank.
        lora_dropout: probability of zeroing an input element of A while training, in [0, 1).
        bias: which biases train: "none", "all", or "lora_only" (those of layers with LoRA).
        use_rslora: scaling is lora_alpha / sqrt(rank) (Kalajdzievski, 2023, arXiv 2312.03732).
        modules_to_save: modules that train in full precision and are saved with the adapter. The
            classification head of a sequence or token classification model is added by itself.
        init_lora_weights: how the factors begin: "default" (B is zero), "gaussian", "orthogonal" (B A is zero), or
            "random" (B A is not); see :func:`lowbit_lora.init.initial_factors`.
        gradient_checkpointing: recompute activations in the backward (Hugging Face models).
        task_type: PEFT's name of the task ("SEQ_CLS", "CAUSAL_LM"...), only written to the file.

    Raises:
        ValueError, TypeError: an argument out of range, named with what was expected.

    Source: Hu et al., "LoRA", 2021 (arXiv 2106.09685).
    """

    rank: int = 8
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: str = "default"
    gradient_checkpointing: bool = False
    task_type: str | None = None

    def __post_init__(self):
        check_lora_options(self.rank, self.lora_alpha, self.lora_dropout)
        if self.init_lora_weights not in RANDOM_METHODS:
            expected = ", ".join(RANDOM_METHODS)
            raise ValueError(f"init_lora_weights: expected one of {expected}, got {self.init_lora_weights!r}")
        ranks = [self.rank, *(self.rank_pattern or {}).values()]
        if self.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
            raise ValueError(f"rank: expected even ranks for init_lora_weights='orthogonal', got {ranks}")
        if self.bias not in BIAS_MODES:
            raise ValueError(f"bias: expected one of {', '.join(BIAS_MODES)}, got {self.bias!r}")
        if not isinstance(self.target_modules, str):
            self.target_modules = _names("target_modules", self.target_modules)
        if not self.target_modules:
            raise ValueError("target_modules: expected names, a regular expression or 'all-linear', got nothing")
        if self.modules_to_save is not None:
            self.modules_to_save = _names("modules_to_save", self.modules_to_save)
        if self.exclude_modules is not None and not isinstance(self.exclude_modules, str):
            self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        if isinstance(self.layers_pattern, str):
            self.layers_pattern = [self.layers_pattern]
        self.layers_pattern = self.layers_pattern or None
        if self.layers_to_transform is not None:
            self.layers_to_transform = _numbers("layers_to_transform", self.layers_to_transform)
        elif self.layers_pattern:
            raise ValueError("layers_pattern: expected only together with layers_to_transform")
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if not isinstance(pattern or {}, dict):
                raise TypeError(f"{name}: expected a dictionary from names of layers to numbers, got {pattern!r}")
            for key, value in (pattern or {}).items():
                rank, alpha = (value, self.lora_alpha) if name == "rank_pattern" else (self.rank, value)
                with _named(f"{name}[{key!r}]"):
                    check_lora_options(rank, alpha, self.lora_dropout)
            setattr(self, name, dict(pattern) if pattern else None)

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return lora_scaling(self.rank, self.lora_alpha, self.use_rslora)

    def to_peft(self) -> dict[str, Any]:
        """The dictionary of ``adapter_config.json``."""
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
            "exclude_modules": self.exclude_modules,
            "layers_to_transform": self.layers_to_transform,
            "layers_pattern": self.layers_pattern,
            "rank_pattern": self.rank_pattern or {},
            "alpha_pattern": self.alpha_pattern or {},
            "bias": self.bias,
            "use_rslora": self.use_rslora,
            "modules_to_save": self.modules_to_save,
            "task_type": self.task_type,
            "base_model_name_or_path": None,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": {"default": True, "random": False}.get(self.init_lora_weights, self.init_lora_weights),
        }

    @classmethod
    def from_peft(cls, written: dict[str, Any], **ours: Any) -> "LoraConfig":
        """From the dictionary of an ``adapter_config.json``, by lowbit or PEFT; ``ours``: what PEFT has not.

        Raises:
            ValueError: not a LoRA adapter, or one that uses what is not supported here.
        """
        if written.get("peft_type") != "LORA":
            raise ValueError(f"peft_type: expected 'LORA', got {written.get('peft_type')!r}")
        for name, value in written.items():
            if name not in _READ_FROM_PEFT and name not in _WITHOUT_EFFECT and value:
                raise ValueError(f"{name}: not supported by lowbit, expected it unset, got {value!r}")
        if written.get("init_lora_weights", True) not in _PLAIN_INITS:
            raise ValueError(
                f"init_lora_weights: expected one of {_PLAIN_INITS} (others change the base's weights), got "
                f"{written['init_lora_weights']!r}"
            )
        if "r" not in written or not written.get("target_modules"):
            raise ValueError(f"adapter config: expected r and target_modules, got keys {sorted(written)}")
        taken = {name: written[name] for name in _SAME_IN_PEFT if written.get(name) is not None}
        if written.get("layers_to_transform") is not None:
            taken["layers_pattern"] = written.get("layers_pattern") or None
        init = {True: "default", False: "random"}.get(written.get("init_lora_weights", True))
        init = init or written["init_lora_weights"]
        taken["init_lora_weights"] = init if init in RANDOM_METHODS else "default"
        return cls(rank=written["r"], **taken, **ours)


_SAME_IN_PEFT = ("target_modules", "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern")
_SAME_IN_PEFT += ("lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save", "task_type")
_READ_FROM_PEFT = {"peft_type", "r", *_SAME_IN_PEFT}
# Settings of PEFT that do not change what a finished adapter computes. An adapter with any other that is set (DoRA,
# lora_bias, something newer than this file) would compute something else than it was trained for.
# fmt: off
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config",
}
# fmt: on
# Ways to initialise that leave the base's weights alone.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass
class QLoRAConfig(LoraConfig):
    """LoRA on weights stored in 4 bits, or in 8; the arguments of :class:`LoraConfig` and:

    Args:
        quantization: a QuantizationType or its name: NF4, FP4, INT8 (8 bits, one scale a row).
        double_quant: store the block scales in 8 bits; INT8 ignores it.
        block_size: weights that share a scale; power of two, 32 to 4096; INT8 ignores it.
        scale: how scales are found, as in :func:`lowbit.quantize`: "absmax", or "search" (not INT8), which takes longer
            and leaves a smaller error.
        paged_adamw: to come, with ``get_paged_optimizer``.

    Raises:
        ValueError, TypeError: an argument out of range.
        NotImplementedError: paged_adamw.

    Source: Dettmers et al., "QLoRA", 2023 (arXiv 2305.14314).
    """

    quantization: QuantizationType = QuantizationType.NF4
    double_quant: bool = True
    block_size: int = 64
    scale: str = "absmax"
    paged_adamw: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.quantization = check_quantization(self.quantization)
        check_scale(self.scale, self.spec)
        if self.paged_adamw:
            raise NotImplementedError("paged_adamw: the paged optimizer is not implemented yet; expected False")

    @property
    def spec(self) -> WeightSpec:
        """How a weight is stored."""
        return WeightSpec(self.quantization.value, self.block_size, self.double_quant)

    def quantize_options(self) -> dict[str, Any]:
        """The keywords of :func:`lowbit.quantize` that store a weight so."""
        spec = self.spec
        return {
            "format": spec.format,
            "block_size": spec.block_size,
            "double_quant": spec.double_quant,
            "scale": self.scale,
        }

    def quantization_settings(self) -> dict[str, Any]:
        """The fields that PEFT's file has no place for, ready for JSON."""
        return {
            "quantization": self.quantization.value,
            "double_quant": self.double_quant,
            "block_size": self.block_size,
            "scale": self.scale,
        }


def check_lora_options(rank: int, lora_alpha: float, lora_dropout: float) -> None:
    """TypeError/ValueError unless rank >= 1, lora_alpha is finite and positive, and dropout is in [0, 1)."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank: expected an int, got {rank!r}")
    if rank <= 0:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)):
        raise TypeError(f"lora_alpha: expected a number, got {lora_alpha!r}")
    if not (math.isfinite(lora_alpha) and lora_alpha > 0):
        raise ValueError(f"lora_alpha: expected a positive number, got {lora_alpha!r}")
    if isinstance(lora_dropout, bool) or not isinstance(lora_dropout, (int, float)):
        raise TypeError(f"lora_dropout: expected a number, got {lora_dropout!r}")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout: expected a probability in [0, 1), got {lora_dropout!r}")


def check_quantization(quantization: "QuantizationType | str") -> QuantizationType:
    """The QuantizationType of a name; ValueError if unknown."""
    try:
        return QuantizationType(quantization.lower() if isinstance(quantization, str) else quantization)
    except (ValueError, AttributeError) as error:
        names = ", ".join(member.name for member in QuantizationType)
        raise ValueError(f"quantization: expected one of {names}, got {quantization!r}") from error


def lora_scaling(rank: int, lora_alpha: float, use_rslora: bool) -> float:
    """lora_alpha / rank, or lora_alpha / sqrt(rank) for rank-stabilised LoRA."""
    return lora_alpha / (math.sqrt(rank) if use_rslora else rank)


@contextlib.contextmanager
def _named(where: str):
    """Context that puts the name of a setting before what is wrong with it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None


def _numbers(argument: str, numbers: Any) -> list[int]:
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise ValueError(f"{argument}: expected numbers of blocks from 0 on, got {numbers!r}")
    return numbers


def _names(argument: str, names: Any) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{argument}: expected a list of names, got {names!r}")
    names = sorted(names) if isinstance(names, (set, frozenset)) else list(names)
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"{argument}: expected a list of non-empty strings, got {names!r}")
    return names
