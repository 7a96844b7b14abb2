"""Weights plus what adapters add to them: products with these, and tensors that stand for the sum in other code."""

from . import functions
from .factors import Factors, adapted_linear, plus_products, products_by_row
from .modules import copy_with_hooks, share_hooks, standing_in
from .norms import adapted_row_norms, square_row_norms
from .product import ProductWeight
from .weight import AdaptedWeight

__all__ = ["AdaptedWeight", "Factors", "ProductWeight", "adapted_linear", "adapted_row_norms", "copy_with_hooks"]
__all__ += ["plus_products", "products_by_row", "share_hooks", "square_row_norms", "standing_in"]

del functions  # imported for what it adds to ProductWeight
