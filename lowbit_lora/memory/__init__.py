"""How much memory fine-tuning a model takes, from its config alone."""

from .estimate import METHODS, Estimate, Setting, estimate, from_config
from .shapes import SHAPES

__all__ = [
    "METHODS",
    "SHAPES",
    "Estimate",
    "Setting",
    "estimate",
    "from_config",
]
