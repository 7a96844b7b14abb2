"""The machine code that nvcc makes of a kernel: its instructions, its loops, its registers."""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest_cuda import ROOT, nvcc

from .machine_code import Kernel, count, cuobjdump, disassemble, resources

__all__ = ["ARCHS", "Kernel", "count", "disassemble", "kernels", "resources"]

ARCHS = ("sm_80", "sm_90", "sm_120")


def _compile(source: Path, arch: str) -> list[Kernel]:
    """The kernels of a .cu file."""
    cubin = ROOT / "build" / "tests" / f"{source.stem}.{arch}.cubin"
    cubin.parent.mkdir(parents=True, exist_ok=True)
    nvcc("-cubin", f"-arch={arch}", source, "-o", cubin)
    return disassemble(cubin, arch)


@functools.cache
def kernels(source: Path) -> tuple[Kernel, ...]:
    """Every kernel of a .cu file, for each of :data:`ARCHS`."""
    try:
        cuobjdump()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    with ThreadPoolExecutor() as pool:
        return tuple(kernel for found in pool.map(functools.partial(_compile, source), ARCHS) for kernel in found)
