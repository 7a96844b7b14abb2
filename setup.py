"""Builds the extension ``lowbit._C`` against torch's stable ABI and Python's limited API: one wheel per platform.

LOWBIT_NATIVE=0 leaves the extension out and LOWBIT_NATIVE=1 requires it. If the variable is unset, the extension is
built wherever a C++ compiler can build it; elsewhere the wheel is pure Python, holds the reason in
lowbit/native_missing.txt, and the library runs on its pure-torch backend. LOWBIT_CUDA=0|1 does the same for the CUDA
half, which needs nvcc. LOWBIT_CUDA_ARCHS names the GPUs to compile for, as in "80,90": the build holds machine code for
each and PTX for later ones.

tools/check_headers.py, tools/codegen and the tests import this file for its flags, its choices and its CUDA objects.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CPU_BINDINGS = ROOT / "csrc" / "bindings" / "cpu.cpp"
CUDA_BINDINGS = ROOT / "csrc" / "bindings" / "cuda.cpp"
NO_CUDA_BINDINGS = ROOT / "csrc" / "bindings" / "no_cuda.cpp"
#: On Windows setuptools compiles with MSVC, which cannot build the kernels: they are C++ for g++ and clang++.
COMPILERS = ("cl",) if os.name == "nt" else ("c++", "g++", "clang++")
#: Compiles only if the compiler has what the extension needs and finds Python's headers.
PROBE = """
#include <Python.h>
#include <atomic>
#include <bit>
#if !defined(__GNUC__)
#error "the kernels are C++ for g++ and clang++"
#endif
constexpr int log2_of_64 = std::countr_zero(64u);
static_assert(log2_of_64 == 6);
void wait_while(std::atomic<int>& word, int value) { word.wait(value); }
"""
#: The default is one architecture: it compiles fast, and its PTX serves every later GPU.
DEFAULT_CUDA_ARCHS = "80"
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-Wall",
    "-fvisibility=hidden",
    # The format rounds after every product. GCC would contract a * b + c to an FMA. (CUDA code calls __fmul_rn.)
    "-ffp-contract=off",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-lineinfo",  # profilers name source lines; it changes no instruction
    "-Xcompiler",
    "-fPIC,-Wall",  # not hidden: the tests link the launchers to a stub of the CUDA runtime
    f"-I{ROOT / 'csrc'}",
]
#: compile_cuda keeps its results here: one folder per set of GPUs.
CUDA_OBJECTS = ROOT / "build" / "cuda"


def choice(name: str) -> str:
    """The value of an environment variable: "0", "1", or "" if it is unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return value


def has_limited_api() -> bool:
    """Whether this Python has a limited API, by which one extension serves every later Python.

    Free-threaded builds have none.
    """
    return not sysconfig.get_config_var("Py_GIL_DISABLED")


def cxx_flags() -> list[str]:
    """The compiler's options for every C++ file of the extension."""
    return [*CXX_FLAGS, *(["-DPy_LIMITED_API=0x030A0000"] if has_limited_api() else [])]


def python_include_flags() -> list[str]:
    """The compiler's options that find Python.h."""
    return [f"-I{folder}" for folder in sorted({sysconfig.get_path("include"), sysconfig.get_path("platinclude")})]


