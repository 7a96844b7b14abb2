"""``linear`` with precision="int8" rounds alike on every kernel set, errs as stated, and has no gradients."""

import pytest
import torch
from cases import (
    DTYPES,
    KERNELS,
    LINEAR_SHAPES,
    ROWS,
    assert_within,
    block_sizes,
    dtypes,
    formats,
    kernels,
    make_weight,
    product_tolerance,
    rounds_to_int8,
    weight_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit


def approximate(x, q, bias=None):
    with torch.no_grad():
        return lowbit.linear(x, q, bias, precision="int8")


def rounded_operands(x, q):
    """The operands of the mode in fp64: x and W after their rounding to int8, both [.., in_features]."""
    weight = q.dequantize(torch.float32).double()
    chunks = x.float().unflatten(-1, (-1, 64))
    largest = chunks.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127.0) / largest  # 127 / largest would be a reciprocal and a product
    codes = torch.where(largest > 0, (chunks * inverse).round(), 0.0)
    scales = q.scales().double().repeat_interleave(q.spec.block_size)[: q.numel()].view(weight.shape)
    codebook = torch.where(scales != 0, weight / scales, 0.0)
    int8_codebook = torch.floor((codebook * 127).abs() + 0.5) * codebook.sign() / 127
    return (codes.double() * (largest / 127).double()).flatten(-2), int8_codebook * scales


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from(ROWS),
    shape=st.sampled_from(LINEAR_SHAPES),
    dtype=dtypes,
    format=formats,
    block_size=block_sizes,
    double_quant=st.booleans(),
    has_bias=st.booleans(),
)
def test_rounding_is_as_documented(name, rows, shape, dtype, format, block_size, double_quant, has_bias):
    """The error users are told of is that of two roundings, and no more, on every kernel set."""
    n, k = shape
    q = lowbit.quantize(make_weight(shape), format=format, block_size=block_size, double_quant=double_quant)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if has_bias else None
    with kernels(name):
        y = approximate(x, q, bias)
    assert y.dtype == dtype and y.shape == (rows, n)
    rounds = rounds_to_int8(name, dtype, rows, k)
    x_rounded, weight = rounded_operands(x, q) if rounds else (x.double(), q.dequantize(torch.float32).double())
    exact, magnitude = x_rounded @ weight.T, x_rounded.abs() @ weight.T.abs()
    if has_bias:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    # Ragged rows are multiplied exactly, as linear multiplies them, and so is what is faster that way.
    rounding = 0.0 if rounds else weight_error(name, format, dtype, rows, k)
    assert_within(y, exact, product_tolerance(magnitude, exact, k + 8, dtype, rounding))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rows", [1, 5])
def test_error_is_about_one_percent(name, rows):
    """The docstring promises at most about 1% of the norm for normally distributed activations."""
    q = lowbit.quantize(make_weight((256, 1024)))
    x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ q.dequantize().double().T
    with kernels(name):
        y = approximate(x, q)
    error = float((y.double() - exact).norm() / exact.norm())
    assert error < 0.015
    assert (error > 0.001) == rounds_to_int8(name, torch.float32, rows, 1024)  # without an error the mode was not used


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_part_stays_exact(name, dtype):
    """An adapter's small contribution must not drown in the rounding of the base."""
    q = lowbit.quantize(torch.zeros(96, 128))
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(size, generator=generator).to(dtype) for size in ((7, 128), (4, 128), (96, 4)))
    with kernels(name), torch.no_grad():
        y = lowbit.lora_linear(x, q, a, b, 0.5, precision="int8")
        torch.testing.assert_close(y, lowbit.lora_linear(x, q, a, b, 0.5))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_infinity_and_nan_stay_in_their_row(name, bad):
    """An overflow in one sample must show up there, and nowhere else."""
    q = lowbit.quantize(make_weight((33, 128)))
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    with kernels(name):
        clean = approximate(x, q)
        x[2, 100] = bad
        y = approximate(x, q)
    assert not bool(y[2].isfinite().any())
    assert bool(y[2].isnan().all()) or not rounds_to_int8(name, x.dtype, 6, 128)
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("name", KERNELS)
def test_zero_and_tiny_activations(name):
    """All-zero chunks (padding) and values whose inverse overflows must give zeros, not NaN."""
    q = lowbit.quantize(make_weight((16, 128)))
    for value in (0.0, 1e-40, -1e-38):
        with kernels(name):
            assert bool((approximate(torch.full((5, 128), value), q).abs() < 1e-36).all())


def test_results_do_not_depend_on_the_number_of_threads():
    """The same input must give the same bits on every machine size."""
    q = lowbit.quantize(make_weight((200, 384)))
    x = torch.randn(7, 384, generator=torch.Generator().manual_seed(0))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(approximate(x, q))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_errors():
    """A typo, or a training loop that needs the missing backward, must get an error."""
    q = lowbit.quantize(make_weight((8, 64)))
    x = torch.ones(1, 64, requires_grad=True)
    with pytest.raises(ValueError, match="precision: expected 'exact' or 'int8', got 'int4'"):
        lowbit.linear(x, q, precision="int4")
    with pytest.raises(ValueError, match="'int8' has no backward; use it under torch.no_grad"):
        lowbit.linear(x, q, precision="int8")
    with pytest.raises(RuntimeError, match="linear_approximate: expected inputs that require no gradient"):
        torch.ops.lowbit.linear_approximate(x, *q.operands(), 8, None, None, None, 1.0)


@pytest.mark.interpreted
def test_triton_multiplies_exactly():
    """Chosen by name, Triton must not hand the product to the slow reference; exact is within the stated error."""
    q = lowbit.quantize(make_weight((33, 128)))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    with lowbit.use_backend("triton"):
        assert torch.equal(approximate(x, q), lowbit.linear(x, q))
