"""Builds the extension ``lowbit._C`` against torch's stable ABI and Python's limited API: one wheel per platform.

LOWBIT_NATIVE=0 leaves the extension out, LOWBIT_NATIVE=1 insists on it; unset, it is built where a C++ compiler is
found, and the library falls back on its pure-torch backend where none is. LOWBIT_CUDA=0|1 does the same for its CUDA
half, which needs nvcc. LOWBIT_CUDA_ARCHS names the GPUs to compile for, as in "80,90": code for each, and PTX of the
last.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
#: Where nothing is asked for: one architecture compiles fast, and its PTX serves every later GPU.
DEFAULT_CUDA_ARCHS = "80"
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-Wall",
    "-fvisibility=hidden",
    # The format rounds after every product; GCC would contract a * b + c to an FMA. (CUDA code says __fmul_rn.)
    "-ffp-contract=off",
    "-DPy_LIMITED_API=0x030A0000",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]


def choice(name: str) -> str:
    """An environment variable that is "0", "1" or unset ("")."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return value


def wants_native() -> bool:
    """Whether to build the extension."""
    if choice("LOWBIT_NATIVE"):
        return choice("LOWBIT_NATIVE") == "1"
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else COMPILERS
    found = any(shutil.which(candidate) for candidate in candidates)
    if not found:
        print(
            f"lowbit: no C++ compiler found (tried {', '.join(candidates)}): building without native kernels",
            file=sys.stderr,
        )
    return found


def find_nvcc() -> Path | None:
    """The CUDA compiler: on PATH, or under CUDA_HOME."""
    candidates = [shutil.which("nvcc")]
    if os.environ.get("CUDA_HOME"):
        candidates.append(shutil.which("nvcc", path=Path(os.environ["CUDA_HOME"], "bin")))
    return next((Path(found) for found in candidates if found), None)


def cuda_library_flags() -> list[str]:
    """Where nvcc links from, which it says itself: it may be a wrapper anywhere on PATH."""
    command = [str(find_nvcc()), "--dryrun", "-c", str(ROOT / "csrc" / "cuda" / "device.cu")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall(r'-L[^"]+', next(line for line in output.splitlines() if line.startswith("#$ LIBRARIES=")))


def wants_cuda() -> bool:
    """Whether to build the CUDA half of the extension."""
    if choice("LOWBIT_CUDA") == "1" and find_nvcc() is None:
        raise SystemExit("LOWBIT_CUDA=1: nvcc not found on PATH or under CUDA_HOME: install the CUDA toolkit")
    return choice("LOWBIT_CUDA") != "0" and find_nvcc() is not None


def cuda_targets() -> list[str]:
    """nvcc's options for the architectures to compile for."""
    archs = os.environ.get("LOWBIT_CUDA_ARCHS") or DEFAULT_CUDA_ARCHS
    if not re.fullmatch(r"\d+(,\d+)*", archs):
        raise SystemExit(f'LOWBIT_CUDA_ARCHS: expected numbers like "80,90", got {archs!r}')
    numbers = sorted(archs.split(","), key=int)
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*targets, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def compile_cuda(source: Path, folder: Path) -> Path:
    """The object file of one .cu file; made again only where something it may include has changed."""
    target = folder / f"{source.stem}.cuda.o"
    command = [str(find_nvcc()), *NVCC_FLAGS, *cuda_targets(), "-c", str(source), "-o", str(target)]
    stamp = target.with_suffix(".command")
    inputs = [source, *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    newest = max(path.stat().st_mtime for path in inputs)
    if target.exists() and stamp.exists() and stamp.read_text() == str(command) and target.stat().st_mtime > newest:
        return target
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
    stamp.write_text(str(command))
    return target


def native_build() -> dict:
    """The setup() arguments that build lowbit._C."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if wants_cuda() else []
    sources = [ROOT / "csrc" / "bindings" / "cpu.cpp", *sorted((ROOT / "csrc" / "cpu" / "isa").glob("*.cpp"))]
    if cuda_sources:
        sources.append(ROOT / "csrc" / "bindings" / "cuda.cpp")
    extension = CppExtension(
        "lowbit._C",
        [str(source.relative_to(ROOT)) for source in sources],
        depends=[str(header.relative_to(ROOT)) for header in sorted((ROOT / "csrc").rglob("*.h"))],
        py_limited_api=True,
        extra_compile_args=[*CXX_FLAGS, *(["-DLOWBIT_CUDA"] if cuda_sources else [])],
    )
    # CppExtension also links torch and torch_python, which are not part of the stable ABI.
    extension.libraries = ["torch_cpu", "c10"]
    if cuda_sources:
        # Not CUDAExtension: it links libraries that torch's CPU wheel lacks.
        extension.extra_link_args += [*cuda_library_flags(), "-lcudart_static", "-ldl", "-lpthread", "-lrt"]

    class Build(BuildExtension):
        def build_extensions(self):
            folder = Path(self.build_temp, "cuda")
            folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_cuda(source, folder), cuda_sources)
                extension.extra_objects = [str(path) for path in objects]
            super().build_extensions()

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**(native_build() if wants_native() else {}))
