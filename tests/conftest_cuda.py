"""What the tests of the CUDA kernels share: nvcc, and the launchers as the emulator runs them without a GPU."""

import contextlib
import dataclasses
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lowbit.format import WeightSpec

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))

#: The values of Dtype in csrc/dtype.h, and of the format argument in tests/cuda/launchers.cu.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMAT_CODES = {"nf4": 0, "fp4": 1, "int8": 2}


def require_nvcc() -> None:
    """Skip the test where there is no CUDA compiler."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc not found: the CUDA toolkit compiles the CUDA kernels")


def emulator(module: str):
    """A module of tests/emulator."""
    return pytest.importorskip(f"emulator.{module}")


def nvcc(*args) -> None:
    """Compile, or fail with what the compiler said."""
    require_nvcc()
    command = ["nvcc", "-O3", "-std=c++17", f"-I{CSRC}", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@functools.cache
def launchers():
    """The launchers of csrc/cuda on the emulator's stub runtime.

    Besides its own checks the emulator looks for lanes of a warp that exchange data without __syncwarp, and for bytes
    that two threads write.
    """
    require_nvcc()
    sources = [ROOT / "tests" / "cuda" / "launchers.cu", *SOURCES]
    library = emulator("hostlaunch").build(sources, arch="sm_80", include=[CSRC])
    library.options = {"warp_races": True, "detect_global_waw": True}
    return library


def call(function: str, *args) -> None:
    """Run a launcher of tests/cuda/launchers.cu on the default stream."""
    code = launchers().call(function, *args, None)
    assert code == 0, f"{function}: CUDA error {code}"
    for launch in launchers().launches:
        assert not launch.result.warnings, (launch.kernel, launch.result.warnings)
    launchers().launches[:-1] = []


@contextlib.contextmanager
def multiprocessors(count: int):
    """A GPU so small that its warps go round their loops more than once."""
    device = launchers().device
    launchers().device = dataclasses.replace(device, sm_count=count)
    try:
        yield
    finally:
        launchers().device = device


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element after a 16-byte boundary."""
    return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:]


def written(size: int, dtype: torch.dtype, aligned: bool = True) -> torch.Tensor:
    """Memory for a kernel to write, full of a value that it has to replace."""
    tensor = torch.full((size,), 7, dtype=dtype)
    return tensor if aligned else unaligned(tensor)


def spec_of(format: str, block_size: int, double_quant: bool = False) -> str:
    """How such a weight is stored, as the ops take it."""
    return WeightSpec(format, block_size, double_quant).text
