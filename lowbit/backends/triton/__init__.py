"""The Triton kernels: NVIDIA GPUs without the compiled CUDA half, AMD and Intel GPUs.

One module per operation, each with its kernels and a function of the op's name and arguments (``lowbit/ops``) that
checks them (``operands.py``), chooses a configuration (``shapes.py``) and launches (``launch.py``). Triton itself is
imported at the first call: this file only says whether it can be.

Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors too, slowly, which is how they are tested.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys

import torch
from torch.torch_version import TorchVersion

#: What torch 2.10 brings along; older ones lack what the kernels use.
OLDEST_TRITON = (3, 6)

#: By module of this package the ops that it implements. Where torch has no Triton kernel to call, the reference serves.
_OPS = {
    "quantize": ("quantize", "quantize_scales", "search_scales", "encode"),
    "dequantize": ("dequantize", "dequantize_out"),
    "linear": ("linear", "linear_approximate"),
    "linear_grad_input": ("linear_grad_input",),
    "grouped": ("grouped_linear", "grouped_linear_grad_input", "grouped_matmul", "grouped_outer"),
    "optim": ("optimizer_step", "sum_of_squares"),
}
#: The module of each op.
MODULES = {op: module for module, ops in _OPS.items() for op in ops}

#: As Triton reads it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

#: Ops whose launches torch.compile gets to see, for x in 16 bits on these devices. The others are opaque to it, because
#: torch takes arguments of their kernels for written: all of one that decodes to fp32 (assembly that has to stay in
#: place), and the grouped ones' expert_ends, of which addresses are made.
_SHOWN = ("linear", "linear_grad_input")
_SHOWN_ON = ("cuda", "xpu")

#: Modules whose kernels read tables of addresses. Triton's interpreter copies a GPU's tensors to the host, but not what
#: such a table leads to.
_BY_ADDRESSES = ("optim",)

#: Whether kernels do without NVIDIA's inline assembly.
PORTABLE = INTERPRETED or torch.version.cuda is None

#: Device types whose tensors the kernels take. (torch calls AMD's GPUs "cuda" too.)
DEVICE_TYPES = ("cuda", "xpu", "meta", *(("cpu",) if INTERPRETED else ()))


def _missing_reason() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # any folder of that name would be found, without an origin
        return "Triton is not installed; `pip install triton` (torch for CUDA and ROCm brings it along)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # Distributed under another name: triton-rocm, pytorch-triton-xpu, triton-windows, ...
        try:
            version = importlib.import_module("triton").__version__
        except ImportError as error:
            return f"Triton cannot be imported ({error}); reinstall torch, or Triton as torch's own instructions say"
    if TorchVersion(version) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton {version} is too old: expected {oldest} or newer; `pip install -U triton`"
    return None


_MISSING_REASON = _missing_reason()


def missing_reason() -> str | None:
    """None if the Triton kernels can be used here, else why not and what to install."""
    return _MISSING_REASON


def register(library) -> None:
    """Make this package's functions the kernels of the ops of ``library``, the namespace ``lowbit_triton``."""
    if missing_reason() is not None:
        return
    library.define("scale_map(Device device) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("scale_map", _imported_when_called("copy_of_scale_map", "decode"), "CompositeExplicitAutograd")
    fake = lambda device: torch.empty(256, device=device)  # noqa: E731
    torch.library.register_fake(f"{library.ns}::scale_map", fake, lib=library)
    keys = {"cuda": "CUDA", "xpu": "XPU", "cpu": "CPU"}
    for name, module in MODULES.items():
        for device_type in DEVICE_TYPES:
            is_out_of_reach = INTERPRETED and module in _BY_ADDRESSES and device_type != "cpu"
            if device_type in keys and not is_out_of_reach:
                library.impl(name, _imported_when_called(name, module), keys[device_type])
        if name in _SHOWN and not INTERPRETED:
            _show_launches(library, name, module)


def _imported_when_called(name: str, module: str):
    def kernel(*args, **kwargs):
        return getattr(_module(module), name)(*args, **kwargs)

    return kernel


def _module(name: str):
    """A module of this package. Not imported as part of what torch.compile traces: its tables are real tensors."""
    full_name = f"{__name__}.{name}"
    if full_name in sys.modules:
        return sys.modules[full_name]
    with torch.utils._python_dispatch._disable_current_modes():
        return importlib.import_module(full_name)


def _show_launches(library, name: str, module: str) -> None:
    """Let torch.compile see the launches of an op rather than the op, as ``torch.library.triton_op`` does."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    kernel = _imported_when_called(name, module)

    def decompose(mode, op, types, args, kwargs):
        x = args[0]
        if x.device.type not in _SHOWN_ON or x.dtype == torch.float32:
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode, _module("launch").traced():
            return kernel(*args, **kwargs)

    torch.library.register_torch_dispatch(f"{library.ns}::{name}", FunctionalTensorMode, decompose, lib=library)
