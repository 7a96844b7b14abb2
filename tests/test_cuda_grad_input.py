"""The CUDA kernels of linear_grad_input, executed by the emulator, against fp64 arithmetic on the decoded weight."""

import contextlib
import dataclasses

import pytest
import torch
from cases import (
    DTYPES,
    assert_within,
    block_sizes,
    dtypes,
    formats,
    make_weight,
    product_tolerance,
    tensor_core_tolerance,
)
from conftest_cuda import DTYPE_CODES, FORMAT_CODES, emulator, launchers, multiprocessors, spec_of, unaligned, written
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import reference

RANKS = (0, 1, 8, 17, 64)
HALF = (torch.float16, torch.bfloat16)
MMA, FMA, ELEMENT = (f"grad_input_{name}_kernel" for name in ("mma", "fma", "element"))


def quantized(shape, format, block_size, double_quant, magnitude=0.02):
    """packed, absmax, group_scales, offset, format, block_size.

    Blocks differ in magnitude, so that one's scale for another's is far outside of every tolerance.
    """
    weight = make_weight(shape, torch.float32, magnitude)
    weight *= 2.0 ** (torch.arange(weight.numel()) // 32 * 5 % 7).view(shape)
    packed, absmax = reference.quantize(weight, spec_of(format, block_size))
    if format == "int8" or not double_quant:
        return packed, absmax, None, None, format, max(shape[1], 1) if format == "int8" else block_size
    offset = absmax.mean() if absmax.numel() else torch.zeros(())
    return packed, *reference.quantize_scales(absmax, offset), offset, format, block_size


def with_spec(parts):
    """The parts of a weight as the reference takes them."""
    packed, absmax, group_scales, offset, format, block_size = parts
    return packed, absmax, group_scales, offset, spec_of(format, block_size, group_scales is not None)


def operands(m, n, k, rank, dtype):
    """grad, grad_t, lora_a."""
    generator = torch.Generator().manual_seed(m + n + k)
    made = [torch.randn(size, generator=generator) for size in ((m, n), (m, rank), (rank, k))]
    return (made[0].to(dtype), made[1], made[2]) if rank else (made[0].to(dtype), None, None)


def grad_input(grad, parts, k, grad_t=None, lora_a=None, aligned=True):
    """The kernel's output, its launches, and the sums of its splits [splits, m, k], none where there is one split."""
    packed, absmax, group_scales, offset, format, block_size = parts
    (m, n), rank = grad.shape, 0 if lora_a is None else lora_a.shape[0]
    out = written(m * k, grad.dtype, aligned)
    source = grad.contiguous() if aligned else unaligned(grad)
    packed = packed if aligned else unaligned(packed)
    scales = (absmax, None, None, None) if group_scales is None else (None, absmax, group_scales, offset.reshape(1))
    shape = (grad_t, lora_a, m, n, k, rank)
    arguments = (source, DTYPE_CODES[grad.dtype], packed, *scales, FORMAT_CODES[format], block_size, *shape)
    library, sizes = launchers(), torch.zeros(2, dtype=torch.int64)
    library.launches.clear()
    assert library.call("lowbit_linear_grad_input", *arguments, None, None, None, sizes, None) == 0
    assert not library.launches
    # Reading what no kernel wrote is an error, and so is leaving it.
    partial, counters = torch.zeros(int(sizes[0])), torch.zeros(int(sizes[1]), dtype=torch.int32)
    given = (emulator("address_space").Uninitialized(partial), counters) if sizes[0] else (None, None)
    assert library.call("lowbit_linear_grad_input", *arguments, out, *given, sizes, None) == 0
    assert not counters.any(), "the next product would not know which block of threads is its last"
    launches = list(library.launches)
    for launch in launches:
        assert not launch.result.warnings, (launch.kernel, launch.result.warnings)
    return out.view(m, k), launches, partial.view(-1, max(m, 1), max(k, 1))


def name(launches):
    """The name of the kernel that ran, without template arguments."""
    (launch,) = launches
    (found,) = (name for name in (MMA, FMA, ELEMENT) if name in launch.kernel)
    return found


def assert_right(out, kernel, grad, parts, grad_t=None, lora_a=None):
    """Assert that an output is within the bound that cases.py derives for the kernel that ran."""
    shape = [grad.shape[1], out.shape[1]]
    weight = reference.dequantize(*with_spec(parts), shape, torch.float32).double()
    exact, magnitude, terms, lora_magnitude = grad.double() @ weight, grad.double().abs() @ weight.abs(), shape[0], 0.0
    if lora_a is not None:
        exact = exact + grad_t.double() @ lora_a.double()
        lora_magnitude = grad_t.double().abs() @ lora_a.double().abs()
        terms += (3 if kernel == MMA else 1) * lora_a.shape[0]
    if kernel == MMA:
        operand = grad.double().abs().sum(1, keepdim=True)
        tolerance = tensor_core_tolerance(magnitude, exact, terms, grad.dtype, operand, lora_magnitude)
    else:
        tolerance = product_tolerance(magnitude + lora_magnitude, exact, terms, grad.dtype)
    assert_within(out, exact, tolerance)


def check(m, n, k, rank, dtype, format, block_size, double_quant, magnitude=0.02, aligned=True):
    """Check one product; return its launches."""
    parts = quantized((n, k), format, block_size, double_quant, magnitude)
    grad, grad_t, lora_a = operands(m, n, k, rank, dtype)
    out, launches, _ = grad_input(grad, parts, k, grad_t, lora_a, aligned)
    if m and k:
        assert_right(out, name(launches), grad, parts, grad_t, lora_a)
    return launches


@settings(max_examples=10, deadline=None)
@given(
    m=st.sampled_from((1, 3, 8, 9, 16, 17, 33)),
    n=st.sampled_from((8, 64, 120, 128, 136, 272)),
    k=st.sampled_from((64, 128, 192, 320)),
    rank=st.sampled_from(RANKS),
    dtype=st.sampled_from(HALF),
    format=formats,
    block_size=st.sampled_from((32, 64, 128)),
    double_quant=st.booleans(),
    magnitude=st.sampled_from((1e-6, 0.02, 30.0)),
    processors=st.sampled_from((1, 2, 7)),
)
def test_tensor_core_products(m, n, k, rank, dtype, format, block_size, double_quant, magnitude, processors):
    """A wrong lane, scale, stage or split would add up other weights than the layer's."""
    with multiprocessors(processors):
        ran = name(check(m, n, k, rank, dtype, format, block_size, double_quant, magnitude=magnitude))
    assert ran == (MMA if k % block_size == 0 else FMA)


@pytest.mark.parametrize(("m", "block_size"), [(8, 64), (16, 32), (32, 128)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_more_tiles_than_stages(m, block_size, double_quant):
    """One block of threads goes through several tiles of the contraction: each stage is used again."""
    with multiprocessors(1):
        launches = check(m, 520, 256, 0, torch.bfloat16, "nf4", block_size, double_quant)
    assert name(launches) == MMA and launches[0].grid == (2, 1, 1)


@settings(max_examples=30, deadline=None)
@given(
    m=st.sampled_from((0, 1, 2, 3, 8, 9)),
    n=st.sampled_from((0, 1, 5, 63, 64, 130, 200)),
    k=st.sampled_from((0, 1, 5, 31, 32, 96, 130, 513, 1056)),
    rank=st.sampled_from(RANKS),
    dtype=dtypes,
    format=st.sampled_from(("nf4", "fp4", "int8")),
    block_size=block_sizes,
    double_quant=st.booleans(),
    processors=st.sampled_from((1, 3)),
    aligned=st.booleans(),
)
def test_any_product(m, n, k, rank, dtype, format, block_size, double_quant, processors, aligned):
    """Unaligned sizes or addresses, rows that start inside a byte, or blocks that cross rows would be misread."""
    with multiprocessors(processors):
        launches = check(m, n, k, rank, dtype, format, block_size, double_quant, aligned=aligned)
    if m and k:
        wide = format != "int8" and k % 32 == 0 and (aligned or n == 0)  # nothing is at any address
        mma = wide and dtype != torch.float32 and n % 8 == 0 and k % block_size == 0
        assert name(launches) == (MMA if mma else FMA if wide else ELEMENT)
    else:
        assert not launches


@pytest.mark.parametrize("dtype", DTYPES)
def test_gpus_before_sm_80(dtype):
    """GPUs before sm_80 lack the instructions: the launcher must choose another kernel."""
    device = launchers().device
    launchers().device = dataclasses.replace(device, compute_capability=(7, 5))
    try:
        assert name(check(5, 64, 128, 8, dtype, "nf4", 64, True)) == FMA
    finally:
        launchers().device = device


@contextlib.contextmanager
def emulating(**options):
    """Context with options of the emulator."""
    kept = launchers().options
    launchers().options = kept | options
    try:
        yield
    finally:
        launchers().options = kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"batch_blocks": 1}, {"batch_blocks": 3, "schedule": "reverse"}])
