"""What to adapt and how: LoraConfig, QLoRAConfig, and their form in PEFT's ``adapter_config.json``."""

import enum
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from lowbit import WeightSpec, checks
from lowbit.lowrank import check_init, is_decomposing
from lowbit.quantizers.quantize import check_scale

#: The init_lora_weights that QLoRAModel.calibrated writes; nothing else can, since it takes data.
CALIBRATED = "calibrated"
FACTOR_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class QuantizationType(str, enum.Enum):
    """How the frozen weights are stored."""

    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"

    @classmethod
    def _missing_(cls, value: Any) -> "QuantizationType":
        """The member of a name in any case."""
        for member in cls:
            if isinstance(value, str) and member.value == value.lower():
                return member
        raise ValueError(f"quantization: expected one of {', '.join(member.name for member in cls)}, got {value!r}")


def _token_indices(name: str, value: Any) -> list[int] | dict[str, list[int]]:
    if isinstance(value, dict):
        return {embedding: checks.check_indices(name, indices) for embedding, indices in value.items()}
    return checks.check_indices(name, value)


def _checkpointing(name: str, value: Any) -> bool | str:
    if value is not True and value is not False and value != "offload":
        raise ValueError(f"{name}: expected True, False or 'offload', got {value!r}")
    return value


#: Setting -> what checks it, and returns what is kept of it. Those not here that are True or False by default are so.
_CHECKS = {
    "rank": checks.check_count,
    "lora_alpha": checks.check_positive,
    "lora_dropout": checks.check_probability_below_1,
    "loftq_iterations": checks.check_count,
    "bias": functools.partial(checks.check_choice, choices=("none", "all", "lora_only")),
    "lora_dtype": functools.partial(checks.check_choice, choices=FACTOR_DTYPES),
    "target_modules": checks.check_names_or_pattern,
    "target_parameters": checks.check_names,
    "exclude_modules": checks.check_names_or_pattern,
    "modules_to_save": checks.check_names,
    "layers_to_transform": checks.check_indices,
    "layers_pattern": checks.check_one_or_more_names,
    "rank_pattern": functools.partial(checks.check_by_name, checks.check_count),
    "alpha_pattern": functools.partial(checks.check_by_name, checks.check_positive),
    "trainable_token_indices": _token_indices,
    "gradient_checkpointing": _checkpointing,
}


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: a frozen weight W becomes W + scaling * B A, with A [rank, in] and B [out, rank].

    Args:
        rank: columns of B; at least 1.
        target_modules: which layers get LoRA (linear layers, embeddings, convolutions, nn.MultiheadAttention): a list
            of names or dotted suffixes ("query", "attention.self.query"), one string as a regular expression that the
            whole name has to match, or "all-linear" (every linear layer but the output head).
        target_parameters: names or suffixes of parameters that get LoRA: stacks of experts' weights, each expert its
            own ("mlp.experts.gate_up_proj"), and matrices, such as a router's weight. As in PEFT there is no
            lora_dropout, use_dora or lora_bias then, and exclude_modules and layers_to_transform do not count for them.
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
        modules_to_save: modules of which a copy trains in full precision and is saved with the adapter. The head of a
            transformers model for a task (classification, ...) is added by itself, unless the list is empty.
        ensure_weight_tying: of a module to save whose weight another one shares (a tied ``lm_head``), train one copy
            for both. Otherwise the other one keeps the base's weight, as in PEFT.
        trainable_token_indices: rows of the embedding that train: indices, or {name of an embedding: indices}.
        lora_bias: B has a bias, which trains.
        use_dora: train the norms of the weight's rows apart, in fp32 (Liu et al., "DoRA", 2024, arXiv 2402.09353).
        fan_in_fan_out: only written to the file: which weights are transposed is seen from the layers.
        lora_dtype: of the factors: "float32", "bfloat16" or "float16".
        init_lora_weights: how the factors begin: "default" (B is zero), "gaussian", "orthogonal" (B A is zero), or
            "random" (B A is not); "pissa", "pissa_niter_N", "olora" or "loftq" (of a QLoRAConfig), which also change
            the base; see :func:`lowbit.lowrank.initial_factors`. "calibrated" is what
            :meth:`QLoRAModel.calibrated <lowbit_lora.QLoRAModel.calibrated>` writes here.
        loftq_iterations: of "loftq".
        gradient_checkpointing: recompute activations in the backward (Hugging Face models); "offload": and of a model
            on a GPU keep the hidden states from which to do so in the host's memory.
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
    ensure_weight_tying: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: list[str] | None = None
    lora_bias: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    lora_dtype: str = "float32"
    init_lora_weights: str = "default"
    loftq_iterations: int = 1
    gradient_checkpointing: bool | str = False
    task_type: str | None = None

    def __new__(cls, *args: Any, **options: Any):
        fields = cls.__dataclass_fields__
        unknown = [name for name in options if name not in fields]
        if unknown:
            line = f"rank={options[unknown[0]]!r}" if unknown[0] == "r" else f"one of {', '.join(fields)}"
            raise TypeError(f"{cls.__name__}: expected {line}, got {unknown[0]!r}")
        return super().__new__(cls)

    def __post_init__(self):
        for name, field in self.__dataclass_fields__.items():
            check = _CHECKS.get(name, checks.check_switch if isinstance(field.default, bool) else None)
            value = getattr(self, name)
            if check is not None and not (value is None and field.default is None):
                self._set(name, check(name, value))
        if self.init_lora_weights != CALIBRATED:
            check_init(self.init_lora_weights, "init_lora_weights")
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules: expected names, a regular expression or 'all-linear', got nothing")
        if self.target_parameters:
            check_unset(self, ("lora_dropout", "use_dora", "lora_bias"), "target_parameters")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: expected only together with layers_to_transform")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias: expected False together with use_dora=True")
        init, ranks = self.init_lora_weights, [self.rank, *(self.rank_pattern or {}).values()]
        if self.lora_bias and is_decomposing(init):
            raise ValueError(f"lora_bias: expected False for init_lora_weights={init!r}")
        if init == "orthogonal" and any(rank % 2 for rank in ranks):
            raise ValueError(f"rank: expected even ranks for init_lora_weights='orthogonal', got {ranks}")
        if init in ("loftq", CALIBRATED) and not isinstance(self, QLoRAConfig):
            raise ValueError(f"init_lora_weights: {init!r} expects a QLoRAConfig, which says how the base is stored")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return lora_scaling(self.rank, self.lora_alpha, self.use_rslora)

    @property
    def changes_base(self) -> bool:
        """Whether the base holds what the first factors left of it."""
        return is_decomposing(self.init_lora_weights) or self.init_lora_weights == CALIBRATED

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return FACTOR_DTYPES[self.lora_dtype]

    @property
    def is_prompt_learning(self) -> bool:
        """What PEFT asks before it collects adapters of its own layers, as for Trainer's sharded checkpoints."""
        raise RuntimeError(
            "PEFT does not know the layers of lowbit_lora. Under FSDP: fsdp_state_dict_type: expected FULL_STATE_DICT, "
            "got another one; elsewhere take model.adapter_state_dict() and load_adapter_state_dict()"
        )

    def to_peft(self) -> dict[str, Any]:
        """The dictionary of ``adapter_config.json``."""
        init = {"default": True, "random": False, CALIBRATED: True}.get(self.init_lora_weights, self.init_lora_weights)
        return {name: getattr(self, name) for name in _SAME_IN_PEFT} | {
            "peft_type": "LORA",
            "r": self.rank,
            "layers_pattern": self.layers_pattern,
            "rank_pattern": self.rank_pattern or {},
            "alpha_pattern": self.alpha_pattern or {},
            "base_model_name_or_path": None,
            "inference_mode": True,
            "init_lora_weights": init,
        }

    @classmethod
    def from_peft(cls, config: Any, **ours: Any) -> "LoraConfig":
        """From PEFT's LoraConfig, or the dictionary of an ``adapter_config.json``; ``ours``: what PEFT has not.

        Raises:
            ValueError: not a LoRA adapter, or one that uses what is not supported here.
        """
        written = config if isinstance(config, dict) else config.to_dict()
        written = {name: getattr(value, "value", value) for name, value in written.items()}  # PEFT's enums
        if written.get("peft_type") != "LORA":
            raise ValueError(f"peft_type: expected 'LORA', got {written.get('peft_type')!r}")
        for name, value in written.items():
            if value and name not in {"peft_type", "r", *_SAME_IN_PEFT, *_WITHOUT_EFFECT}:
                raise ValueError(f"{name}: not supported by lowbit, expected it unset, got {value!r}")
        if "r" not in written:
            raise ValueError(f"adapter config: expected r and target_modules, got keys {sorted(written)}")
        taken = {name: written[name] for name in _SAME_IN_PEFT if written.get(name) is not None}
        if not taken.get("target_modules"):
            taken["target_modules"] = [] if taken.get("target_parameters") else "all-linear"
        if written.get("layers_to_transform") is not None:
            taken["layers_pattern"] = written.get("layers_pattern") or None
        init = written.get("init_lora_weights", True)
        taken["init_lora_weights"] = {True: "default", False: "random", "eva": "default"}.get(init, init)
        return cls(rank=written["r"], **taken | ours)


