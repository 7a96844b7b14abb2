"""What the emulator's tests share: kernels written in PTX, CUDA sources compiled once, bf16 in numpy."""

import functools
from pathlib import Path

import numpy as np
import pytest
from ptxemu import load
from ptxemu.toolchain import NVCC_MISSING, compile_ptx, have_nvcc

KERNELS = Path(__file__).parent / "kernels"
needs_nvcc = pytest.mark.skipif(not have_nvcc(), reason=NVCC_MISSING)

HEADER = ".version 8.4\n.target sm_{arch}\n.address_size 64\n"
_REGISTER_TYPE = {"u16": "b16", "s16": "b16", "u32": "b32", "s32": "b32", "u64": "b64", "s64": "b64"}
NUMPY_TYPE = {
    "u16": np.uint16,
    "s16": np.int16,
    "b16": np.uint16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "u64": np.uint64,
    "s64": np.int64,
    "f32": np.float32,
    "f64": np.float64,
}


def elementwise_ptx(name, result, sources, body):
    """Kernel ``d = body(a, b, c, e)`` on one element per thread of one block; ``body`` is PTX on those registers."""
    names = "abce"[: len(sources)]
    parameters = ",\n".join(f".param .u64 {name}_{p}" for p in (*names, "d"))
    declarations = "".join(f".reg .{_REGISTER_TYPE.get(t, t)} {n};\n" for n, t in zip(names, sources, strict=True))
    loads = ""
    for n, t in zip((*names, "d"), (*sources, result), strict=True):
        loads += f"ld.param.u64 p{n}, [{name}_{n}]; mad.wide.u32 p{n}, tid, {NUMPY_TYPE[t]().itemsize}, p{n};\n"
        if n != "d":
            loads += f"ld.global.{t} {n}, [p{n}];\n"
    return f""".visible .entry {name}({parameters}) {{
.reg .b64 pa, pb, pc, pe, pd;
.reg .b32 tid;
.reg .{_REGISTER_TYPE.get(result, result)} d;
{declarations}mov.u32 tid, %tid.x;
{loads}{body}
st.global.{result} [pd], d;
ret;
}}
"""


def elementwise_module(cases, arch="80"):
    """{name: (result type, source types, body)} -> Module with a kernel per case."""
    return load(HEADER.format(arch=arch) + "".join(elementwise_ptx(name, *case[:3]) for name, case in cases.items()))


def run_elementwise(module, name, result, *sources):
    """Launch one case on arrays of equal length (at most 1024) -> its results."""
    out = np.zeros(len(sources[0]), NUMPY_TYPE[result])
    module.launch(name, 1, len(out), [*sources, out], detect_races=False, counters=False)
    return out


@functools.cache
def cuda_module(file_name, arch="sm_80", flags=()):
    """A source of tools/ptxemu/tests/kernels, compiled once per session."""
    return compile_ptx(KERNELS / file_name, arch=arch, flags=flags)


def bf16_bits(x):
    """Rounded to nearest even; not for NaN."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)
