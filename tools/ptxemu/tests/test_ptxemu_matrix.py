"""Matrix instructions of the emulator: fragment layouts, a whole GEMM, and what it takes to break one."""

import numpy as np
import pytest
from ptx_kernels import HEADER, bf16_bits, bf16_values, cuda_module, needs_nvcc
from ptxemu import LaunchError, MemoryFault, RaceError, load

# shape and types as in the instruction, registers of A, B and C, element type of A and B
MMA = {
    "m16n8k16.row.col.f32.f16.f16.f32": (4, 2, 4, "f16"),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (4, 2, 4, "bf16"),
    "m16n8k16.row.col.f16.f16.f16.f16": (4, 2, 2, "f16"),
    "m16n8k8.row.col.f32.f16.f16.f32": (2, 1, 4, "f16"),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (2, 1, 4, "bf16"),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (4, 2, 4, "tf32"),
    "m16n8k4.row.col.f32.tf32.tf32.f32": (2, 1, 4, "tf32"),
    "m16n8k32.row.col.s32.s8.u8.s32": (4, 2, 4, "int8"),
    "m16n8k32.row.col.satfinite.s32.s8.u8.s32": (4, 2, 4, "int8"),
}


def mma_ptx(instruction, registers_a, registers_b, registers_c):
    """Kernel mma(a, b, c, d): each lane's registers lie side by side."""

    def names(letter, count):
        return "{" + ", ".join(f"{letter}{i}" for i in range(count)) + "}"

    text = ".visible .entry mma(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d) {\n"
    text += ".reg .b32 lane, a<4>, b<2>, c<4>, d<4>; .reg .b64 p; mov.u32 lane, %tid.x;\n"
    counts = {"a": registers_a, "b": registers_b, "c": registers_c}
    for letter, count in counts.items():
        text += f"ld.param.u64 p, [{letter}]; mad.wide.u32 p, lane, {4 * count}, p;\n"
        text += "".join(f"ld.global.b32 {letter}{i}, [p+{4 * i}];" for i in range(count)) + "\n"
    operands = ", ".join([names("d", registers_c), *(names(letter, count) for letter, count in counts.items())])
    text += f"mma.sync.aligned.{instruction} {operands};\n"
    text += f"ld.param.u64 p, [d]; mad.wide.u32 p, lane, {4 * registers_c}, p;\n"
    text += "".join(f"st.global.b32 [p+{4 * i}], d{i};" for i in range(registers_c))
    return HEADER.format(arch="80") + text + "ret; }"


