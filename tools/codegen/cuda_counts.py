"""What CUDA kernels cost per weight: lowbit's as nvcc compiles them here, bitsandbytes' from its wheel."""

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from .cuda_build import CSRC, kernels
from .instruction_costs import Counted, data_path_cycles, mma_macs
from .machine_code import Kernel, count, disassemble_once

CUDA, BITSANDBYTES = "lowbit", "bitsandbytes"
_REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Loop:
    """A kernel's main loop: where to find it, and how many weights a lane handles in it.

    ``kernel`` is a pattern of the mangled name. Its group ``rows``, if it has one, is the number of rows of x that one
    reading of W serves; otherwise the field ``rows`` is (0: W is only decoded). So is ``columns``, of the output in a
    tile. ``weights`` counts weights per
    instruction of an opcode of the loop. With ``per_row_tile`` it is divided by rows / 8, because the mma of several
    row tiles meet one weight.
    """

    operation: str
    library: str
    source: str  # under csrc/cuda, or BITSANDBYTES
    kernel: str
    holds: tuple[str, ...]
    weights: dict[str, float]
    rows: int = 0
    per_row_tile: bool = False
    columns: int = 0  # as Counted's, as the next
    splits_k: bool = True
    warps: int = 8


#: Kernels that this build lacks are left out, and reported.
LOOPS = (
    Loop("dequantize", CUDA, "dequantize.cu", r"17dequantize_kernelI\w*4Bf16ELb1E\w*5WholeE",
         ("LDG.128", "STG.128"), {"LDG.128": 32}),
    Loop("linear", CUDA, "gemv.cu", r"gemv_mma_kernelI\w*4Bf16ELi2ELi4E", ("HMMA.16816",), {"HMMA.16816": 8}, 4),
    Loop("linear", CUDA, "gemv.cu", r"gemv_mma_kernelI\w*4Bf16ELi2ELi8E", ("HMMA.16816",), {"HMMA.16816": 8}, 8),
    Loop("linear", CUDA, "gemm.cu", r"gemm_kernelI\w*4Bf16ELi(?P<rows>\d+)ELi(?P<columns>\d+)ELi64ELb1E",
         ("HMMA.16816", "LDGSTS"), {"HMMA.16816": 8}, per_row_tile=True, warps=16),
    Loop("linear_grad_input", CUDA, "grad_input.cu", r"grad_input_mma_kernelI\w*4Bf16ELi(?P<rows>\d+)ELb1E",
         ("HMMA.16816", "LDGSTS"), {"HMMA.16816": 8}, per_row_tile=True),
    Loop("dequantize", BITSANDBYTES, BITSANDBYTES, r"kDequantizeBlockwiseI13__nv_bfloat16Li512ELi64ELi8ELi2E",
         ("LDG.U8", "STG"), {"STG.U16": 1, "STG.128": 8}),
    Loop("linear", BITSANDBYTES, BITSANDBYTES, r"gemm_4bit_simtI13__nv_bfloat16Li(?P<rows>\d+)E", ("LDG.EF.128",),
         {"LDG.EF.128": 32}),
    Loop("linear", BITSANDBYTES, BITSANDBYTES,
         r"gemm_4bit_sm80_m16n8k16I13__nv_bfloat16Li(?P<rows>\d+)ELi(?P<columns>\d+)E",
         ("LDG.EF", "HMMA"), {"LDG.EF.128": 32, "LDG.EF.64": 16}, splits_k=False),
)  # fmt: skip


def counted(loop: Loop, kernel: Kernel) -> Counted | None:
    """The loop's costs per weight; None if this compilation of the kernel has no such loop."""
    named = re.search(loop.kernel, kernel.name)
    fitting = [body for body in kernel.loops() if all(count(body, opcode) for opcode in loop.holds)]
    if not named or not fitting:
        return None
    body = min(fitting, key=len)
    rows, columns = (int(named.groupdict().get(name) or getattr(loop, name)) for name in ("rows", "columns"))
    weights = sum(count(body, opcode) * each for opcode, each in loop.weights.items())
    if loop.per_row_tile:
        weights /= rows / 8
    return Counted(
        loop.operation,
        loop.library,
        kernel.name,
        rows,
        len(body) / weights,
        data_path_cycles(body) / (32 * weights),
        mma_macs(body) / (32 * weights),
        columns=columns,
        splits_k=loop.splits_k,
        warps=loop.warps,
        resident=max(1, min(64 // loop.warps, _REGISTERS // (kernel.registers * 32 * loop.warps))),
    )


def library_of_bitsandbytes() -> Path | None:
    """The path of the newest CUDA library in bitsandbytes' wheel."""
    spec = importlib.util.find_spec(BITSANDBYTES)
    found = sorted(Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so")) if spec else []
    return found[-1] if found else None


@functools.cache
def kernels_of(source: str, arch: str) -> tuple[Kernel, ...]:
    """The kernels of a source of lowbit or of bitsandbytes' wheel; none if that is missing."""
    if source == BITSANDBYTES:
        library = library_of_bitsandbytes()
        return tuple(disassemble_once(library, arch)) if library else ()
    path = CSRC / "cuda" / source
    return kernels(path, arch) if path.exists() else ()


@functools.cache
def counts(arch: str) -> tuple[Counted, ...]:
    """The costs of every loop of :data:`LOOPS` that exists here."""
    found = (counted(loop, kernel) for loop in LOOPS for kernel in kernels_of(loop.source, arch))
    return tuple(entry for entry in found if entry)
