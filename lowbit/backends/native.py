"""The compiled extension ``lowbit._C`` (csrc/): loading it registers its kernels under the ``lowbit`` namespace."""

import importlib
import importlib.machinery
import sys
from pathlib import Path

import torch  # noqa: F401  (the extension links to libtorch, which this loads)

#: The folder that lowbit was imported from.
PACKAGE = Path(__file__).resolve().parents[1]
_INSTALL = "pip install --no-build-isolation ."
_NOTE = "native_missing.txt"  # setup.py writes it into a wheel without the extension: why it was not built

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


def _has_extension(folder: Path) -> bool:
    return importlib.machinery.PathFinder.find_spec("_C", [str(folder)]) is not None


def _is_installed(folder: Path) -> bool:
    return _has_extension(folder) or (folder / _NOTE).exists()


def installed_copy() -> Path | None:
    """The folder of an installed lowbit on Python's path, where this one is sources that are not built; else None.

    Python started in a clone finds the sources there before the installed package.
    """
    if _is_installed(PACKAGE):
        return None
    candidates = ((Path(folder) / "lowbit").resolve() for folder in sys.path)
    return next((candidate for candidate in candidates if _is_installed(candidate)), None)


def _missing_reason() -> str | None:
    if _IMPORT_ERROR is None:
        return None
    problem = f"the C++ extension lowbit._C of {PACKAGE} did not load ({_IMPORT_ERROR})"
    if _has_extension(PACKAGE):
        return f"{problem}; reinstall with `{_INSTALL}` where this torch ({torch.__version__}) is installed"
    if (note := PACKAGE / _NOTE).exists():
        return (
            f"{PACKAGE} was installed without the C++ extension lowbit._C: {note.read_text().strip()}; reinstall with "
            f"`{_INSTALL}` where there is g++ or clang++ for C++20 (LOWBIT_NATIVE=1 makes a failed build an error)"
        )
    if (copy := installed_copy()) is not None and _has_extension(copy):
        return (
            f"lowbit was imported from {PACKAGE}, which has no C++ extension lowbit._C; that in {copy} has "
            "one: start Python in another folder, or build it here with `python setup.py build_ext --inplace`"
        )
    if (PACKAGE.parent / "setup.py").exists():
        return (
            f"lowbit was imported from the sources in {PACKAGE}, where the C++ extension lowbit._C is not built: build "
            f"it with `python setup.py build_ext --inplace`, or `{_INSTALL}` and start Python in another folder"
        )
    return f"{problem}; reinstall with `{_INSTALL}`"


_MISSING_REASON = _missing_reason()


def missing_reason() -> str | None:
    """None if the extension is loaded, else why not and what to do."""
    return _MISSING_REASON


def missing_cuda_reason() -> str | None:
    """None if the CUDA kernels are loaded, else why not and what to install."""
    if missing_reason() is not None or CUDA_CAPABILITIES:
        return missing_reason()
    return (
        "the extension was built without its CUDA kernels: nvcc was not found, or LOWBIT_CUDA=0 was set; install the "
        f"CUDA toolkit and reinstall with `LOWBIT_CUDA=1 {_INSTALL}` (LOWBIT_CUDA_ARCHS=90 compiles for one GPU)"
    )
