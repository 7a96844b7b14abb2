"""What the compiled CUDA kernels cost: instructions per weight, registers, width of accesses. No GPU is needed.

DRAM leaves each weight some issue slots (docs/verification.md has figures); a change that takes many more of them than
today fails here.
"""

import re
from pathlib import Path

import pytest
from codegen import cuda_build
from codegen.cuda_build import ARCHS
from codegen.machine_code import Kernel, count, cuobjdump
from conftest_cuda import CSRC, SOURCES, require_nvcc

CUDA = CSRC / "cuda"
BYTES_PER_ACCESS = 16


def kernels(source: Path) -> list[Kernel]:
    """Every kernel of a source, for each of ARCHS."""
    require_nvcc()
    try:
        cuobjdump()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    return [kernel for arch in ARCHS for kernel in cuda_build.kernels(source, arch)]


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
    ("name", "budget", "weights_per_byte", "scale_loads"),
    [("5WholeE", 4.4, 2, 3), ("12ColumnWindowE", 5.1, 2, 3), ("dequantize_int8_kernel", 5, 1, 0)],
)
def test_dequantize_budget(name, budget, weights_per_byte, scale_loads):
    """Instructions per weight (bitsandbytes 0.50.2: 24), packed bytes and output in 16-byte accesses only.

    A window of columns divides once for each 32 weights, to find their row.
    """
    for kernel in kernels_of("dequantize.cu", name):
        loop = kernel.smallest_loop("LDG.128", "STG.128")
        tiles = count(loop, "LDG.128")
        weights = tiles * BYTES_PER_ACCESS * weights_per_byte
        assert len(loop) <= budget * weights, f"{kernel.name} for {kernel.arch}: {len(loop) / weights:.2f} per weight"
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


#: Of a packed 4-bit byte, what one 16-byte load brings.
WEIGHTS_PER_LOAD = 32
#: (kernel, template arguments, instructions per weight). Several rows of x cost more: by FMAs for each, or from 5 or 3
#: rows on by words that lanes exchange (0.25 for blocks of 64, 0.5 for blocks of 32, and 0.2 for their 16 sums).
GEMV_BUDGETS = (
    ("gemv_mma_kernel", "Li1ELi8E", 1.8),  # blocks of 128 and more, 1 to 8 rows of x
    ("gemv_mma_kernel", "Li2ELi4E", 1.8),  # blocks of 64, 1 to 4 rows
    ("gemv_mma_kernel", "Li2ELi8E", 2.0),  # 5 to 8 rows
    ("gemv_mma_kernel", "Li4ELi2E", 1.8),  # blocks of 32, 1 or 2 rows
    ("gemv_mma_kernel", "Li4ELi8E", 2.6),  # 3 to 8 rows
    ("gemv_fma_kernel", "IfLi1E", 2.8),
    ("gemv_fma_kernel", "IfLi2E", 4.0),
)


@pytest.mark.parametrize(("name", "arguments", "budget"), GEMV_BUDGETS)
def test_gemv_budget(name, arguments, budget):
    """DRAM leaves 4.6 issue slots per weight on an H100, 3.5 on an H200, 2.3 on a B200; bitsandbytes 0.50.2 takes 8.7.

    One look-up in shared memory for two weights, of 32 bits or of 64 for fp32. Scales come by wider loads, two in 64
    weights at most, four where 64 weights have four scales.
    """
    found = [kernel for kernel in kernels_of("gemv.cu", name) if arguments in kernel.name]
    assert {kernel.arch for kernel in found} == set(ARCHS)
    for kernel in found:
        loop = kernel.smallest_loop("LDG.NA.128", "LDS")
        weights = count(loop, "LDG.NA.128") * WEIGHTS_PER_LOAD
        steps = weights // 64
        assert len(loop) <= budget * weights, f"{kernel.name} for {kernel.arch}: {len(loop) / weights:.2f} per weight"
        assert count(loop, "LDG.NA") == count(loop, "LDG.NA.128"), kernel.name  # the rest are of x, also 16 bytes wide
        assert count(loop, "LDG") == count(loop, "LDG.128"), kernel.name
        loads = {width: count(loop, f"LDS.{width}") for width in (64, 128)}
        narrow = count(loop, "LDS") - sum(loads.values())
        look_ups = narrow if "mma" in name else sum(loads.values()) - steps
        assert look_ups == weights // 2, kernel.name
        assert count(loop, "LDS") - look_ups <= 2 * steps, kernel.name
        exchanged = {"Li2ELi8E": 4, "Li4ELi8E": 8}.get(arguments, 0)
        assert count(loop, "SHFL") == exchanged * steps and not count(loop, "BAR"), kernel.name
        # A step has two sums at least, or an mma would wait for seven others.
        sums = (4 if arguments == "Li4ELi8E" else 2) if "mma" in name else 0
        mmas = [text for text in loop if text.startswith("HMMA")]
        assert len(mmas) == (8 * steps if "mma" in name else 0), kernel.name
        assert sum(text.rstrip().endswith("RZ") for text in mmas) == sums * steps, kernel.name


