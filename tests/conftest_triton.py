"""What the tests of the Triton kernels share.

Two ways to run one without a GPU. Under ``TRITON_INTERPRET=1``, a process of its own, Triton's interpreter runs the
kernels on CPU tensors (``interpreted``). Otherwise ``launches`` collects what a call would launch; ``compiled`` makes
machine code of such a launch for any GPU, with what the launch would specialize on, and ``emulate`` runs its PTX (for
sm_80 or sm_90) on the emulator, on the call's own tensors.
"""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest_cuda import ROOT

from lowbit.backends import triton as backend

sys.path.append(str(ROOT / "benchmarks"))  # where predict_gpu.py counts with the same code
from machine_code import resources  # noqa: E402
from triton_code import Launch, compiled, function, gpu_target, launches, machine_code, tensor, weight  # noqa: E402

pytest.importorskip("triton", reason="Triton is not installed")

__all__ = [
    "SHARED_MEMORY",
    "TARGETS",
    "compiled",
    "compiled_only",
    "emulate",
    "function",
    "gpu_target",
    "interpreted",
    "launches",
    "machine_code",
    "spilled",
    "tensor",
    "tile_of_a_layer",
    "weight",
]

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


def spilled(kernel, target: str, folder: Path) -> int:
    """Bytes of memory per thread that a compiled kernel uses for want of registers."""
    if target.startswith("gfx"):
        # Scalar registers that spill do so to lanes of vector registers.
        (scratch,) = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", kernel.asm["amdgcn"])
        return int(scratch)
    cubin = folder / f"{kernel.metadata.name}.{target}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return sum(sum(numbers[1:]) for numbers in resources(cubin, target).values())
