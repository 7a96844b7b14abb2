"""What the tests of the Triton kernels share.

There are two ways to run a kernel without a GPU. In a process with ``TRITON_INTERPRET=1``, Triton's interpreter runs
it on CPU tensors (``interpreted``). Elsewhere, ``launches`` collects what a call would launch, ``compiled`` makes
machine code of such a launch for any GPU, with the launch's own specialization, and ``emulate`` runs its PTX for sm_80
or sm_90 on the emulator, on the call's own tensors.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, FORMATS
from codegen import triton_code
from codegen.machine_code import resources
from codegen.triton_code import (
    Launch,
    function,
    gpu_target,
    key_of,
    launches,
    machine_code,
    specialized,
    tensor,
    weight,
)
from ptxemu import proofs
from ptxemu.address_space import Struct

from lowbit.backends import triton as backend
from lowbit.backends.triton import shapes
from lowbit.backends.triton.shapes import Gpu, Problem
from lowbit.format import WeightSpec

pytest.importorskip("triton", reason="Triton is not installed")

__all__ = [
    "A100",
    "SHARED_MEMORY",
    "TARGETS",
    "Kind",
    "compiled",
    "compiled_only",
    "emulate",
    "every_kind",
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

A100 = Gpu(80, 108)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Code that an A100 may run: a configuration, and a weight for which it is chosen.

    ``more_columns``: those of a row of W beyond whole tiles.
    """

    config: object
    dtype: torch.dtype
    format: str
    block_size: int
    more_columns: int

    def __str__(self):
        tile = "x".join(str(size) for size in dataclasses.astuple(self.config)[:3])
        products = f"x{self.config.products}" if getattr(self.config, "products", 1) > 1 else ""
        name = f"{tile}{products}-{self.config.warps}_warps-{str(self.dtype).removeprefix('torch.')}-{self.format}"
        blocks = f"-blocks_of_{self.block_size}" if self.format != "int8" else ""
        ragged = f"-{self.more_columns}_more_columns" if self.more_columns else ""
        return f"{name}{blocks}{ragged}{'-in_parts' if self.config.splits > 1 else ''}"

    def columns(self, least: int, multiple: int) -> int:
        """The columns of a small W of this kind: at least so many in whole tiles and blocks, and those beyond."""
        whole = math.lcm(multiple, max(self.block_size, 1))
        return math.ceil(least / whole) * whole + self.more_columns


def every_kind(op: str, masked_beyond: int, experts: int = 0) -> list[Kind]:
    """Each kind of code that an A100 runs for "linear" or "linear_grad_input", first or for autotune.

    The choosers are asked for so many sizes that no tile is left out. Each kind comes once: for one matrix with the sum
    in one part; for a stack, and for ragged rows of int8, in two parts where possible (more are the same code). bf16
    and fp16 differ in instructions, formats in the numbers of a table. Both have their own tests, so fp16 and fp4 are
    used for sums in parts.

    ``masked_beyond``: rows of int8 need a mask for the columns beyond multiples of it.
    """
    weights = [(format, size) for size in BLOCK_SIZES for format in FORMATS] + [("int8", 0)]
    kinds = {}
    for dtype, (format, block_size), k, rows, n in itertools.product(
        DTYPES, weights, (64, 96, 4096, 4160, 4128, 4101), (1, 4, 8, 16, 32, 64, 256), (512, 4096)
    ):
        problem = Problem(op, rows * max(experts, 1), n, k, dtype, WeightSpec(format, block_size), experts)
        if not problem.has_whole_blocks or (not experts and shapes.decodes_first(problem, A100)):
            continue
        is_int8, is_fp32 = format == "int8", dtype == torch.float32
        for config in shapes.configs(problem, A100):
            config = dataclasses.replace(config, splits=min(config.splits, 2))
            code = [dataclasses.replace(config, splits=1), is_fp32, is_int8]
            if is_int8 and not experts:  # how wide its loads are, and whether 16 bits have masks
                code += [k % 16 == 0, k % masked_beyond == 0 or is_fp32]
            kind = Kind(config, dtype, format, block_size, k % 64 if is_int8 else 0)
            kinds.setdefault(tuple(code), []).append(kind)

    def distance(kind):
        """From the one to take. Blocks of 128 are several steps of some tiles."""
        in_parts = kind.config.splits > 1
        return (
            in_parts != bool(experts or kind.more_columns),
            abs(kind.block_size - (128 if experts else 64)),
            (kind.dtype == torch.float16) != in_parts,
            (kind.format == "fp4") != in_parts,
        )

    return [min(found, key=distance) for found in kinds.values()]


