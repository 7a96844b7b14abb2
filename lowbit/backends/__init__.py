"""Which code runs an operation: ``native`` (C++, CUDA), ``triton`` or ``reference`` (plain torch).

``lowbit/ops/`` registers every op once per backend, in a torch.library namespace; this module says which namespace a
call goes to. A call inside :func:`use_backend` gets the chosen backend or an error, never a silent fallback. Any other
call gets the fastest backend that serves the tensor's device: native on a CPU; native, or Triton for some shapes
(``choice.py``), on NVIDIA's GPUs; Triton where no CUDA kernels were built, and on AMD's and Intel's GPUs.
"""

import contextlib
import contextvars
import sys
from collections.abc import Iterator

import torch

from . import native, triton
from .choice import triton_is_faster

_SELECTED: contextvars.ContextVar[str | None] = contextvars.ContextVar("lowbit_backend", default=None)

#: torch.library namespace of each backend.
NAMESPACES = {"native": "lowbit", "triton": "lowbit_triton", "reference": "lowbit_reference"}
_NAMES = tuple(NAMESPACES)


_THIS_MODULE = sys.modules[__name__]


def __getattr__(name: str) -> str | None:
    # Dynamo cannot trace ContextVar.get, but it guards on a module attribute by reading it again at each call: a
    # module-level __getattr__ makes the choice a guard of the compiled code that stays thread- and async-local.
    if name == "traced_choice":
        return _SELECTED.get()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def selected() -> str | None:
    """The backend that :func:`use_backend` chose here; None: automatic."""
    return _THIS_MODULE.traced_choice if torch.compiler.is_compiling() else _SELECTED.get()


def available() -> dict[str, str | None]:
    """Per backend None if it can run here, else the reason why not."""
    return {
        "native": native.missing_reason(),
        "triton": triton.missing_reason(),
        "reference": None,
    }


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called in this context (and the backward of those calls) on one backend.

    Thread- and async-local. Around a function that ``torch.compile`` made, which a change of backend recompiles; not
    inside of one: it cannot trace this.

    Raises:
        ValueError: ``name`` is not "native", "triton" or "reference".
        RuntimeError: that backend cannot run here; the message says why.
    """
    if name not in _NAMES:
        raise ValueError(f"name: expected one of {', '.join(_NAMES)}, got {name!r}")
    reason = available()[name]
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    token = _SELECTED.set(name)
    try:
        yield
    finally:
        _SELECTED.reset(token)


#: Devices that there are kernels for, if not in this installation.
_GPUS = ("cuda", "xpu")


def _without_native(device_type: str) -> str:
    if device_type in _GPUS and triton.missing_reason() is None:
        return "triton"
    # Only on a GPU the reference would stand in for kernels that its user expects.
    expects_native = device_type in _GPUS and native.missing_reason() is None
    return "native" if expects_native else "reference"


def namespace_for(device_type: str, selected: str | None) -> str:
    """The op namespace for tensors on ``device_type``, given the :func:`use_backend` choice (None: automatic).

    Raises:
        RuntimeError: the chosen backend does not serve that device; or none is chosen, and there is nothing for a GPU:
            neither CUDA kernels nor Triton. (Without any compiled extension, which a warning said, the reference
            serves every device.)
    """
    if selected is None:
        if device_type in native.DEVICE_TYPES:
            return NAMESPACES["native"]
        selected = _without_native(device_type)
    if selected == "triton" and device_type not in triton.DEVICE_TYPES:
        raise RuntimeError(
            f"backend 'triton' has no kernels for device {device_type!r} (it serves: {', '.join(triton.DEVICE_TYPES)}; "
            "and cpu, interpreted, where TRITON_INTERPRET=1 was set before lowbit was imported)"
        )
    if selected == "native" and device_type not in native.DEVICE_TYPES:
        if device_type in _GPUS:
            compiled = native.missing_cuda_reason() if device_type == "cuda" else "compiled are those for CPUs and CUDA"
            portable = triton.missing_reason() or "use_backend('triton') has some"
            raise RuntimeError(
                f"no kernels for a tensor on {device_type!r}: {compiled}. {portable}. use_backend('reference') serves "
                "it, slowly"
            )
        raise RuntimeError(
            f"backend 'native' has no kernels for device {device_type!r} in this build (it serves: "
            f"{', '.join(native.DEVICE_TYPES)}); use_backend('reference') serves every device"
        )
    return NAMESPACES[selected]


def namespace_for_product(device_type: str, x: torch.Tensor, q_format: str, selected: str | None) -> str:
    """:func:`namespace_for`, of ``linear`` on x [..., in_features] and a weight in ``q_format``."""
    if selected is None and device_type == "cuda" and _has_both():
        rows = x.numel() // max(x.shape[-1], 1)
        if triton_is_faster(rows, x.dtype, q_format, _capability(x.device)):
            return NAMESPACES["triton"]
    return namespace_for(device_type, selected)


_CAPABILITIES: dict[torch.device, tuple[int, int]] = {}


def _capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability. torch takes 2 us to tell, so it is asked once."""
    if torch.compiler.is_compiling():
        return torch.cuda.get_device_capability(device)
    if device not in _CAPABILITIES:
        _CAPABILITIES[device] = torch.cuda.get_device_capability(device)
    return _CAPABILITIES[device]


def namespace_for_experts(device_type: str, selected: str | None) -> str:
    """:func:`namespace_for`, of the products of a mixture of experts.

    Triton's are one launch for all experts; CUDA's one for each, after the host has waited for where their rows end.
    """
    if selected is None and device_type == "cuda" and _has_both():
        return NAMESPACES["triton"]
    return namespace_for(device_type, selected)


def _has_both() -> bool:
    return "cuda" in native.DEVICE_TYPES and triton.missing_reason() is None
