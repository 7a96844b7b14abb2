"""What nvcc made of each of lowbit's CUDA sources: host code, PTX for the emulator, machine code for three GPUs."""

import functools
import importlib.util
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from .machine_code import Kernel, disassemble_once
from .once import ROOT

# The build, whose objects these are. (On the path its folder would put lowbit's sources before the installed package.)
_spec = importlib.util.spec_from_file_location("lowbit_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)

CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
#: The GPUs whose machine code the tests read. The emulator runs the PTX for the first. The Makefile installs the
#: package for the same ones, so that each source is compiled once.
ARCHS = ("sm_80", "sm_90", "sm_120")


@dataclass(frozen=True)
class Compiled:
    """What nvcc made of one source: an object file with host code and machine code, and the text of its PTX."""

    source: Path
    object: Path
    ptx: Path


@functools.cache
def compiled(source: Path, archs: tuple[str, ...] = ARCHS) -> Compiled:
    """The source compiled for some GPUs, and its PTX for the first. Raises CalledProcessError if nvcc fails."""
    setup.CUDA_OBJECTS.mkdir(parents=True, exist_ok=True)
    with FileLock(setup.CUDA_OBJECTS / f"{source.stem}.lock"):
        made = setup.compile_cuda(source, tuple(arch.removeprefix("sm_") for arch in archs))
    return Compiled(source, made, made.with_suffix(".ptx"))


def compiled_all(sources: Iterable[Path]) -> list[Compiled]:
    """The compiled sources, in the given order. As many are compiled at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, sources))


@functools.cache
def kernels(source: Path, arch: str) -> tuple[Kernel, ...]:
    """The machine code of every kernel of a source for a GPU. The tests share that of their own GPUs."""
    return tuple(disassemble_once(compiled(source, ARCHS if arch in ARCHS else (arch,)).object, arch))
