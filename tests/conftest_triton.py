"""What the tests of the Triton kernels share.

Two ways to run one without a GPU. Under ``TRITON_INTERPRET=1``, a process of its own, Triton's interpreter runs the
kernels on CPU tensors (``interpreted``). Otherwise ``launches`` collects what a call would launch; ``compiled`` makes
machine code of such a launch for any GPU, with what the launch would specialize on, and ``emulate`` runs its PTX (for
sm_80 or sm_90) on the emulator, on the call's own tensors.
"""

import contextlib
import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import torch

from lowbit.backends import triton as backend

triton = pytest.importorskip("triton", reason="Triton is not installed")

#: Marks a test that Triton's interpreter runs (conftest.py skips it elsewhere), and one that it cannot.
interpreted = pytest.mark.interpreted
compiled_only = pytest.mark.skipif(backend.INTERPRETED, reason="compiles: not under TRITON_INTERPRET=1")

#: The GPUs that kernels are compiled for in the tests, and the bytes of shared memory that a block may have there.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx1100": 64 * 1024,
}
TARGETS = tuple(SHARED_MEMORY)


def gpu_target(name: str):
    """Triton's description of "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


@dataclasses.dataclass
class Launch:
    """What a function of lowbit.backends.triton passed to ``launch``."""

    kernel: object
    grid: tuple[int, ...]
    arguments: tuple
    options: dict

    def __post_init__(self):
        names = [parameter.name for parameter in self.kernel.params]
        self.compiler_options = {name: value for name, value in self.options.items() if name not in names}
        self.values = dict(zip(names, self.arguments, strict=False))
        self.values.update({name: value for name, value in self.options.items() if name in names})


def _capability(target: str) -> tuple[int, int] | None:
    return divmod(int(target[3:]), 10) if target.startswith("sm_") else None


@contextlib.contextmanager
def launches(monkeypatch, target: str | None = None):
    """A list of the launches made meanwhile; none is run. With a target those that its GPU would get.

    That is: with inline assembly or without, and configurations for what ``capability`` then says.
    """
    collected = []

    def collect(kernel, grid, *arguments, **options):
        if 0 not in grid:
            collected.append(Launch(kernel, (*grid, 1, 1)[:3], arguments, options))

    from lowbit.backends.triton import gpu

    with monkeypatch.context() as patch:
        if target is not None:
            patch.setattr(gpu, "capability", lambda device: _capability(target))
        for name in {*backend.MODULES.values(), "splits"}:
            module = importlib.import_module(f"lowbit.backends.triton.{name}")
            if hasattr(module, "launch"):
                patch.setattr(module, "launch", collect)
            if target is not None:
                patch.setattr(module, "PORTABLE", not target.startswith("sm_"), raising=False)
        yield collected


def tile_of_a_layer(configs, k=4096, **wanted):
    """A chooser of configurations like ``configs`` (of shapes_forward or shapes_backward) that takes the one with the
    ``wanted`` fields which the GPU would have for layers of 4096 x k.
    """

    def chosen(problem, gpu):
        found = []
        for rows in (16, 64, 512):
            layer = dataclasses.replace(problem, m=rows * max(problem.experts, 1), n=4096, k=k)
            found += [c for c in configs(layer, gpu) if all(getattr(c, name) == wanted[name] for name in wanted)]
        assert found, f"{gpu} has no tile with {wanted}"
        return found[:1]

    return chosen


_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compiled(launch: Launch, target: str):
    """The compiled kernel of a launch for ``target``, specialized as Triton would at run time."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.values.get(parameter.name, parameter.default)
        name = parameter.name
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialized):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and specialized:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"enable_fp_fusion": False, **launch.compiler_options}
    return triton.compile(source, target=gpu_target(target), options=options), signature


def _memory(value):
    """What the emulator takes for an argument: of a tensor with strides the memory that they span."""
    if isinstance(value, torch.Tensor) and not value.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        return value.as_strided([last + 1], [1])
    return value


def emulate(launch: Launch, ends: dict[str, torch.Tensor] | None = None, target: str = "sm_80", **options):
    """Run a launch's PTX for ``target`` on the emulator, on the launch's own (CPU) tensors; returns what it counted.

    ``ends``: by argument the last elements of a tensor, all of it that there is memory for (it may be a meta tensor).
    """
    emulator = pytest.importorskip("emulator")
    kernel, signature = compiled(launch, target)
    arguments = []
    for name, kind in signature.items():
        argument, end = launch.values[name], (ends or {}).get(name)
        if end is not None:
            argument = emulator.Pointer(end, end.nbytes - argument.nbytes)
        if kind != "constexpr":
            arguments.append(_memory(argument))
    result = emulator.load(kernel.asm["ptx"]).launch(
        kernel.metadata.name,
        grid=launch.grid,
        block=32 * kernel.metadata.num_warps,
        args=arguments,
        shared=kernel.metadata.shared,
        pad_args=True,
        device=emulator.Device.for_arch(target),
        **options,
    )
    # LLVM builds a word of bytes in steps, the first of them with an undefined register for bytes still to come.
    warnings = [warning for warning in result.warnings if not ("never written" in warning and ": prmt.b32" in warning)]
    assert not warnings, warnings
    return result


def machine_code(kernel, target: str, folder: Path):
    """The one ``machine_code.Kernel`` of a kernel compiled for an NVIDIA target: instructions, loops, registers."""
    from sass import disassemble

    cubin = folder / f"{kernel.metadata.name}.{target}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (found,) = disassemble(cubin, target)
    return found


def spilled(kernel, target: str, folder: Path) -> int:
    """Bytes of memory per thread that a compiled kernel uses for want of registers."""
    if target.startswith("gfx"):
        # Scalar registers that spill do so to lanes of vector registers.
        (scratch,) = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", kernel.asm["amdgcn"])
        return int(scratch)
    from sass import resources

    cubin = folder / f"{kernel.metadata.name}.{target}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return sum(sum(numbers[1:]) for numbers in resources(cubin, target).values())
