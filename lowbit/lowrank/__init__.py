"""Pairs of low-rank factors, as LoRA has: how they begin, and weighted sums of several. Functions of tensors only."""

from .combine import METHODS, combine
from .initial import (
    DECOMPOSING_METHODS,
    RANDOM_METHODS,
    check_init,
    factors_of_weight,
    initial_factors,
    is_decomposing,
    random_factors,
)
from .residual import residual_factors

__all__ = ["DECOMPOSING_METHODS", "METHODS", "RANDOM_METHODS", "check_init", "combine", "factors_of_weight"]
__all__ += ["initial_factors", "is_decomposing", "random_factors", "residual_factors"]