def tile_of_a_layer(k=4096, **wanted):
    """A chooser like ``shapes.configs`` of the one with the ``wanted`` fields which the GPU would have for layers
    of 4096 x k. A field that is a dictionary is wanted by op.
    """
    configs = shapes.configs  # a test replaces it by what is returned

    def chosen(problem, gpu):
        fields = {name: want[problem.op] if isinstance(want, dict) else want for name, want in wanted.items()}
        found = []
        for rows in (16, 64, 512):
            layer = dataclasses.replace(problem, m=rows * max(problem.experts, 1), n=4096, k=k)
            found += [c for c in configs(layer, gpu) if all(getattr(c, name) == fields[name] for name in fields)]
        assert found, f"{gpu} has no tile with {fields}"
        return found[:1]

    return chosen


def _memory(value):
    """The emulator's form of an argument. Of a tensor with strides it is the memory that they span."""
    if isinstance(value, torch.Tensor) and not value.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        return value.as_strided([last + 1], [1])
    return value


def _has_addresses(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.int64 and not value.is_meta


def _readdressed(value, reached: Sequence[torch.Tensor], addresses: Iterable[int]):
    """An argument; in a table of addresses those in the tensors' storages are as if the tensors began at these."""
    if not _has_addresses(value):
        return value
    changed = value.clone()
    for memory, address in zip(reached, addresses, strict=True):
        storage = memory.untyped_storage()
        inside = (value >= storage.data_ptr()) & (value < storage.data_ptr() + storage.nbytes())
        changed[inside] = value[inside] - memory.data_ptr() + address
    return changed


class _Table(Struct):
    """The emulator's form of a table of addresses: a pointer to it, with those of the emulator in it."""

    def __init__(self, table: torch.Tensor, reached: Sequence[torch.Tensor]):
        super().__init__(bytes(8), {})
        self._table, self._reached = table, reached

    def with_addresses(self, address_of):
        """Return the table; ``address_of`` returns the emulator's address of a tensor."""
        return _readdressed(self._table, self._reached, map(address_of, self._reached))


def _told_by(launch: Launch, target: str, reached: Sequence[torch.Tensor]):
    """All that decides what a launch does: code, grid and arguments. Where memory lies decides nothing."""
    signature, *_ = specialized(launch)
    ends = list(itertools.accumulate(memory.nbytes for memory in reached))
    yield from (key_of(launch, target), launch.grid)
    for name, kind in signature.items():
        yield from (name, kind, _readdressed(launch.values[name], reached, ends) if kind != "constexpr" else None)


def _prove(launch: Launch, target: str, *inputs, reached: Sequence[torch.Tensor] = ()) -> None:
    """Take a step of the running test's proof: all that was launched together, before any of it is compiled."""
    if not proofs.has_taken(launch.together):
        told = (part for each in launch.together for part in _told_by(each, target, reached))
        proofs.step(target, *inputs, *reached, *told, of=launch.together)


def compiled(launch: Launch, target: str):
    """The compiled kernel of a launch for ``target``, and its signature: a step of the running test's proof."""
    _prove(launch, target)
    return triton_code.compiled(launch, target)


def emulate(
    launch: Launch,
    ends: dict[str, torch.Tensor] | None = None,
    target: str = "sm_80",
    reached: Sequence[torch.Tensor] = (),
    **options,
):
    """Run a launch's PTX for ``target`` on the emulator, on the launch's own (CPU) tensors; returns what it counted.

    ``ends`` has, by argument, the last elements of a tensor. Only these have memory (the tensor may be on meta).
    ``reached`` are tensors that int64 arguments lead to, of all launches that were made together, one of each storage.
    The rest of its storage has no memory.
    """
    emulator = pytest.importorskip("ptxemu")
    told = (*sum((ends or {}).items(), ()), *(f"{name}={value}" for name, value in options.items()))
    _prove(launch, target, *told, reached=reached)
    kernel, signature = triton_code.compiled(launch, target)
    arguments = []
    for name, kind in signature.items():
        argument, end = launch.values[name], (ends or {}).get(name)
        if end is not None:
            argument = emulator.Pointer(end, end.nbytes - argument.nbytes)
        if kind != "constexpr":
            arguments.append(_Table(argument, reached) if _has_addresses(argument) else _memory(argument))
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
    """Bytes of memory per thread that a compiled kernel uses because registers ran out."""
    if target.startswith("gfx"):
        # Scalar registers that spill do so to lanes of vector registers.
        (scratch,) = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", kernel.asm["amdgcn"])
        return int(scratch)
    cubin = folder / f"{kernel.metadata.name}.{target}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return sum(stack + local for _, stack, _, local in resources(cubin, target).values())
