"""What the compiled CUDA kernels cost: instructions per weight, registers, width of accesses. No GPU is needed.

DRAM leaves each weight some issue slots (docs/verification.md has figures); a change that takes many more of them than
today fails here.
"""

import re

import pytest
from conftest_cuda import CSRC, SOURCES
from sass import ARCHS, Kernel, count, kernels

CUDA = CSRC / "cuda"
BYTES_PER_ACCESS = 16


def kernels_of(source: str, name: str) -> list[Kernel]:
    found = [kernel for kernel in kernels(CUDA / source) if name in kernel.name]
    assert {kernel.arch for kernel in found} == set(ARCHS)
    return found


@pytest.mark.parametrize("source", [source.name for source in SOURCES if source.name != "device.cu"])
def test_no_kernel_spills(source):
    """A register on the stack is a trip to memory in the loop that memory already limits."""
    for kernel in kernels(CUDA / source):
        body = [text for _, text in kernel.instructions]
        assert (kernel.stack, kernel.local) == (0, 0), kernel.name
        assert not count(body, "LDL") and not count(body, "STL"), kernel.name


@pytest.mark.parametrize(
    ("name", "weights_per_byte", "scale_loads"), [("dequantize_kernel", 2, 3), ("dequantize_int8_kernel", 1, 0)]
)
def test_dequantize_budget(name, weights_per_byte, scale_loads):
    """At most 5 instructions per weight (bitsandbytes 0.50.2: 24), packed bytes and output in 16-byte accesses only."""
    for kernel in kernels_of("dequantize.cu", name):
        loop = kernel.smallest_loop("LDG.128", "STG.128")
        tiles = count(loop, "LDG.128")
        weights = tiles * BYTES_PER_ACCESS * weights_per_byte
        assert len(loop) <= 5 * weights, f"{kernel.name} for {kernel.arch}: {len(loop) / weights:.2f} per weight"
        assert count(loop, "STG") == count(loop, "STG.128"), kernel.name
        assert count(loop, "LDG") - tiles <= scale_loads * tiles, kernel.name
        assert kernel.registers <= 80, kernel.name


@pytest.mark.parametrize(("source", "name"), [("quantize.cu", "15quantize_kernel"), ("search.cu", "encode_kernel")])
def test_quantize_budget(source, name):
    """At most 36 instructions per weight: done once per weight; a branch in the code search would double it."""
    for kernel in kernels_of(source, name):
        loop = kernel.smallest_loop("LDG.128", "STG.128")
        bytes_stored = count(loop, "STG.128") * BYTES_PER_ACCESS
        assert len(loop) <= 36 * 2 * bytes_stored, f"{kernel.name}: {len(loop) / 2 / bytes_stored:.1f} per weight"
        # absmax is stored by one lane of each block.
        assert count(loop, "STG") - count(loop, "STG.128") <= 8


#: Instructions per 64 weights of a lane in the gemm's main loop, by rows of x in a tile; NOPs (a warp then waits for
#: its tensor core) left out. Counted: 163 to 198, 206 to 252, 274 to 313, of which 16, 32 and 64 are HMMA.
GEMM_INSTRUCTIONS = {16: 210, 32: 265, 64: 330}


def is_padding(text: str) -> bool:
    return text.startswith(("NOP", "UIADD3 URZ, URZ, URZ, URZ"))


def test_gemm_budget():
    """What its main loop reads and how, one barrier per tile, four stages, no decoded weight in shared memory."""
    for kernel in kernels_of("gemm.cu", "11gemm_kernel"):
        rows, scale_columns, double_quant = map(int, re.search(r"Li(\d+)ELi(\d+)ELb(\d)E", kernel.name).groups())
        loop = kernel.smallest_loop("HMMA", "LDGSTS")
        # x and packed weights: two pieces of each per thread and tile, whatever the number of rows.
        assert count(loop, "LDGSTS") == count(loop, "LDGSTS.128") == 4, kernel.name
        assert count(loop, "LDG") == (3 if double_quant else 1) * (64 // scale_columns), kernel.name
        assert not count(loop, "STS") and not count(loop, "STG") and not count(loop, "ATOMS"), kernel.name
        assert count(loop, "BAR") == 1, kernel.name
        # Waits until two of its tiles at most are under way, beside the one that it multiplies.
        assert [text.split()[-1] for text in loop if text.startswith("DEPBAR.LE SB0")] == ["0x2"], kernel.name
        assert kernel.registers <= 128, kernel.name
        if scale_columns == 32:
            continue  # an inner loop, whose instructions count twice
        assert count(loop, "HMMA.16816.F32") == count(loop, "HMMA") == rows, kernel.name
        assert count(loop, "LDS.128") == rows // 4, kernel.name
        assert count(loop, "PRMT") <= 32 + 2, kernel.name
        instructions = sum(not is_padding(text) for text in loop)
        assert instructions <= GEMM_INSTRUCTIONS[rows], f"{kernel.name} for {kernel.arch}: {instructions / 64:.2f}"
