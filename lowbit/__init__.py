"""lowbit: NF4, FP4 and INT8 weights, their kernels, and the matrix products on them."""

import warnings

from . import backends
from .backends import use_backend
from .functional import dequantize, linear, lora_linear, quantize
from .grouped import grouped_linear, grouped_lora_linear
from .tensor import QuantizedTensor

__version__ = "0.1.0"
__all__ = [
    "QuantizedTensor",
    "dequantize",
    "grouped_linear",
    "grouped_lora_linear",
    "linear",
    "lora_linear",
    "quantize",
    "use_backend",
]

if (_reason := backends.native.missing_reason()) is not None:
    warnings.warn(f"lowbit runs on its slow pure-torch reference backend: {_reason}", RuntimeWarning, stacklevel=2)
