"""The Triton kernels: NVIDIA GPUs without the compiled CUDA half, AMD and Intel GPUs.

One module per operation, each with its kernels and a function of the op's name and arguments (``lowbit/ops.py``)
that chooses a configuration (``shapes.py``) and launches (``launch.py``). Triton itself is imported at the first
call: this file only says whether it can be.

Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors too, slowly, which is how they are tested.
"""

import importlib
import importlib.metadata
import importlib.util
import os

import torch

#: What torch 2.10 brings along; older ones lack what the kernels use.
OLDEST_TRITON = (3, 6)

#: Which module of this package implements an op. Where torch has no Triton kernel to call, the reference serves.
MODULES = {
    "dequantize": "dequantize",
    "linear_grad_input": "linear_grad_input",
    "grouped_linear": "grouped",
    "grouped_linear_grad_input": "grouped",
    "grouped_matmul": "grouped_products",
    "grouped_outer": "grouped_products",
}

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

#: Whether kernels do without NVIDIA's inline assembly.
PORTABLE = INTERPRETED or torch.version.cuda is None

#: Device types whose tensors the kernels take. (torch calls AMD's GPUs "cuda" too.)
DEVICE_TYPES = ("cuda", "xpu", "meta", *(("cpu",) if INTERPRETED else ()))


def missing_reason() -> str | None:
    """None if the Triton kernels can be used here, else why not and what to install."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` (torch for CUDA and ROCm brings it along)"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton {version} is too old: expected {oldest} or newer; `pip install -U triton`"
    return None


def register(library) -> None:
    """Make this package's functions the kernels of the ops of ``library``, the namespace ``lowbit_triton``."""
    if missing_reason() is not None:
        return
    keys = {"cuda": "CUDA", "xpu": "XPU", "cpu": "CPU"}
    for name, module in MODULES.items():
        for device_type in DEVICE_TYPES:
            if device_type in keys:
                library.impl(name, _imported_when_called(name, module), keys[device_type])


def _imported_when_called(name: str, module: str):
    def kernel(*args):
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)(*args)

    return kernel
