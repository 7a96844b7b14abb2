"""What the Triton kernels cost on NVIDIA's GPUs: instructions per weight and the width of accesses. Nothing runs.

Whole kernels are counted, with what a program does once. DRAM leaves an H100 21 issue slots for each weight that is
decoded to or quantized from 16 bits; a change that takes many more than today fails here.
"""

import pytest
import torch
from codegen.machine_code import count as count_in
from conftest_triton import compiled, compiled_only, function, launches, machine_code, tensor, weight
from triton_calls import model_step

from lowbit.backends.triton.shapes import OPTIMIZER_TILE, SUM_OF_SQUARES_TILE

pytestmark = compiled_only

ARCHS = ("sm_80", "sm_90", "sm_120")
SHAPE = (4096, 4096)
BYTES_PER_ACCESS = 16


@pytest.fixture(params=ARCHS)
def machine_code_of(request, tmp_path):
    """A function from an op's name and arguments to the only kernel that the call launches, which must not spill."""

    def kernel_of(op, *arguments):
        with launches(request.param) as made:
            function(op)(*arguments)
        (launch,) = made
        found = machine_code(compiled(launch, request.param)[0], request.param, tmp_path)
        assert (found.stack, found.local) == (0, 0), found.name
        return found

    return kernel_of


def count(kernel, opcode: str) -> int:
    return count_in([text for _, text in kernel.instructions], opcode)


def instructions(kernel) -> int:
    """All instructions without the padding at the end."""
    return len(kernel.instructions) - count(kernel, "NOP")


#: Instructions per weight. fp32 writes twice as many bytes, so DRAM leaves it 38.
DEQUANTIZE_LIMITS = {torch.float32: 8.1, torch.bfloat16: 6}


@pytest.mark.parametrize(
    ("dtype", "format", "double_quant"), [(torch.bfloat16, "nf4", True), (torch.float32, "fp4", False)]
)
def test_dequantize(machine_code_of, dtype, format, double_quant):
    """Packed bytes and output in 16-byte accesses only; a scale once per 32 weights; one shuffle for a look-up."""
    parts = weight(SHAPE, format, double_quant=double_quant)
    kernel = machine_code_of("dequantize", *parts, SHAPE, dtype)
    loads = count(kernel, "LDG.128")
    weights = 2 * BYTES_PER_ACCESS * loads
    assert instructions(kernel) <= DEQUANTIZE_LIMITS[dtype] * weights, instructions(kernel) / weights
    assert count(kernel, "LDG") - loads <= (3 if double_quant else 1) * loads + 1  # and the offset, once
    assert count(kernel, "STG") == count(kernel, "STG.128") == weights * dtype.itemsize // BYTES_PER_ACCESS
    assert count(kernel, "SHFL") == weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_int8(machine_code_of, dtype):
    """Codes and output in 16-byte accesses only."""
    kernel = machine_code_of("dequantize", *weight(SHAPE, "int8"), SHAPE, dtype)
    loads = count(kernel, "LDG.128")
    weights = BYTES_PER_ACCESS * loads
    assert instructions(kernel) <= 8 * weights, instructions(kernel) / weights
    assert count(kernel, "LDG") - loads <= loads
    assert count(kernel, "STG") == count(kernel, "STG.128") == weights * dtype.itemsize // BYTES_PER_ACCESS


@pytest.mark.parametrize(
    ("op", "dtype", "format", "limit"),
    [
        ("quantize", torch.bfloat16, "nf4", 48),
        ("quantize", torch.float32, "fp4", 48),
        ("encode", torch.bfloat16, "nf4", 40),
    ],
)
def test_quantize(machine_code_of, op, dtype, format, limit):
    """A branch in the code search, which runs once per weight, would cost more than the search."""
    scales = () if op == "quantize" else (tensor(4096 * 64),)
    kernel = machine_code_of(op, tensor(*SHAPE, dtype=dtype), *scales, f"{format}:64")
    weights = count(kernel, "LDG.128") * BYTES_PER_ACCESS // dtype.itemsize
    assert instructions(kernel) <= limit * weights, instructions(kernel) / weights
    assert count(kernel, "STG.128") * BYTES_PER_ACCESS * 2 == weights
    assert not count(kernel, "STG.U8") and count(kernel, "STG") - count(kernel, "STG.128") <= 1  # absmax
    assert count(kernel, "LDG") - count(kernel, "LDG.128") <= 1  # the scale, if given
    # Those of the reciprocals' slow way, and of a subroutine for it; no comparison of a weight's.
    assert count(kernel, "BRA") <= 26


