"""Compiles each of lowbit's CUDA sources once: host code, PTX for the emulator, machine code for three GPUs."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .machine_code import Kernel, disassemble_once
from .once import ROOT, made_once

CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
#: The GPUs whose machine code the tests read. The emulator runs the PTX for the first.
ARCHS = ("sm_80", "sm_90", "sm_120")


@dataclass(frozen=True)
class Compiled:
    """What nvcc made of one source: an object file with host code and machine code, and the text of its PTX."""

    source: Path
    object: Path
    ptx: Path


def _flags(archs: tuple[str, ...]) -> list[str]:
    """setup.py's flags and -lineinfo, by which the emulator names source lines. It changes no instruction."""
    numbers = [arch.removeprefix("sm_") for arch in archs]
    targets = [f"-gencode=arch=compute_{number},code=[sm_{number},compute_{number}]" for number in numbers]
    return ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC", f"-I{CSRC}", *targets]


@functools.cache
def nvcc_version() -> str:
    """What ``nvcc --version`` prints. Raises FileNotFoundError if there is no nvcc."""
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout


def _inputs(source: Path, archs: tuple[str, ...]) -> list[str | Path]:
    """All that decides what nvcc makes of a source: the compiler, its flags, the source and every header of csrc."""
    flags = [flag.replace(str(ROOT), "") for flag in _flags(archs)]
    headers = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh"))
    return [nvcc_version(), " ".join(flags), source, *headers]


@functools.cache
def compiled(source: Path, archs: tuple[str, ...] = ARCHS) -> Compiled:
    """The source compiled for some GPUs, and its PTX for the first. Raises RuntimeError with nvcc's message."""

    def make(folder: Path) -> None:
        intermediate = folder / "intermediate"
        intermediate.mkdir()
        target = folder / f"{source.stem}.o"
        keep = ["--keep", "--keep-dir", str(intermediate)]
        command = ["nvcc", "-c", *_flags(archs), *keep, str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        (intermediate / f"{source.stem}.{archs[0].replace('sm', 'compute')}.ptx").rename(folder / f"{source.stem}.ptx")
        shutil.rmtree(intermediate)

    folder = made_once(f"{source.stem}.{'.'.join(archs)}", _inputs(source, archs), make)
    return Compiled(source, folder / f"{source.stem}.o", folder / f"{source.stem}.ptx")


def compiled_all(sources: Iterable[Path]) -> list[Compiled]:
    """The compiled sources, in the given order. As many are compiled at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, sources))


@functools.cache
def kernels(source: Path, arch: str) -> tuple[Kernel, ...]:
    """The machine code of every kernel of a source for a GPU. The tests share that of their own GPUs."""
    return tuple(disassemble_once(compiled(source, ARCHS if arch in ARCHS else (arch,)).object, arch))
