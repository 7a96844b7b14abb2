"""The optimizers by their names, and the one that a model is given."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lowbit.checks import check_choice, check_switch

from .base import FusedOptimizer
from .groups import check_bits, parameter_groups


class AdamW(FusedOptimizer):
    """AdamW with decoupled weight decay, states in fp32. See :class:`FusedOptimizer` for ``options``.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019 (arXiv 1711.05101).
    """

    rule = "adamw"

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **options: Any,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class Lion(FusedOptimizer):
    """Lion: the sign of a momentum, one state, in fp32. See :class:`FusedOptimizer` for ``options``.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023 (arXiv 2302.06675).
    """

    rule = "lion"

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ):
        super().__init__(params, lr, betas, 0.0, weight_decay, **options)


class AdamW8bit(AdamW):
    """:class:`AdamW` with states in 8 bits.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021 (arXiv 2110.02861).
    """

    bits = 8


class PagedAdamW(AdamW):
    """:class:`AdamW` with paged states: CUDA's managed memory, or on a CPU a file in the folder ``paged_to``."""

    paged = True


class PagedAdamW8bit(AdamW8bit):
    """:class:`AdamW8bit` with paged states."""

    paged = True


class Lion8bit(Lion):
    """:class:`Lion` with its state in 8 bits."""

    bits = 8


class PagedLion(Lion):
    """:class:`Lion` with its state paged."""

    paged = True


class PagedLion8bit(Lion8bit):
    """:class:`Lion8bit` with its state paged."""

    paged = True


#: By rule, bits and whether it is paged.
_CLASSES = {(c.rule, c.bits, c.paged): c for c in (AdamW, Lion, AdamW8bit, Lion8bit, PagedAdamW, PagedLion)}
_CLASSES |= {(c.rule, c.bits, c.paged): c for c in (PagedAdamW8bit, PagedLion8bit)}


def optimizer_cls_and_kwargs(
    model: nn.Module,
    lr: float = 2e-5,
    weight_decay: float = 0.01,
    *,
    optimizer: str = "adamw",
    bits: int = 32,
    paged: bool = True,
    lora_plus_ratio: float = 1.0,
    decay_biases_and_norms: bool = False,
    **options: Any,
) -> tuple[type[FusedOptimizer], dict[str, Any]]:
    """What :func:`get_paged_optimizer` makes, as the argument of this name of transformers' Trainer."""
    check_choice("optimizer", optimizer, ("adamw", "lion"))
    check_bits(bits)
    groups = parameter_groups(model, lr, weight_decay, lora_plus_ratio, decay_biases_and_norms)
    made = _CLASSES[optimizer, bits, check_switch("paged", paged)]
    return made, {"params": groups, "lr": lr, "weight_decay": weight_decay, **options}


def get_paged_optimizer(
    model: nn.Module, lr: float = 2e-5, weight_decay: float = 0.01, **options: Any
) -> FusedOptimizer:
    """A paged optimizer of what trains of a model.

    Args:
        model: a :class:`LoraModel`, a :class:`QLoRAModel` or any module.
        lr, weight_decay: decoupled decay, of neither biases nor norms.
        options: ``optimizer`` "adamw" or "lion", ``bits`` 32 or 8, ``paged`` False for memory like any other;
            ``lora_plus_ratio`` and ``decay_biases_and_norms`` as in :func:`parameter_groups`; others of :class:`AdamW`
            and :class:`FusedOptimizer`: ``betas``, ``eps``, ``paged_to``, ``max_grad_norm``, ``on_nonfinite``,
            ``stochastic_rounding``, ``seed``, ``offload_states``, ``offload_gradients``.

    Raises:
        ValueError, TypeError: no parameter that trains, or an argument out of range.
    """
    made, arguments = optimizer_cls_and_kwargs(model, lr, weight_decay, **options)
    return made(**arguments)
