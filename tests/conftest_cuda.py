"""What the tests of the CUDA kernels share: nvcc's output, and the emulator that runs it without a GPU."""

import ctypes
import functools
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))

#: The values of Dtype in csrc/dtype.h, and of the format argument in tests/cuda/launchers.cu.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMAT_CODES = {"nf4": 0, "fp4": 1, "int8": 2}


def emulator(module: str):
    """A module of the PTX emulator: ``ptxemu`` or ``hostlaunch``."""
    folder = os.environ.get("LOWBIT_EMULATOR")
    if folder is None:
        pytest.skip("no PTX emulator: set LOWBIT_EMULATOR to its folder")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(module)


def nvcc(*args) -> None:
    """Compile, or fail with what the compiler said."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc not found: the CUDA toolkit compiles the CUDA kernels")
    command = ["nvcc", "-O3", "-std=c++17", f"-I{CSRC}", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@functools.cache
def launchers():
    """The launchers of csrc/cuda on the stub runtime, whose kernel launches the emulator executes."""
    hostlaunch = emulator("hostlaunch")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc not found: the CUDA toolkit compiles the CUDA kernels")
    return hostlaunch.build([ROOT / "tests" / "cuda" / "launchers.cu", *SOURCES], arch="sm_80", include=[CSRC])


def call(function: str, *args) -> None:
    """Run a launcher of tests/cuda/launchers.cu: int as int64, None as the null pointer, on the default stream.

    A tensor that starts inside its storage reaches the kernel as such, misaligned where it is.
    """
    library, converted = launchers(), []
    for a in args:
        if isinstance(a, int):
            a = ctypes.c_int64(a)
        elif a is None:
            a = ctypes.c_void_p(None)
        elif a.storage_offset():
            library.know(torch.empty(0, dtype=a.dtype).set_(a.untyped_storage()))
            a = ctypes.c_void_p(a.data_ptr())
        converted.append(a)
    try:
        code = library.call(function, *converted, ctypes.c_void_p(None))
    finally:
        library.known.clear()
    assert code == 0, f"{function}: CUDA error {code}"


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element after a 16-byte boundary."""
    return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:]


def written(shape, dtype: torch.dtype, aligned: bool = True) -> torch.Tensor:
    """Memory for a kernel to write, full of a value that it has to replace."""
    tensor = torch.full((shape,), 7, dtype=dtype)
    return tensor if aligned else unaligned(tensor)
