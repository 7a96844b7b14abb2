"""Which code runs an operation: ``native`` (C++), ``triton`` or ``reference`` (plain torch).

``ops.py`` instantiates every op once per backend, as a torch.library namespace; this module says which namespace a
call goes to. A call inside :func:`use_backend` gets the chosen backend or an error, never a silent fallback; outside
of it, the fastest backend that serves the tensor's device.
"""

import contextlib
import contextvars
from collections.abc import Iterator

from . import native, triton

_SELECTED: contextvars.ContextVar[str | None] = contextvars.ContextVar("lowbit_backend", default=None)

#: torch.library namespace of each backend.
NAMESPACES = {"native": "lowbit", "triton": "lowbit_triton", "reference": "lowbit_reference"}
_NAMES = tuple(NAMESPACES)


def __getattr__(name: str) -> str | None:
    # Dynamo cannot trace ContextVar.get, but it guards on a module attribute by reading it again at each call: a
    # module-level __getattr__ makes the choice a guard of the compiled code that stays thread- and async-local.
    if name == "selected":
        return _SELECTED.get()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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

    Thread- and async-local; under ``torch.compile`` a change of backend recompiles.

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


def namespace_for(device_type: str, selected: str | None) -> str:
    """The op namespace for tensors on ``device_type``, given the :func:`use_backend` choice (None: automatic).

    Raises:
        RuntimeError: the chosen backend does not serve that device; or none is chosen, and what serves a GPU was not
            built. (Without any compiled extension, which a warning said, the reference serves every device.)
    """
    if selected is None:
        # Only here the reference would stand in for kernels that a user of a GPU expects.
        expects_native = device_type == "cuda" and native.missing_reason() is None
        selected = "native" if expects_native or device_type in native.DEVICE_TYPES else "reference"
    if selected == "native" and device_type not in native.DEVICE_TYPES:
        if device_type == "cuda":
            raise RuntimeError(
                f"no kernels for a CUDA tensor: {native.missing_cuda_reason()}; use_backend('reference') serves it, "
                "slowly"
            )
        raise RuntimeError(
            f"backend 'native' has no kernels for device {device_type!r} in this build (it serves: "
            f"{', '.join(native.DEVICE_TYPES)}); use_backend('reference') serves every device"
        )
    return NAMESPACES[selected]