def fragment_positions(element, depth):
    """(row, column) of element i of a lane's A and B, as the PTX ISA's formulas give them per shape."""
    per_register = {"f16": 2, "bf16": 2, "tf32": 1, "int8": 4}[element]
    a, b = {}, {}
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(16 * depth // 32):
            register, part = divmod(i, per_register)
            row = group + (8 if register % 2 else 0)
            a[lane, i] = row, in_group * per_register + part + (0 if register < 2 else depth // 2)
        for i in range(8 * depth // 32):
            register, part = divmod(i, per_register)
            b[lane, i] = in_group * per_register + part + (0 if register == 0 else depth // 2), group
    return a, b


def pack(values, element):
    """Elements of a lane -> its 32-bit registers."""
    if element == "f16":
        return values.astype(np.float16).view(np.uint32)
    if element == "bf16":
        return bf16_bits(values).view(np.uint32)
    if element == "tf32":
        return values.astype(np.float32).view(np.uint32) | 0x1FFF  # the hardware ignores these bits
    return values.astype(np.int64).astype(np.uint8).view(np.uint32)


def quantized(values, element):
    if element == "f16":
        return values.astype(np.float16).astype(np.float64)
    if element == "bf16":
        return bf16_values(bf16_bits(values)).astype(np.float64)
    return (values.astype(np.float32).view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("instruction", MMA)
def test_mma_takes_each_element_from_its_place(instruction):
    """A permuted fragment gives a plausible, wrong product: the layouts are written out again here."""
    registers_a, registers_b, registers_c, element = MMA[instruction]
    depth = int(instruction.split(".")[0].rpartition("k")[2])
    random = np.random.default_rng(0)
    if element == "int8":
        a, b = random.integers(-128, 128, (16, depth)), random.integers(0, 256, (depth, 8))
        c = random.integers(-1000, 1000, (16, 8))
        c[0, 0] = 2**31 - 5
    else:
        a, b = (quantized(random.normal(0, 1, shape), element) for shape in ((16, depth), (depth, 8)))
        c = random.normal(0, 1, (16, 8)).astype(np.float16).astype(np.float64)
    positions_a, positions_b = fragment_positions(element, depth)
    positions_c = {
        (lane, i): ((lane >> 2) + 8 * (i // 2), lane % 4 * 2 + i % 2) for lane in range(32) for i in range(4)
    }

    def spread(matrix, positions, count):
        values = np.zeros((32, count))
        for (lane, i), place in positions.items():
            values[lane, i] = matrix[place]
        return values

    accumulator = {"s32": np.int32, "f16": np.float16, "f32": np.float32}[instruction.rpartition(".")[2]]
    raw_a = pack(spread(a, positions_a, 16 * depth // 32), element)
    raw_b = pack(spread(b, positions_b, 8 * depth // 32), element)
    raw_c = spread(c, positions_c, 4).astype(accumulator).view(np.uint32)
    raw_d = np.zeros_like(raw_c)
    module = load(mma_ptx(instruction, registers_a, registers_b, registers_c))
    module.launch("mma", 1, 32, [raw_a, raw_b, raw_c, raw_d])
    expected = a @ b + c
    if element == "int8":
        limits = (-(2**31), 2**31 - 1)
        expected = np.clip(expected, *limits) if "satfinite" in instruction else (expected + 2**31) % 2**32 - 2**31
    tolerance = {np.float16: 1e-2, np.float32: 1e-5, np.int32: 0}[accumulator]
    got = raw_d.view(accumulator).reshape(32, 4)
    for (lane, i), place in positions_c.items():
        assert abs(float(got[lane, i]) - expected[place]) <= tolerance, (lane, i)


def test_a_warp_that_is_not_whole_cannot_multiply():
    """mma needs every lane: a divergent call hangs or corrupts on a GPU."""
    text = mma_ptx("m16n8k16.row.col.f32.f16.f16.f32", 4, 2, 4)
    text = text.replace("mma.sync", ".reg .pred p0; setp.lt.u32 p0, lane, 7; @p0 bra OUT; mma.sync").replace(
        "ld.param.u64 p, [d]", "OUT: bar.sync 0; ld.param.u64 p, [d]"
    )
    registers = [np.zeros((32, n), np.uint32) for n in (4, 2, 4, 4)]
    with pytest.raises(Exception, match="deadlock.*mma.sync"):
        load(text).launch("mma", 1, 32, registers)


def gemm_inputs(m, n, k, dtype):
    random = np.random.default_rng(1)
    a, b = random.normal(0, 1, (m, k)), random.normal(0, 1, (k, n))
    if dtype == "f16":
        a, b = a.astype(np.float16), b.astype(np.float16)
        return a, b, a.astype(np.float64) @ b.astype(np.float64)
    a, b = bf16_bits(a), bf16_bits(b)
    return a, b, bf16_values(a).astype(np.float64) @ bf16_values(b).astype(np.float64)


def run_gemm(kernel, m, n, k, **options):
    """-> (result of the launch, computed C, expected C)."""
    a, b, expected = gemm_inputs(m, n, k, "bf16" if "bf16" in kernel else "f16")
    c = np.full((m, n), np.nan, np.float32)
    grid = (-(-n // 64), -(-m // 64))
    result = cuda_module("gemm.cu").launch(kernel, grid, 128, [a, b, c, m, n, k], **options)
    return result, c, expected


@needs_nvcc
@pytest.mark.parametrize("kernel", ["gemm_f16", "gemm_bf16"])
@pytest.mark.parametrize("shape", [(64, 64, 64), (100, 72, 104)])
@pytest.mark.parametrize("options", [{}, {"async_mode": "eager"}, {"schedule": "random"}, {"schedule": "reverse"}])
def test_gemm(kernel, shape, options):
    """cp.async, ldmatrix and mma.sync together, on full and ragged tiles, in every order of execution."""
    result, c, expected = run_gemm(kernel, *shape, **options)
    np.testing.assert_allclose(c, expected, rtol=1e-5, atol=1e-4)
    assert not result.warnings
    assert all(a.worst == 1 for a in result.shared_accesses if "ldmatrix" in a.ins.opcode)


@needs_nvcc
def test_truncating_accumulation_differs_a_little():
    """mma_mode="trunc" bounds what real tensor cores may lose; if it changed nothing it would prove nothing."""
    _, exact, expected = run_gemm("gemm_bf16", 64, 64, 64)
    _, truncated, _ = run_gemm("gemm_bf16", 64, 64, 64, mma_mode="trunc")
    error = np.abs(truncated - expected).max() / np.abs(expected).max()
    assert 0 < error < 1e-5 and not np.array_equal(exact, truncated)


@needs_nvcc
def test_bank_conflicts_are_counted():
    """Rows without padding put a quarter warp's ldmatrix reads into the same banks."""
    result, _, _ = run_gemm("gemm_with_conflicts", 64, 64, 64)
    assert max(a.worst for a in result.shared_accesses if "ldmatrix" in a.ins.opcode) >= 4
    assert result.bank_conflicts > 0


@needs_nvcc
@pytest.mark.parametrize(
    "kernel, message",
    [
        ("gemm_waits_too_little", "cp.async still in flight"),
        ("gemm_no_barrier_before", "read of shared memory with a cp.async still in flight|read after write"),
        ("gemm_no_barrier_after", "write after read"),
    ],
)
def test_a_pipeline_that_is_broken_is_caught(kernel, message):
    """Each of these passes by luck on some GPU, on some day."""
    with pytest.raises(RaceError, match=message):
        run_gemm(kernel, 64, 64, 128)


@needs_nvcc
def test_lazy_copies_show_a_missing_wait_in_the_numbers():
    """Without the race detector the data must at least be wrong; landing at once, it would be right by luck."""
    _, eager, expected = run_gemm("gemm_waits_too_little", 64, 64, 128, async_mode="eager", detect_races=False)
    np.testing.assert_allclose(eager, expected, rtol=1e-5, atol=1e-4)
    _, lazy, _ = run_gemm("gemm_waits_too_little", 64, 64, 128, detect_races=False)
    assert np.isnan(lazy).any()


@needs_nvcc
def test_stmatrix():
    """Results leave registers by 8 x 8 matrices, straight or transposed."""
    x = np.random.default_rng(0).integers(0, 2**32, 128, dtype=np.uint64).astype(np.uint32)
    y = np.zeros(192, np.uint32)
    cuda_module("warpgroup.cu", "sm_90a").launch("store_matrices", 1, 32, [x, y])
    np.testing.assert_array_equal(y[:128], x)
    matrices = [v.view(np.uint16).reshape(2, 8, 8) for v in (y[128:], x[:64])]
    np.testing.assert_array_equal(matrices[0], matrices[1].swapaxes(1, 2))


@needs_nvcc
@pytest.mark.parametrize("kernel", ["wgmma_shared", "wgmma_registers"])
@pytest.mark.parametrize("accumulate", [0, 1])
def test_wgmma(kernel, accumulate):
    """Triton's kernels for sm_90 multiply with it."""
    random = np.random.default_rng(2)
    a, b = bf16_bits(random.normal(0, 1, (64, 16))), bf16_bits(random.normal(0, 1, (8, 16)))
    d = random.normal(0, 1, (64, 8)).astype(np.float32)
    expected = accumulate * d + bf16_values(a).astype(np.float64) @ bf16_values(b).astype(np.float64).T
    cuda_module("warpgroup.cu", "sm_90a").launch(kernel, 1, 128, [a, b, d, accumulate])
    np.testing.assert_allclose(d, expected, rtol=1e-6, atol=1e-6)


@needs_nvcc
def test_swizzled_wgmma():
    """Tiles are swizzled to avoid bank conflicts; reading them unswizzled permutes the product."""
    random = np.random.default_rng(3)
    a, b = bf16_bits(random.normal(0, 1, (64, 64))), bf16_bits(random.normal(0, 1, (8, 64)))
    d = np.full((64, 8), np.nan, np.float32)
    cuda_module("warpgroup.cu", "sm_90a").launch("wgmma_swizzled", 1, 128, [a, b, d])
    expected = bf16_values(a).astype(np.float64) @ bf16_values(b).astype(np.float64).T
    np.testing.assert_allclose(d, expected, rtol=1e-5, atol=1e-5)


@needs_nvcc
def test_the_opt_in_limit_of_the_device_holds():
    """A tile that fits an H100 must not be launched on a card with less shared memory."""
    a, b, _ = gemm_inputs(64, 64, 64, "f16")
    arguments = [a, b, np.zeros((64, 64), np.float32), 64, 64, 64]
    with pytest.raises(LaunchError, match="kernel gemm_f16: 150000 bytes of dynamic and 19456 of static"):
        cuda_module("gemm.cu").launch("gemm_f16", 1, 128, arguments, shared=150000)


@needs_nvcc
def test_an_unaligned_matrix_row_is_an_error():
    """ldmatrix wants 16-byte rows; an odd leading dimension breaks that on a GPU too."""
    a, b, _ = gemm_inputs(64, 66, 36, "f16")
    with pytest.raises(MemoryFault, match="misaligned"):
        cuda_module("gemm.cu").launch("gemm_f16", (2, 1), 128, [a, b, np.zeros((64, 66), np.float32), 64, 66, 36])
