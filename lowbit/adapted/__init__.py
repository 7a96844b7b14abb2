"""Weights plus what adapters add to them: products with these, and tensors that stand for the sum in other code."""

from . import functions
from .base_state import base_keys, buffers_of, changed, weights_of
from .factors import Factors, adapted_linear, plus_biases, plus_products, plus_products_by_row
from .modules import cast_floats, copy_with_hooks, share_hooks, standing_in
from .norms import adapted_row_norms, square_row_norms
from .places import Adapted, adapted_modules, base_of, module_names, walk, with_nested
from .product import ProductWeight
from .rows import RowAdapters, weight_with_rows, with_rows
from .weight import AdaptedWeight, decoded

__all__ = ["Adapted", "AdaptedWeight", "Factors", "ProductWeight", "RowAdapters", "adapted_linear"]
__all__ += ["adapted_modules", "adapted_row_norms", "base_keys", "base_of", "buffers_of", "cast_floats", "changed"]
__all__ += ["copy_with_hooks", "decoded", "module_names", "plus_biases", "plus_products", "plus_products_by_row"]
__all__ += ["share_hooks", "square_row_norms", "standing_in", "walk", "weight_with_rows", "weights_of", "with_nested"]
__all__ += ["with_rows"]

del functions  # imported for what it adds to ProductWeight
