"""lowbit: NF4, FP4 and INT8 weights, their kernels, and the matrix products on them."""

import warnings

from . import aten, backends, ddp, files, functions
from .backends import use_backend
from .format import WeightSpec
from .functional import dequantize, linear, lora_linear
from .grouped import grouped_linear, grouped_lora_linear, grouped_matmul
from .modules import dequantize_, quantize_
from .quantizers import quantize
from .tensor import QuantizedTensor
from .version import __version__ as __version__

__all__ = [
    "QuantizedTensor",
    "WeightSpec",
    "dequantize",
    "dequantize_",
    "files",
    "grouped_linear",
    "grouped_lora_linear",
    "grouped_matmul",
    "linear",
    "lora_linear",
    "quantize",
    "quantize_",
    "use_backend",
]

del aten, ddp, functions  # imported for what they add to QuantizedTensor, and to DistributedDataParallel

if (_reason := backends.native.missing_reason()) is not None:
    warnings.warn(f"lowbit runs on its slow pure-torch reference backend: {_reason}", RuntimeWarning, stacklevel=2)
