"""How much memory fine-tuning a model takes, from its config alone."""

from .estimate import METHODS, Estimate, Setting, estimate, from_config
from .plans import GPUS, PLANS, RESERVED, fitting_gpu, per_gpu, table
from .shapes import SHAPES

__all__ = [
    "GPUS",
    "METHODS",
    "PLANS",
    "RESERVED",
    "SHAPES",
    "Estimate",
    "Setting",
    "estimate",
    "fitting_gpu",
    "from_config",
    "per_gpu",
    "table",
]
