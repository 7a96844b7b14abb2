"""quantize(scale="search"): the same choice on every kernel set, less error, bytes that any reader decodes."""

import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, FORMATS, KERNELS, block_sizes, dtypes, formats, kernels, magnitudes, make_weight
from conftest_bitsandbytes import assert_bitsandbytes_decodes
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit
from lowbit import format as fmt


def squared_error(q, weight, importance=None):
    error = (q.dequantize(torch.float32).double() - weight.double()).square()
    return float((error if importance is None else error * importance.double()).sum())


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(((0,), (1,), (33,), (64,), (5, 7), (3, 100), (2, 3, 65), (20, 257))),
    dtype=dtypes,
    format=formats,
    block_size=block_sizes,
    double_quant=st.booleans(),
    magnitude=magnitudes,
    weighted=st.sampled_from((None, "random", "zeros")),
)
def test_bytes_equal_the_reference(name, shape, dtype, format, block_size, double_quant, magnitude, weighted):
    """One seed must give one file, whatever machine quantized it."""
    weight = make_weight(shape, dtype, magnitude)
    importance = None
    if weighted:
        importance = torch.rand(shape[-1], generator=torch.Generator().manual_seed(3))
        importance = importance * (importance > 0.5) if weighted == "random" else importance * 0
    options = {"format": format, "block_size": block_size, "double_quant": double_quant}
    with kernels("reference"):
        expected = lowbit.quantize(weight, scale="search", importance=importance, **options)
    with kernels(name):
        q = lowbit.quantize(weight, scale="search", importance=importance, **options)
    for ours, theirs in zip(q.parts(), expected.parts(), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_never_worse_than_absmax(format, block_size):
    """The plain absmax is among the candidates: a search that loses to it is broken."""
    weight = make_weight((40, 1000))
    options = {"format": format, "block_size": block_size, "double_quant": False}
    searched = lowbit.quantize(weight, scale="search", **options).dequantize().double()
    plain = lowbit.quantize(weight, **options).dequantize().double()
    blocks = torch.arange(weight.numel()) // block_size
    per_block = torch.zeros(int(blocks[-1]) + 1, dtype=torch.float64)
    gain = (plain - weight.double()).square() - (searched - weight.double()).square()
    per_block.index_add_(0, blocks, gain.flatten())
    # Errors are summed and compared in fp32.
    assert bool((per_block >= -1e-6 * (plain - weight.double()).square().max() * block_size).all())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_falls(double_quant, dtype):
    """The point of the search: a sixth less error on normally distributed weights, in the same bytes."""
    weight = (torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    searched = lowbit.quantize(weight, scale="search", double_quant=double_quant)
    plain = lowbit.quantize(weight, double_quant=double_quant)
    assert searched.nbytes == plain.nbytes
    assert squared_error(searched, weight) < 0.88 * squared_error(plain, weight)


def test_importance_lowers_the_error_that_matters():
    """Calibration must pay: the weighted error falls below that of the unweighted search."""
    weight = make_weight((256, 512))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) ** 8
    weighted = lowbit.quantize(weight, scale="search", importance=importance)
    unweighted = lowbit.quantize(weight, scale="search")
    assert squared_error(weighted, weight, importance) < 0.95 * squared_error(unweighted, weight, importance)
    scaled = lowbit.quantize(weight, scale="search", importance=importance.double() * 1e-60)
    assert torch.equal(scaled.packed, weighted.packed)  # only ratios count


def test_signed_scales_are_used():
    """A block whose largest element is negative fits the lopsided codebook better upside down."""
    q = lowbit.quantize(make_weight((64, 512)), scale="search", double_quant=False)
    negative = float((q.absmax < 0).float().mean())
    assert 0.2 < negative < 0.8


def test_bitsandbytes_decodes_the_same():
    """Files have to stay readable elsewhere, negative scales and all."""
    assert_bitsandbytes_decodes(lowbit.quantize(make_weight((64, 192)), scale="search"))


def test_results_do_not_depend_on_the_number_of_threads():
    """The same checkpoint must give the same file on every machine size."""
    weight = make_weight((300, 256))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(lowbit.quantize(weight, scale="search"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results[0].parts(), results[1].parts(), strict=True))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("scale", [0.37, -0.37])
def test_finds_the_scale_a_block_was_made_with(name, scale):
    """Weights that were decoded once must come back whole, upside down or not."""
    weight = fmt.codebook("nf4").repeat(4) * scale
    with kernels(name):
        q = lowbit.quantize(weight, scale="search", double_quant=False)
        assert float(q.absmax) == torch.tensor(scale)
        assert torch.equal(q.dequantize(), weight)


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        ([1.0], TypeError, "importance: expected a torch.Tensor, got list"),
        (torch.ones(64, dtype=torch.int64), TypeError, "importance: expected a floating-point dtype, got torch.int64"),
        (torch.ones(63), ValueError, r"importance: expected shape \(64,\), one number per input column, got \(63,\)"),
        (torch.ones(64, 1), ValueError, r"importance: expected shape \(64,\)"),
        (torch.ones(64).to("meta"), ValueError, "importance: expected device cpu.*meta"),
        (torch.ones(64).index_fill(0, torch.tensor(3), -1.0), ValueError, "got -1.0 in column 3"),
        (torch.ones(64).index_fill(0, torch.tensor(5), float("nan")), ValueError, "got nan in column 5"),
    ],
)
def test_bad_importance(importance, error, message):
    """Calibration gone wrong has to be heard of, not quantized with."""
    with pytest.raises(error, match=message):
        lowbit.quantize(make_weight((8, 64)), scale="search", importance=importance)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(name, bad):
    """A NaN would hide in a quantized model."""
    weight = make_weight((8, 64))
    weight[3, 5] = bad
    with kernels(name), pytest.raises(ValueError, match="weight: expected finite values, got 1 NaN or inf"):
        lowbit.quantize(weight, scale="search")
