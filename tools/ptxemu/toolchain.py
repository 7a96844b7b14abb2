"""Calling nvcc and the host compiler."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .module import Module

NVCC_MISSING = "nvcc is not installed (CUDA toolkit)"


def have_nvcc():
    return shutil.which("nvcc") is not None


def run(*command):
    """Run a command and return what it printed. If it fails, that is the error message."""
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def as_sources(sources):
    """One path or several -> list of Path."""
    return [Path(sources)] if isinstance(sources, (str, os.PathLike)) else [Path(source) for source in sources]


def nvcc_flags(arch, include, flags):
    """-lineinfo lets every error and count name its source line."""
    name = str(arch).removeprefix("sm_")
    target = f"arch=compute_{name},code=compute_{name}"  # PTX only: nothing here needs ptxas
    includes = [f"-I{folder}" for folder in include]
    return ["-O3", "-std=c++20", "-gencode", target, "-lineinfo", *includes, *flags]


def working_folder(out):
    """Context manager giving ``out``, or a temporary folder where it is None."""
    return tempfile.TemporaryDirectory() if out is None else contextlib.nullcontext(out)


def compile_ptx(source, *, arch="sm_80", include=(), flags=(), out=None):
    """One .cu file -> `Module`."""
    with working_folder(out) as folder:
        ptx = Path(folder) / f"{Path(source).stem}.ptx"
        run("nvcc", "-ptx", *nvcc_flags(arch, include, flags), source, "-o", ptx)
        return Module(ptx.read_text())


def compile_objects(sources, folder, *, arch="sm_80", include=(), flags=()):
    """.cu files -> (Modules of their PTX, object files of their host code), from one run of nvcc each."""
    modules, objects = [], []
    for number, source in enumerate(as_sources(sources)):
        kept = Path(folder) / f"{number}_{source.stem}"
        kept.mkdir()
        target = kept / "host.o"
        keep = ("--keep", "--keep-dir", kept)
        run("nvcc", "-c", *nvcc_flags(arch, include, flags), *keep, "-Xcompiler", "-fPIC", source, "-o", target)
        (ptx,) = kept.glob("*.ptx")
        modules.append(Module(ptx.read_text()))
        objects.append(target)
    return modules, objects


def strip_comments(text):
    """C or C++ source without its comments."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.S)