def find_compiler() -> str | None:
    """The C++ compiler's command: $CXX, else the first of COMPILERS on PATH, else None."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return next((candidate for candidate in candidates if shutil.which(shlex.split(candidate)[0])), None)


def missing_native_reason() -> str | None:
    """One line that says why the extension is not built; None if it is."""
    if choice("LOWBIT_NATIVE"):
        return None if choice("LOWBIT_NATIVE") == "1" else "LOWBIT_NATIVE=0 was set"
    compiler = find_compiler()
    if compiler is None:
        return f"no C++ compiler was found (tried {os.environ.get('CXX') or ', '.join(COMPILERS)})"
    command = [*shlex.split(compiler), *cxx_flags(), *python_include_flags(), "-fsyntax-only", "-x", "c++", "-"]
    try:
        done = subprocess.run(command, input=PROBE, capture_output=True, text=True)
    except OSError as error:
        return f"the C++ compiler {compiler} did not start ({error})"
    if done.returncode == 0:
        return None
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    said = next((line for line in said if "error" in line), said[0] if said else f"exit status {done.returncode}")
    return f"the C++ compiler {compiler} cannot build them, which need g++ or clang++, C++20, Python.h ({said.strip()})"


def find_nvcc() -> Path | None:
    """The CUDA compiler: on PATH, or under CUDA_HOME."""
    candidates = [shutil.which("nvcc")]
    if os.environ.get("CUDA_HOME"):
        candidates.append(shutil.which("nvcc", path=Path(os.environ["CUDA_HOME"], "bin")))
    return next((Path(found) for found in candidates if found), None)


def cuda_library_flags() -> list[str]:
    """The linker's -L options, as nvcc prints them: nvcc may be a wrapper anywhere on PATH."""
    command = [str(find_nvcc()), "--dryrun", "-c", str(ROOT / "csrc" / "cuda" / "device.cu")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall(r'-L[^"]+', next(line for line in output.splitlines() if line.startswith("#$ LIBRARIES=")))


def wants_cuda() -> bool:
    """Whether to build the CUDA half of the extension."""
    if choice("LOWBIT_CUDA") == "1" and find_nvcc() is None:
        raise SystemExit("LOWBIT_CUDA=1: nvcc not found on PATH or under CUDA_HOME: install the CUDA toolkit")
    return choice("LOWBIT_CUDA") != "0" and find_nvcc() is not None


def cuda_archs() -> tuple[str, ...]:
    """The numbers of the architectures to compile for, in ascending order."""
    archs = os.environ.get("LOWBIT_CUDA_ARCHS") or DEFAULT_CUDA_ARCHS
    if not re.fullmatch(r"\d+(,\d+)*", archs):
        raise SystemExit(f'LOWBIT_CUDA_ARCHS: expected numbers like "80,90", got {archs!r}')
    return tuple(sorted(archs.split(","), key=int))


def gencodes(archs: tuple[str, ...]) -> dict[str, list[str]]:
    """The virtual architecture of some PTX -> what is made of it; the last PTX is kept too, for later GPUs.

    The kernels use no instruction that an Ampere lacks: nvcc makes the same PTX for all from sm_80 to sm_90, but for
    its name. Made once, it takes a fifth off the build for 80, 90 and 120. For sm_120 ptxas makes worse code of it.
    """
    made: dict[str, list[str]] = {}
    for arch in archs:
        shared = next((earlier for earlier in made if 80 <= int(earlier) <= int(arch) <= 90), arch)
        made.setdefault(shared, []).append(f"sm_{arch}")
    made[list(made)[-1]].append(f"compute_{list(made)[-1]}")
    return made


def compile_cuda(source: Path, archs: tuple[str, ...]) -> Path:
    """The object file of one .cu file: machine code for each architecture and PTX for later ones.

    A file of the same name with the suffix .ptx holds the PTX of the first. Nothing is compiled if the compiler, its
    options, the source and all headers of csrc are those of the last time.
    """
    folder = CUDA_OBJECTS / "_".join(archs)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}.o"
    nvcc, stamp = str(find_nvcc()), target.with_suffix(".made_of")
    codes = [f"-gencode=arch=compute_{of},code=[{','.join(made)}]" for of, made in gencodes(archs).items()]
    command = [nvcc, *NVCC_FLAGS, *codes]
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    made_of = hashlib.sha256(version + str(command).encode())
    headers = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh"))
    for path in (source, *sorted(headers)):
        made_of.update(hashlib.sha256(path.read_bytes()).digest())
    if not (target.exists() and stamp.exists() and stamp.read_text() == made_of.hexdigest()):
        stamp.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as intermediate:
            command += ["--keep", "--keep-dir", intermediate, "-c", str(source), "-o", str(target)]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
            # nvcc leaves the architecture out of the name where there is only one.
            name = f"{source.stem}.compute_{archs[0]}.ptx" if len(codes) > 1 else f"{source.stem}.ptx"
            Path(intermediate, name).rename(target.with_suffix(".ptx"))
        stamp.write_text(made_of.hexdigest())
    return target


class BuildPython(build_py):
    """Copies the Python files that exist now, and no others."""

    missing_native: str | None = None  # why the extension is not built

    def run(self):
        # Modules left by an earlier build, and removed from the sources since, would be installed with the others.
        if not self.editable_mode:
            for package in ("lowbit", "lowbit_lora"):
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()
        if self.missing_native and not self.editable_mode:
            Path(self.build_lib, "lowbit", "native_missing.txt").write_text(self.missing_native + "\n")


def pure_build(reason: str) -> dict:
    """The setup() arguments for a wheel without lowbit._C, which says why."""
    print(f"lowbit: building without native kernels: {reason}", file=sys.stderr)
    return {"cmdclass": {"build_py": type("BuildPurePython", (BuildPython,), {"missing_native": reason})}}


def native_build() -> dict:
    """The setup() arguments that build lowbit._C."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"lowbit: torch is needed to build the native kernels and cannot be imported here ({error}): `pip install "
            "torch` first, or leave out --no-build-isolation, or leave out the kernels with LOWBIT_NATIVE=0"
        ) from error

    if find_compiler():
        os.environ.setdefault("CXX", find_compiler())  # torch and setuptools would look for c++ only
    cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if wants_cuda() else []
    cuda_bindings = CUDA_BINDINGS if cuda_sources else NO_CUDA_BINDINGS
    sources = [CPU_BINDINGS, cuda_bindings, *sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))]
    extension = CppExtension(
        "lowbit._C",
        [str(source.relative_to(ROOT)) for source in sources],
        depends=[str(header.relative_to(ROOT)) for header in sorted((ROOT / "csrc").rglob("*.h"))],
        py_limited_api=has_limited_api(),
        extra_compile_args=cxx_flags(),
    )
    # CppExtension also links torch and torch_python, which are not part of the stable ABI.
    extension.libraries = ["torch_cpu", "c10"]
    if cuda_sources:
        # Not CUDAExtension: it links libraries that torch's CPU wheel lacks.
        extension.extra_link_args += [*cuda_library_flags(), "-lcudart_static", "-ldl", "-lpthread", "-lrt"]

    class Build(BuildExtension):
        def build_extensions(self):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_cuda(source, cuda_archs()), cuda_sources)
                extension.extra_objects = [str(path) for path in objects]
            super().build_extensions()

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build, "build_py": BuildPython},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if has_limited_api() else {},
    }


if __name__ == "__main__":
    missing = missing_native_reason()
    setup(**(native_build() if missing is None else pure_build(missing)))
