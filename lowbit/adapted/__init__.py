"""Tensors that stand for a weight plus what adapters add to it, for code that reads a weight or multiplies by it."""

from . import functions
from .product import Factors, ProductWeight
from .weight import AdaptedWeight

__all__ = ["AdaptedWeight", "Factors", "ProductWeight"]

del functions  # imported for what it adds to ProductWeight
