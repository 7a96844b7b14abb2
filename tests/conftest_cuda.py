"""What the tests of the CUDA kernels share: nvcc, and the launchers as the emulator runs them without a GPU."""

import contextlib
import dataclasses
import functools
import shutil
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension
from codegen.cuda_build import ARCHS, CSRC, SOURCES, compiled_all
from codegen.once import ROOT, made_once
from ptxemu import proofs

from lowbit import ops
from lowbit.format import WeightSpec

__all__ = [
    "CSRC",
    "DTYPE_CODES",
    "FORMAT_CODES",
    "ROOT",
    "SOURCES",
    "bias_arguments",
    "call",
    "emulator",
    "launchers",
    "multiprocessors",
]
__all__ += ["require_nvcc", "spec_of", "stub_bindings", "told_by_bindings", "told_by_sources", "unaligned", "written"]

LAUNCHERS = ROOT / "tests" / "cuda" / "launchers.cu"
STUB_BINDINGS = ROOT / "tests" / "cuda" / "stub_bindings.cpp"

#: The values of Dtype in csrc/dtype.h, and of the format argument in tests/cuda/launchers.cu.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMAT_CODES = {"nf4": 0, "fp4": 1, "int8": 2}


def require_nvcc() -> None:
    """Skip the test where there is no CUDA compiler."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc not found: the CUDA toolkit compiles the CUDA kernels")


def emulator(module: str):
    """A module of tools/ptxemu."""
    return pytest.importorskip(f"ptxemu.{module}")


@functools.cache
def launchers():
    """The launchers of csrc/cuda on the emulator's stub runtime.

    Besides its own checks the emulator looks for lanes of a warp that exchange data without __syncwarp, and for bytes
    that two threads write.
    """
    require_nvcc()
    hostlaunch = emulator("hostlaunch")
    found = compiled_all([LAUNCHERS, *SOURCES])
    objects = [each.object for each in found]
    folder = made_once("launchers", [*objects, hostlaunch.STUB], lambda folder: hostlaunch.link(objects, folder))
    modules = [emulator("module").Module(each.ptx.read_text()) for each in found]
    device = emulator("device").Device.for_arch(ARCHS[0])
    library = hostlaunch.load(folder / "launchers.so", modules, [each.source for each in found], device)
    library.options = {"warp_races": True, "detect_global_waw": True}
    library.on_device_change = lambda: library.call("lowbit_forget_gpus")
    return library


@functools.cache
def told_by_sources() -> str:
    """A hash of all that decides what launchers do: the PTX of every kernel and the sources of the host code."""
    launchers()
    paths = (*CSRC.glob("*.h"), *(CSRC / "cuda").rglob("*"), *LAUNCHERS.parent.iterdir())
    host = sorted(path for path in paths if path.is_file())
    ptx = [proofs.code_of(each.ptx.read_text()) for each in compiled_all([LAUNCHERS, *SOURCES])]
    return proofs.digest([*ptx, *(part for path in host for part in (path.name, path.read_bytes()))])


@functools.cache
def told_by_bindings() -> str:
    """A hash of what the bindings add to the launchers: their sources, those of the ops, and torch."""
    sources = [*_bindings_sources(), *sorted(Path(ops.__file__).parent.glob("*.py"))]
    return proofs.digest([torch.__version__, *(path.read_bytes() for path in sources)])


def _bindings_sources() -> list[Path]:
    return [STUB_BINDINGS, *sorted((CSRC / "bindings").iterdir())]


@functools.cache
def stub_bindings():
    """The path of the library made of tests/cuda/stub_bindings.cpp and the launchers."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ found")
    run, runtime = emulator("toolchain").run, launchers().path
    folder = torch.utils.cpp_extension.library_paths()[0]
    includes = [CSRC, *torch.utils.cpp_extension.include_paths()]
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    libraries = [runtime, f"-L{folder}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{folder}"]

    def make(made: Path) -> None:
        target = made / "stub_bindings.so"
        run("g++", *flags, *(f"-I{path}" for path in includes), STUB_BINDINGS, "-o", target, *libraries)

    headers = sorted(CSRC.rglob("*.h"))
    inputs = [torch.__version__, str(runtime), *flags, *_bindings_sources(), *headers]
    return made_once("stub_bindings", inputs, make) / "stub_bindings.so"


def call(function: str, *args) -> None:
    """Run a launcher of tests/cuda/launchers.cu on the default stream."""
    code = launchers().call(function, *args, None)
    assert code == 0, f"{function}: CUDA error {code}"
    for launch in launchers().launches:
        assert not launch.result.warnings, (launch.kernel, launch.result.warnings)
    launchers().launches[:-1] = []


@contextlib.contextmanager
def multiprocessors(count: int):
    """Context with a GPU so small that its warps go round their loops more than once."""
    device = launchers().device
    launchers().device = dataclasses.replace(device, sm_count=count)
    try:
        yield
    finally:
        launchers().device = device


def bias_arguments(bias: torch.Tensor | None) -> tuple:
    """A bias, or none, as launchers take it: with the code of its dtype."""
    return bias, 0 if bias is None else DTYPE_CODES[bias.dtype]


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element after a 16-byte boundary."""
    return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:]


def written(size: int, dtype: torch.dtype, aligned: bool = True) -> torch.Tensor:
    """Memory for a kernel to write, filled with a value that it has to replace."""
    tensor = torch.full((size,), 7, dtype=dtype)
    return tensor if aligned else unaligned(tensor)


def spec_of(format: str, block_size: int, double_quant: bool = False) -> str:
    """The spec of such a weight, as the ops take it."""
    return WeightSpec(format, block_size, double_quant).text
