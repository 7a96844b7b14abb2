"""The compiled extension ``lowbit._C`` (csrc/): loading it registers its kernels under the ``lowbit`` namespace."""

import importlib

import torch  # noqa: F401  (the extension links to libtorch, which this loads)

_IMPORT_ERROR: ImportError | None = None
try:
    importlib.import_module("lowbit._C")
except ImportError as error:
    _IMPORT_ERROR = error

#: Device types the extension has kernels for. "meta" goes to the fake kernels of the same namespace.
DEVICE_TYPES: tuple[str, ...] = () if _IMPORT_ERROR else ("cpu", "meta")


def missing_reason() -> str | None:
    """None if the extension is loaded, else why not."""
    if _IMPORT_ERROR is None:
        return None
    return (
        f"the C++ extension lowbit._C did not load ({_IMPORT_ERROR}); install a C++ compiler and reinstall with "
        "`pip install .` (LOWBIT_NATIVE=1 turns a failed build into an error)"
    )