@pytest.mark.parametrize(("name", "steps"), [("gemv_mma_kernel", 4), ("gemv_fma_kernel", 2)])
def test_gemv_on_its_way(name, steps):
    """DRAM waits where too little is asked of it: so many steps of each warp before the first barrier, and 24 warps.

    That is 96 KB of W on a full multiprocessor of an A100, H100, H200 or B200, and 64 KB where there is work for two
    blocks (gemv_bytes_in_flight in plan.h). GPUs with 100 KB of shared memory hold two blocks.
    """
    for kernel in kernels_of("gemv.cu", name):
        body = [text for _, text in kernel.instructions]
        barrier = next(i for i, text in enumerate(body) if text.startswith("BAR"))
        assert count(body[:barrier], "LDG.NA.128") == 2 * steps, kernel.name
        assert kernel.registers <= 80, kernel.name  # 65536 for 3 blocks of 256 threads
        blocks = {"sm_80": (164, 3), "sm_90": (228, 3), "sm_120": (100, 2)}
        kilobytes, wanted = blocks[kernel.arch]
        assert wanted * (kernel.shared + 1024) <= kilobytes * 1024, f"{kernel.name}: {kernel.shared} bytes"


def test_gemv_int8_budget():
    """Codes in 16-byte loads only; two instructions to convert a weight and an FMA for each row of x."""
    for kernel in kernels_of("gemv_int8.cu", "gemv_int8_kernel"):
        loop = kernel.smallest_loop("LDG.NA.128")
        weights = count(loop, "LDG.NA.128") * BYTES_PER_ACCESS
        rows = 1 if "Li1E" in kernel.name else 4
        assert count(loop, "LDG") == count(loop, "LDG.128"), kernel.name
        assert len(loop) <= (3 + 1.5 * rows) * weights, f"{kernel.name}: {len(loop) / weights:.2f} per weight"
        assert not count(loop, "SHFL"), kernel.name


