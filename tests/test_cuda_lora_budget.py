"""What LoRA's CUDA kernels cost: instructions per mma, registers, width of accesses. No GPU is needed.

An H100's multiprocessor issues four instructions in a cycle and takes about 1.6 cycles for an mma: 6.5 instructions in
its time. While the factors and x come from L2 at its full speed, a step leaves more.
"""

import re

import pytest
from codegen.machine_code import Kernel, count
from test_cuda_budget import is_padding, kernels_of

#: Instructions per mma, by columns of t at a time: of the loop over x's columns, of the loop over y's, and of
#: lora_outer's. x or wide in bf16 times an fp32 factor. Counted: at most 10.2, 12.7 and 10.9; 7.1, 8.5 and 7.3; 6.4,
#: 6.4 and 6.5.
LORA_INSTRUCTIONS = {16: (10.5, 13.0, 11.5), 32: (7.5, 9.0, 7.7), 64: (6.7, 6.7, 6.8)}
#: The most registers that leave as many threads as a block has.
MOST_REGISTERS = {16: 128, 32: 255, 64: 255}


def lora_kernels(source: str, name: str, arguments: str) -> list[tuple[Kernel, int]]:
    """The kernels of a source whose template arguments match, with their columns of t at a time."""
    found = [(kernel, re.search(arguments, kernel.name)) for kernel in kernels_of(source, name)]
    return [(kernel, int(match[1])) for kernel, match in found if match]


def instructions(loop: list[str]) -> int:
    return sum(not is_padding(text) for text in loop)


def assert_per_mma(kernel: Kernel, loop: list[str], limit: float) -> None:
    mma = count(loop, "HMMA.16816.F32")
    assert mma == count(loop, "HMMA")
    assert instructions(loop) <= limit * mma, f"{kernel.name} for {kernel.arch}: {instructions(loop) / mma:.2f} per mma"


@pytest.mark.parametrize(("operand", "products"), [("4Bf16Ef", 2), ("4Fp16Ef", 3), ("4Bf16ES3_", 1)])
def test_lora_product_budget(operand, products):
    """x and factors straight to registers in wide loads, each mma's operands once; nothing staged, no barrier."""
    found = lora_kernels("lora_product.cu", "lora_product_kernel", rf"{operand}Li(\d+)E")
    assert len(found) == 3 * (2 if "Fp16" in operand else 3) * 2  # GPUs, columns of t, along or across
    for kernel, rank in found:
        loop = kernel.smallest_loop("HMMA", "LDG.NA")
        bytes_per_element = 2 if operand.endswith("S3_") else 4
        assert count(loop, "HMMA") == products * rank // 2, kernel.name  # of 32 x 32 x rank
        assert count(loop, "LDG.NA") == count(loop, "LDG.NA.128") == 4, kernel.name
        assert count(loop, "LDG") - 4 == (8 if rank == 16 and "Lb0E" in kernel.name else rank // 4), kernel.name
        assert bytes_per_element == 2 or rank == 16 or count(loop, "LDG") == count(loop, "LDG.128"), kernel.name
        for busy in (loop, kernel.smallest_loop("HMMA", "LDS.128")):
            assert not count(busy, "STS") and not count(busy, "BAR") and not count(busy, "SHFL"), kernel.name
        assert kernel.registers <= MOST_REGISTERS[rank], kernel.name
        if operand != "4Bf16Ef":
            continue
        of_t, of_y, _ = LORA_INSTRUCTIONS[rank]
        assert_per_mma(kernel, loop, of_t)
        # A chunk of y, 32 x 32, with its stores: eight of 8 bytes, which are 64 of a row.
        loop = kernel.smallest_loop("HMMA", "STG")
        assert count(loop, "STG") == count(loop, "STG.64") == 8, kernel.name
        assert count(loop, "LDS") == count(loop, "LDS.128") == rank // 4, kernel.name
        assert count(loop, "HMMA") == 3 * rank // 2, kernel.name
        assert_per_mma(kernel, loop, of_y)


@pytest.mark.parametrize(("dtype", "products"), [("4Bf16", 2), ("4Fp16", 3)])
def test_lora_outer_budget(dtype, products):
    """wide and low straight to registers, one PRMT for each pair of wide's elements."""
    found = lora_kernels("lora_outer.cu", "lora_outer_kernel", rf"{dtype}EfLi(\d+)E")
    assert len(found) == 3 * 3
    for kernel, rank in found:
        loop = kernel.smallest_loop("HMMA", "LDG")
        assert count(loop, "HMMA") == products * rank // 2, kernel.name
        wide = count(loop, "LDG.64") - (8 if rank == 16 else 0)
        assert wide == 8 and count(loop, "LDG") == 8 + max(8, rank // 4), kernel.name
        assert not count(loop, "LDS") and not count(loop, "STS") and not count(loop, "BAR"), kernel.name
        assert count(loop, "PRMT") == 16, kernel.name
        assert kernel.registers <= MOST_REGISTERS[rank], kernel.name
        if dtype == "4Bf16":
            assert_per_mma(kernel, loop, LORA_INSTRUCTIONS[rank][2])