def test_splits_are_added_in_order(dtype, options):
    """Whichever block of threads is the last: two runs of one training step have to agree in every bit."""
    parts = quantized((400, 128), "nf4", 64, True)
    grad, grad_t, lora_a = operands(4, 400, 128, 40, dtype)
    first, _, partial = grad_input(grad, parts, 128, grad_t, lora_a)
    assert len(partial) > 2
    total = torch.zeros(4, 128)
    for part in partial:
        total += part
    assert torch.equal(first, total.to(dtype))
    with emulating(**options):
        assert torch.equal(grad_input(grad, parts, 128, grad_t, lora_a)[0], first)


@pytest.mark.parametrize("rank", [1, 5, 16, 64, 200])
@pytest.mark.parametrize(("m", "processors"), [(1, 1), (8, 132), (33, 4), (200, 1)])
def test_lora_is_added_once(m, processors, rank):
    """Each of the rank's components belongs to one split; left out or counted twice, A would not be trained right."""
    with multiprocessors(processors):
        launches = check(m, 264, 160, rank, torch.bfloat16, "nf4", 32, False, magnitude=1e-3)
    assert name(launches) == MMA


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e6])
def test_lora_is_nearly_fp32(dtype, size):
    """Factors in fp32 are not rounded to 16 bits, whose range grad_t can exceed: the sums of the splits show it."""
    n, k, rank = 400, 128, 40
    weight = torch.zeros(n, k)
    parts = (*reference.quantize(weight, spec_of("nf4", 64)), None, None, "nf4", 64)
    grad, grad_t, lora_a = operands(9, n, k, rank, dtype)
    grad_t, lora_a = grad_t * size, lora_a / size
    with multiprocessors(132):
        _, launches, partial = grad_input(grad, parts, k, grad_t, lora_a)
    exact, magnitude = grad_t.double() @ lora_a.double(), grad_t.double().abs() @ lora_a.double().abs()
    rounding = 4 * 2.0**-16 if name(launches) == MMA else 0.0
    assert len(partial) > 1
    assert_within(partial.double().sum(0), exact, (rounding + 6 * rank * 2.0**-24) * magnitude)


