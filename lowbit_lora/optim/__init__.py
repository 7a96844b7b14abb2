"""Optimizers whose states can be paged, or in 8 bits: one fused step over all parameters."""

from .base import FusedOptimizer
from .groups import parameter_groups
from .optimizers import (
    AdamW,
    AdamW8bit,
    Lion,
    Lion8bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion,
    PagedLion8bit,
    get_paged_optimizer,
    optimizer_cls_and_kwargs,
)

__all__ = [
    "AdamW",
    "AdamW8bit",
    "FusedOptimizer",
    "Lion",
    "Lion8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLion",
    "PagedLion8bit",
    "get_paged_optimizer",
    "optimizer_cls_and_kwargs",
    "parameter_groups",
]
