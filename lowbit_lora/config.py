"""What to adapt and how: LoraConfig, QLoRAConfig, and their form in PEFT's ``adapter_config.json``."""

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lowbit import WeightSpec
from lowbit.quantizers.quantize import check_scale

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
        lora_alpha: scaling is lora_alpha / rank.
        lora_dropout: probability of zeroing an input element of A while training, in [0, 1).
        bias: which biases train: "none", "all", or "lora_only" (those of layers with LoRA).
        use_rslora: scaling is lora_alpha / sqrt(rank) (Kalajdzievski, 2023, arXiv 2312.03732).
        modules_to_save: modules that train in full precision and are saved with the adapter. The
            classification head of a sequence or token classification model is added by itself.
        gradient_checkpointing: recompute activations in the backward (Hugging Face models).
        task_type: PEFT's name of the task ("SEQ_CLS", "CAUSAL_LM"...), only written to the file.

    Raises:
        ValueError, TypeError: an argument out of range, named with what was expected.

    Source: Hu et al., "LoRA", 2021 (arXiv 2106.09685).
    """

    rank: int = 8
    target_modules: str | list[str] = "all-linear"
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    gradient_checkpointing: bool = False
    task_type: str | None = None

    def __post_init__(self):
        check_lora_options(self.rank, self.lora_alpha, self.lora_dropout)
        if self.bias not in BIAS_MODES:
            raise ValueError(f"bias: expected one of {', '.join(BIAS_MODES)}, got {self.bias!r}")
        if not isinstance(self.target_modules, str):
            self.target_modules = _names("target_modules", self.target_modules)
        if not self.target_modules:
            raise ValueError("target_modules: expected names, a regular expression or 'all-linear', got nothing")
        if self.modules_to_save is not None:
            self.modules_to_save = _names("modules_to_save", self.modules_to_save)

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
            "bias": self.bias,
            "use_rslora": self.use_rslora,
            "modules_to_save": self.modules_to_save,
            "task_type": self.task_type,
            "base_model_name_or_path": None,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
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
        return cls(rank=written["r"], **taken, **ours)


_SAME_IN_PEFT = ("target_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save", "task_type")
_READ_FROM_PEFT = {"peft_type", "r", *_SAME_IN_PEFT}
# Settings of PEFT that do not change what a finished adapter computes. An adapter with any other that is set (DoRA,
# rank_pattern, something newer than this file) would compute something else than it was trained for.
# fmt: off
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "init_lora_weights", "lora_ga_config",
    "layers_pattern", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
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


def _names(argument: str, names: Any) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{argument}: expected a list of names, got {names!r}")
    names = sorted(names) if isinstance(names, (set, frozenset)) else list(names)
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"{argument}: expected a list of non-empty strings, got {names!r}")
    return names