@pytest.mark.parametrize("dtype", HALF)
def test_sums_of_truncating_tensor_cores(dtype):
    """Hardware cuts off what the emulator rounds; the bound has to hold all the same."""
    with emulating(mma_mode="trunc"):
        check(16, 400, 128, 20, dtype, "nf4", 64, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_spread_as_in_the_reference(dtype, bad):
    """Training that went wrong has to be seen, in just the elements where the reference shows it."""
    k = 256
    packed, absmax, _, _, format, block_size = quantized((136, k), "nf4", 64, False)
    grad = operands(5, 136, k, 0, dtype)[0]
    grad[1, 100] = bad
    absmax[4 * 135 + 1] = bad  # columns 64 to 127 of the last row
    parts = (packed, absmax, None, None, format, block_size)
    for count in (1, 4):
        with multiprocessors(count):
            out = grad_input(grad, parts, k)[0]
        expected = reference.linear_grad_input(grad, *with_spec(parts), k)
        finite = expected.isfinite()
        assert not finite.all() and finite.any()
        assert torch.equal(out.isfinite(), finite)
        assert torch.equal(out[~finite].nan_to_num(), expected[~finite].nan_to_num())


@pytest.mark.parametrize(
    ("dtype", "k", "kernel"), [(torch.bfloat16, 128, MMA), (torch.float32, 128, FMA), (torch.float16, 70, ELEMENT)]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_factors_stay_apart(dtype, k, kernel, bad):
    """A sequence that went wrong must not spoil the others in its batch, nor a column of lora_a the others."""
    parts = quantized((136, k), "nf4", 64, False)
    grad, grad_t, lora_a = operands(20, 136, k, 24, dtype)
    grad_t[3, 17], lora_a[20, 5] = bad, bad
    out, launches, _ = grad_input(grad, parts, k, grad_t, lora_a)
    assert name(launches) == kernel
    expected = torch.ones_like(out, dtype=torch.bool)
    expected[3], expected[:, 5] = False, False
    assert torch.equal(out.isfinite(), expected)


@pytest.mark.parametrize("m", [8, 16, 32])
def test_no_bank_conflicts(m):
    """Shared memory limits the kernel: accesses must not meet in a bank, but for the stores of a tile's scales."""
    launch = check(m, 256, 256, 0, torch.bfloat16, "nf4", 64, True)[0]
    accesses = launch.result.shared_accesses
    assert {access.ins.parts[0] for access in accesses} == {"ldmatrix", "ld", "st", "cp"}
    for access in accesses:
        assert access.wavefronts == access.ideal or access.ins.text.startswith("st.shared.f32"), access.ins.text
