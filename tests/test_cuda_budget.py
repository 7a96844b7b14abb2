"""What the compiled CUDA kernels cost: instructions per weight, registers, width of accesses. No GPU is needed.

DRAM leaves each weight some issue slots (docs/verification.md has figures); a change that takes many more of them than
today fails here.
"""

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


@pytest.mark.parametrize("rows", [8, 16, 32])
def test_grad_input_tensor_core_budget(rows):
    """Decoding on the way to the tensor cores: at most 5.2 instructions per weight, of which 3 look it up and scale it.

    (With scales in fp32 4.95.) At DRAM speed an H100 has 4.6 issue slots per weight, and 0.036 cycles of shared memory;
    a weight takes about 0.05 of those, most for its look-up. So the loop runs at 0.7 of DRAM speed there.
    """
    for kernel in kernels_of("grad_input.cu", "grad_input_mma_kernel"):
        if f"ELi{rows}E" not in kernel.name:
            continue
        loop = kernel.smallest_loop("HMMA.16816", "LDGSTS")
        weights = 8 * count(loop, "HMMA.16816") // (rows // 8)  # a lane holds 8 of the 256 of each A
        limit = 5.2 if "Lb1E" in kernel.name else 4.95
        assert len(loop) <= limit * weights, f"{kernel.name} for {kernel.arch}: {len(loop) / weights:.2f} per weight"
        grad_copies = max(1, rows // 16)
        # W through 16-byte copies, 32 weights each; decoded ones never go back to shared memory, only scales do.
        assert count(loop, "LDGSTS") == count(loop, "LDGSTS.128") == weights // 32 + grad_copies
        assert count(loop, "STS") <= 2 and not any(count(loop, f"STS.{width}") for width in (64, 128))
        assert count(loop, "LDG") <= 6 and not count(loop, "LDG.128")  # scales: code, group, map, of two rows at most
        assert count(loop, "LDS.64") <= weights / 2 + 6 and count(loop, "SHFL") == 0
        assert count(loop, "BAR") <= 1
        assert kernel.registers <= 128, kernel.name


def test_grad_input_fma_budget():
    """Without tensor cores two rows at a time: at most 5.5 instructions per weight, of which 2 are FMAs."""
    for kernel in kernels_of("grad_input.cu", "grad_input_fma_kernel"):
        loop = kernel.smallest_loop("LDG.128", "FFMA")
        weights = 2 * BYTES_PER_ACCESS * count(loop, "LDG.128")
        assert len(loop) <= 5.5 * weights, f"{kernel.name} for {kernel.arch}: {len(loop) / weights:.2f} per weight"
        assert count(loop, "FFMA") == 2 * weights
        assert kernel.registers <= 128, kernel.name