@pytest.mark.parametrize("rows", [8, 16, 32])
def test_grad_input_tensor_core_budget(rows):
    """Decoding on the way to the tensor cores: at most 4.55 instructions per weight, 2.5 for look-up and scale.

    (With scales in fp32 4.4.) At DRAM speed an H100 has 4.6 issue slots per weight, and 0.036 cycles of shared memory;
    a weight takes about 0.05 of those, most for its look-up. So the loop runs at 0.7 of DRAM speed there.
    """
    for kernel in kernels_of("grad_input.cu", "grad_input_mma_kernel"):
        if f"ELi{rows}E" not in kernel.name:
            continue
        loop = kernel.smallest_loop("HMMA.16816", "LDGSTS")
        weights = 8 * count(loop, "HMMA.16816") // (rows // 8)  # a lane holds 8 of the 256 of each A
        limit = 4.55 if "Lb1E" in kernel.name else 4.4
        assert len(loop) <= limit * weights, f"{kernel.name} for {kernel.arch}: {len(loop) / weights:.2f} per weight"
        grad_copies = max(1, rows // 16)
        # W through 16-byte copies, 32 weights each; decoded ones never go back to shared memory, only scales do.
        assert count(loop, "LDGSTS") == count(loop, "LDGSTS.128") == weights // 32 + grad_copies
        assert count(loop, "STS") <= 2 and not any(count(loop, f"STS.{width}") for width in (64, 128))
        assert count(loop, "LDG") <= 6 and not count(loop, "LDG.128")  # scales: code, group, map, of two rows at most
        assert count(loop, "LDS.64") <= weights / 2 + 6 and count(loop, "SHFL") == 0
        assert count(loop, "BAR") <= 1
        assert kernel.registers <= 128, kernel.name


#: Instructions for 16 components of the rank, by rows of grad in a tile. Counted: 157 to 177, 179 to 200, 228 to 264.
LORA_INSTRUCTIONS = {8: 185, 16: 210, 32: 275}


@pytest.mark.parametrize("rows", [8, 16, 32])
def test_grad_input_lora_budget(rows):
    """Sixteen components of the rank in one trip to L2, for all rows of a tile; the sums of eight splits in another.

    Three mma for each 8 rows make products of fp32 factors; their high and low parts are made once for each tile.
    """
    for kernel in kernels_of("grad_input.cu", "grad_input_mma_kernel"):
        if f"ELi{rows}E" not in kernel.name:
            continue
        row_tiles = rows // 8
        (loop,) = (body for body in kernel.loops() if count(body, "HMMA.16816") == 3 * row_tiles)
        assert count(loop, "LDG") == 8 + 4 * row_tiles, kernel.name
        loads = [i for i, text in enumerate(loop) if text.startswith("LDG")]
        assert loads[-1] < next(i for i, text in enumerate(loop) if text.startswith("HMMA")), kernel.name
        assert len(loop) <= LORA_INSTRUCTIONS[rows], f"{kernel.name} for {kernel.arch}: {len(loop)}"
        summing = kernel.smallest_loop("LDG.128.STRONG")
        assert count(summing, "LDG") == count(summing, "LDG.128") == 8, kernel.name
        assert count(summing, "FADD") == 8 * 4, kernel.name


def test_grad_input_fma_budget():
    """Without tensor cores two rows at a time: at most 4.7 instructions per weight, of which 2 are FMAs."""
    for kernel in kernels_of("grad_input.cu", "grad_input_fma_kernel"):
        loop = kernel.smallest_loop("LDG.128", "FFMA")
        weights = 2 * BYTES_PER_ACCESS * count(loop, "LDG.128")
        assert len(loop) <= 4.7 * weights, f"{kernel.name} for {kernel.arch}: {len(loop) / weights:.2f} per weight"
        assert count(loop, "FFMA") == 2 * weights
        assert kernel.registers <= 128, kernel.name


def test_optimizer_step_budget():
    """16-byte accesses for all that is fp32, three instructions for each of eight steps of a code's search.

    The loop holds every dtype's accesses; tests/test_cuda_optim.py counts what a step of each kind executes of it.
    """
    for kernel in kernels_of("optim.cu", "optimizer_step_kernel"):
        states = 2 if "RuleE0E" in kernel.name else 1
        loop = kernel.smallest_loop("LDG.128", "STG.128")
        assert count(loop, "LDG.128") == 2 * (states + 2), kernel.name  # parameter, gradient and states
        assert count(loop, "STG.128") == 2 * (states + 1), kernel.name
        assert count(loop, "FSETP.GE") == 64 * states, kernel.name
        assert count(loop, "LDS") <= 72 * states, kernel.name  # with the map's entries
        assert len(loop) <= 700 + 700 * states, f"{kernel.name} for {kernel.arch}: {len(loop)}"
        assert kernel.registers <= 128, kernel.name


def test_sum_of_squares_budget():
    """16-byte loads, and for each element a conversion to fp64 and an FMA: fp64 at half the speed of fp32 keeps up."""
    for kernel in kernels_of("optim.cu", "square_sums_kernel"):
        loop = kernel.smallest_loop("LDG.128")
        assert count(loop, "LDG.128") == 4 + 2 + 2, kernel.name
        # A short loop for each dtype sums unaligned elements one by one.
        assert count(loop, "DFMA") == 3 * (16 + 1), kernel.name
        assert kernel.registers <= 64, kernel.name


#: Instructions per 64 weights of a lane in the gemm's main loop, by rows of x in a tile; NOPs (a warp then waits for
#: its tensor core) left out. Counted: 166 to 186, 201 to 226, 258 to 288, of which 16, 32 and 64 are HMMA.
GEMM_INSTRUCTIONS = {16: 195, 32: 235, 64: 300}


def is_padding(text: str) -> bool:
    return text.startswith(("NOP", "UIADD3 URZ, URZ, URZ, URZ"))


def test_gemm_budget():
    """What its main loop reads and how, one barrier per tile, 2 or 4 stages, no decoded weight in shared memory."""
    for kernel in kernels_of("gemm.cu", "11gemm_kernel"):
        numbers = re.search(r"Li(\d+)ELi(\d+)ELi(\d+)ELb(\d)E", kernel.name).groups()
        rows, columns, scale_columns, double_quant = map(int, numbers)
        loop = kernel.smallest_loop("HMMA", "LDGSTS")
        # Packed weights: two pieces per thread and tile. x: 4 rows / columns as many bytes.
        assert count(loop, "LDGSTS") == count(loop, "LDGSTS.128") == 2 + 8 * rows // columns, kernel.name
        # For each scale: a number, or a group's, a code and what that means; and the offset of all.
        scales = 64 // scale_columns
        assert count(loop, "LDG") == (3 * scales + 1 if double_quant else scales), kernel.name
        assert not count(loop, "STS") and not count(loop, "STG") and not count(loop, "ATOMS"), kernel.name
        assert count(loop, "BAR") == 1, kernel.name
        # Waits until two of its tiles at most are under way, or none, beside the one that it multiplies.
        waits = {text.split()[-1] for text in loop if text.startswith("DEPBAR.LE SB0")}
        assert waits == ({"0x0"} if rows == 64 else {"0x2", "0x0"}), kernel.name
        assert kernel.registers <= 128, kernel.name
        if scale_columns == 32:
            continue  # an inner loop, whose instructions count twice
        assert count(loop, "HMMA.16816.F32") == count(loop, "HMMA") == rows, kernel.name
        assert count(loop, "LDS.128") == rows // 4, kernel.name
        assert count(loop, "IDP") == 32 and count(loop, "PRMT") <= 4, kernel.name
        instructions = sum(not is_padding(text) for text in loop)
        assert instructions <= GEMM_INSTRUCTIONS[rows], f"{kernel.name} for {kernel.arch}: {instructions / 64:.2f}"