def test_quantize_int8(machine_code_of):
    """Weights in 16-byte loads; codes in stores of at least 8 bytes."""
    kernel = machine_code_of("quantize", tensor(*SHAPE, dtype=torch.bfloat16), "int8")
    weights = count(kernel, "LDG.128") * BYTES_PER_ACCESS // 2 // 2  # each is read twice
    assert count(kernel, "LDG") == count(kernel, "LDG.128")
    assert instructions(kernel) <= 20 * weights, instructions(kernel) / weights
    wide = count(kernel, "STG.128") * BYTES_PER_ACCESS + count(kernel, "STG.64") * 8
    assert wide == weights and not count(kernel, "STG.U8")


def test_quantize_scales(machine_code_of):
    """Scales and codes in 16-byte accesses; the table is read byte by byte, once per scale."""
    kernel = machine_code_of("quantize_scales", tensor(4096 * 64), tensor())
    scales = count(kernel, "LDG.128") * BYTES_PER_ACCESS // 4
    assert count(kernel, "LDG.U8") == scales == count(kernel, "STG.128") * BYTES_PER_ACCESS
    assert not count(kernel, "STG.U8")


def test_search_scales(machine_code_of):
    """At most 48 instructions for a weight and each of the 36 factors; its loads are vectors of 4, with importance."""
    arguments = (tensor(*SHAPE, dtype=torch.bfloat16), tensor(SHAPE[1]), "nf4:64")
    kernel = machine_code_of("search_scales", *arguments)
    loop = kernel.smallest_loop("LDG.64", "FSEL")
    loads = count_in(loop, "LDG.64")
    assert count_in(loop, "LDG.128") == loads  # of importance, in fp32
    assert count_in(loop, "LDG") - 2 * loads <= 1  # the factor
    assert len(loop) <= 48 * 4 * loads, len(loop) / 4 / loads


#: Instructions per element, rounded stochastically. A sixth of adamw's are slow ways of roots and quotients, which
#: ordinary numbers do not take. With bf16 DRAM leaves an H100 84 and 67 for states in 8 bits, 185 and 118 in fp32.
STEP_LIMITS = {("adamw", True): 115, ("adamw", False): 76, ("lion", True): 67, ("lion", False): 38}


@pytest.mark.parametrize(("rule", "in_8_bits"), STEP_LIMITS)
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_optimizer_step(machine_code_of, rule, in_8_bits, dtypes):
    """Parameters, gradients and states in 16-byte accesses only, though their addresses come from a table."""
    kernel = machine_code_of("optimizer_step", *model_step(rule, dtypes, in_8_bits, 7))
    states = 2 if rule == "adamw" else 1
    per_thread = OPTIMIZER_TILE // (32 * 4)
    elements = {"param": dtypes[0].itemsize, "state": states * (1 if in_8_bits else 4)}
    stored = sum(elements.values()) * per_thread // BYTES_PER_ACCESS
    assert instructions(kernel) <= STEP_LIMITS[rule, in_8_bits] * per_thread, instructions(kernel) / per_thread
    assert count(kernel, "LDG.128") == stored + dtypes[1].itemsize * per_thread // BYTES_PER_ACCESS
    assert count(kernel, "STG.128") == stored and not count(kernel, "STG.U8")
    assert count(kernel, "STG") - stored <= 2 * states  # absmax
    assert count(kernel, "LDG.U8") == (states * per_thread if in_8_bits else 0)  # a code of each position


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_of_squares(machine_code_of, dtype):
    """In 16-byte loads; a conversion, a product and a sum in fp64 for each element."""
    kernel = machine_code_of("sum_of_squares", [tensor(1 << 20, dtype=dtype)])
    per_thread = SUM_OF_SQUARES_TILE // (32 * 4)
    assert count(kernel, "LDG.128") == per_thread * dtype.itemsize // BYTES_PER_ACCESS
    assert instructions(kernel) <= 9 * per_thread, instructions(kernel) / per_thread
    assert count(kernel, "DADD") + count(kernel, "DMUL") + count(kernel, "DFMA") <= 2 * per_thread + 8
