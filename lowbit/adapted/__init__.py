"""Weights plus what adapters add to them: products with these, and tensors that stand for the sum in other code."""

from . import functions
from .factors import Factors, adapted_linear, plus_biases, plus_products, plus_products_by_row
from .modules import cast_floats, copy_with_hooks, share_hooks, standing_in
from .norms import adapted_row_norms, square_row_norms
from .product import ProductWeight
from .rows import RowAdapters, weight_with_rows, with_rows
from .weight import AdaptedWeight, decoded

__all__ = ["AdaptedWeight", "Factors", "ProductWeight", "RowAdapters", "adapted_linear", "adapted_row_norms"]
__all__ += ["cast_floats", "copy_with_hooks", "decoded", "plus_biases", "plus_products", "plus_products_by_row"]
__all__ += ["share_hooks", "square_row_norms", "standing_in", "weight_with_rows", "with_rows"]

del functions  # imported for what it adds to ProductWeight
