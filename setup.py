"""Builds the extension ``lowbit._C`` against torch's stable ABI and Python's limited API: one wheel per platform.

LOWBIT_NATIVE=0 leaves the extension out, LOWBIT_NATIVE=1 insists on it; unset, it is built where a C++ compiler is
found, and the library falls back on its pure-torch backend where none is.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")


def wants_native() -> bool:
    """Whether to build the extension."""
    choice = os.environ.get("LOWBIT_NATIVE", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"LOWBIT_NATIVE: expected 0 or 1, got {choice!r}")
    if choice:
        return choice == "1"
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else COMPILERS
    found = any(shutil.which(candidate) for candidate in candidates)
    if not found:
        print(
            f"lowbit: no C++ compiler found (tried {', '.join(candidates)}): building without native kernels",
            file=sys.stderr,
        )
    return found


def native_build() -> dict:
    """The setup() arguments that build lowbit._C."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    extension = CppExtension(
        "lowbit._C",
        [str(source.relative_to(ROOT)) for source in sources],
        depends=[str(header.relative_to(ROOT)) for header in sorted((ROOT / "csrc").rglob("*.h"))],
        py_limited_api=True,
        extra_compile_args=[
            "-O3",
            "-std=c++20",
            "-Wall",
            "-fvisibility=hidden",
            # The format rounds after every product; GCC would contract a * b + c to an FMA.
            "-ffp-contract=off",
            "-DPy_LIMITED_API=0x030A0000",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        ],
    )
    # CppExtension also links torch and torch_python, which are not part of the stable ABI.
    extension.libraries = ["torch_cpu", "c10"]
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**(native_build() if wants_native() else {}))