#: Settings that PEFT does not have, or has in another form.
_OTHERWISE_IN_PEFT = {"rank", "layers_pattern", "lora_dtype", "init_lora_weights", "loftq_iterations"}
_OTHERWISE_IN_PEFT |= {"gradient_checkpointing"}
_SAME_IN_PEFT = [name for name in LoraConfig.__dataclass_fields__ if name not in _OTHERWISE_IN_PEFT]
# Settings of PEFT that do not change what a finished adapter computes. An adapter with any other that is set (DoRA,
# lora_bias, something newer than this file) would compute something else than it was trained for.
_WITHOUT_EFFECT = {"auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "init_lora_weights"}
_WITHOUT_EFFECT |= {"layers_pattern", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size"}
_WITHOUT_EFFECT |= {"revision", "runtime_config"}


@dataclass(frozen=True)
class QLoRAConfig(LoraConfig):
    """LoRA on weights stored in 4 bits, or in 8; the arguments of :class:`LoraConfig` and:

    Args:
        quantization: a QuantizationType or its name: NF4, FP4, INT8 (8 bits, one scale a row).
        double_quant: store the block scales in 8 bits; INT8 ignores it.
        block_size: weights that share a scale; power of two, 32 to 4096; INT8 ignores it.
        scale: how scales are found, as in :func:`lowbit.quantize`: "absmax", or "search" (not INT8), which takes longer
            and leaves a smaller error.
        quantize_head: store the output layer (``lm_head``) so too; one that is tied to an embedding needs both.
        quantize_embeddings: store embeddings so too.
        paged_adamw: ``model.create_optimizer(...)`` pages the states, as ``get_paged_optimizer`` does.

    Raises:
        ValueError, TypeError: an argument out of range.

    Source: Dettmers et al., "QLoRA", 2023 (arXiv 2305.14314).
    """

    quantization: QuantizationType = QuantizationType.NF4
    double_quant: bool = True
    block_size: int = 64
    scale: str = "absmax"
    quantize_head: bool = False
    quantize_embeddings: bool = False
    paged_adamw: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._set("quantization", QuantizationType(self.quantization))
        check_scale(self.scale, self.spec)

    @property
    def spec(self) -> WeightSpec:
        """How a weight is stored."""
        return WeightSpec(self.quantization.value, self.block_size, self.double_quant)

    def quantization_settings(self) -> dict[str, Any]:
        """The fields that PEFT's file has no place for, ready for JSON."""
        own = [name for name in self.__dataclass_fields__ if name not in LoraConfig.__dataclass_fields__]
        settings = {name: getattr(self, name) for name in (*own, "loftq_iterations") if name != "paged_adamw"}
        if self.init_lora_weights == CALIBRATED:  # which is no method of PEFT's
            settings["init_lora_weights"] = CALIBRATED
        return settings | {"quantization": self.quantization.value}


def check_lora_options(rank: int, lora_alpha: float, lora_dropout: float) -> None:
    """TypeError/ValueError unless rank >= 1, lora_alpha is finite and positive, and dropout is in [0, 1)."""
    for name, value in (("rank", rank), ("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        _CHECKS[name](name, value)


def check_unset(options: Any, names: Iterable[str], where: str) -> None:
    """ValueError if one of these attributes of ``options`` is set; ``where`` says what does not have it."""
    for name in names:
        if getattr(options, name):
            raise ValueError(f"{name}: expected none with {where}, as in PEFT, got {getattr(options, name)}")


def lora_scaling(rank: int, lora_alpha: float, use_rslora: bool) -> float:
    """lora_alpha / rank, or lora_alpha / sqrt(rank) for rank-stabilised LoRA."""
    return lora_alpha / (math.sqrt(rank) if use_rslora else rank)
