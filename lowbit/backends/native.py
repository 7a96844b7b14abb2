"""The compiled extension ``lowbit._C`` (csrc/): loading it registers its kernels under the ``lowbit`` namespace."""

import importlib

import torch  # noqa: F401  (the extension links to libtorch, which this loads)

_IMPORT_ERROR: ImportError | None = None
_CUDA_ARCHITECTURES = ""
try:
    _CUDA_ARCHITECTURES = importlib.import_module("lowbit._C").cuda_architectures
except ImportError as error:
    _IMPORT_ERROR = error

#: Compute capabilities that the CUDA half of the extension was compiled for, as in ("8.0", "9.0"); empty where it was
#: not built. GPUs newer than the last run its PTX.
CUDA_CAPABILITIES = tuple(f"{int(a) // 100}.{int(a) // 10 % 10}" for a in _CUDA_ARCHITECTURES.split(",") if a)

#: Device types the extension has kernels for. "meta" goes to the fake kernels of the same namespace.
DEVICE_TYPES: tuple[str, ...] = ()
if _IMPORT_ERROR is None:
    DEVICE_TYPES = ("cpu", "meta", "cuda") if CUDA_CAPABILITIES else ("cpu", "meta")


def missing_reason() -> str | None:
    """None if the extension is loaded, else why not."""
    if _IMPORT_ERROR is None:
        return None
    return (
        f"the C++ extension lowbit._C did not load ({_IMPORT_ERROR}); install a C++ compiler and reinstall with "
        "`pip install .` (LOWBIT_NATIVE=1 turns a failed build into an error)"
    )


def missing_cuda_reason() -> str | None:
    """None if the CUDA kernels are loaded, else why not and what to install."""
    if missing_reason() is not None or CUDA_CAPABILITIES:
        return missing_reason()
    return (
        "the extension was built without its CUDA kernels: nvcc was not found, or LOWBIT_CUDA=0 was set; install the "
        "CUDA toolkit and reinstall with `LOWBIT_CUDA=1 pip install .` (LOWBIT_CUDA_ARCHS=90 compiles for one GPU)"
    )
