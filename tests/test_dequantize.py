"""dequantize: decoded weights bit for bit against the reference and bitsandbytes."""

import pytest
import torch
from cases import DTYPES, FORMATS, KERNELS, block_sizes, dtypes, formats, kernels, magnitudes, make_weight
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit
from lowbit import format as fmt
from lowbit import reference


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=60, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 300)),
        st.tuples(st.integers(1, 40), st.integers(1, 200)),
        st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 90)),
        st.just((3, 4099)),
    ),
    dtype=dtypes,
    format=formats,
    block_size=block_sizes,
    double_quant=st.booleans(),
    magnitude=magnitudes,
)
def test_equals_the_reference(name, shape, dtype, format, block_size, double_quant, magnitude):
    """A backend that decodes other bits trains on another model than the one saved."""
    weight = make_weight(shape, torch.float32, magnitude)
    q = lowbit.quantize(weight, format=format, block_size=block_size, double_quant=double_quant)
    with kernels("reference"):
        expected = q.dequantize(dtype)
    with kernels(name):
        decoded = q.dequantize(dtype)
    assert decoded.shape == shape and decoded.dtype == dtype
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_live_bitsandbytes(format, dtype):
    """A file of theirs must hold the same weights here."""
    bnb = pytest.importorskip("bitsandbytes").functional
    packed, state = bnb.quantize_4bit(make_weight((96, 384)), quant_type=format, compress_statistics=True)
    q = lowbit.QuantizedTensor(
        packed,
        state.absmax,
        state.state2.absmax,
        state.offset.reshape(()),
        shape=(96, 384),
        dtype=torch.float32,
        spec=lowbit.WeightSpec(format),
    )
    state.dtype = dtype
    assert torch.equal(q.dequantize(dtype), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("name", KERNELS)
def test_rounds_to_nearest_even_once(name):
    """Double rounding, or truncation, would shift every 16-bit weight."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(8 * torch.randn(1 << 12, generator=generator)).clamp(max=3e38)
    packed = torch.full((scales.numel() * 16,), 0xFF, dtype=torch.uint8)  # all 1.0
    spec = lowbit.WeightSpec("nf4", 32, double_quant=False)
    q = lowbit.QuantizedTensor(packed, scales, shape=(scales.numel() * 32,), dtype=torch.float32, spec=spec)
    with kernels(name):
        for dtype in DTYPES:
            assert torch.equal(q.dequantize(dtype)[::32], scales.to(dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_error_is_within_half_a_gap(format):
    """Decoding must give back the nearest codebook value, not some other one."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    q = lowbit.quantize(weight, format=format, double_quant=False)
    ordered = torch.sort(lowbit.format.codebook(format)).values
    half_gap = ordered.diff().max() / 2
    limit = q.scales().repeat_interleave(64).view(64, 64) * half_gap
    assert bool(((q.dequantize() - weight).abs() <= limit * (1 + 1e-6)).all())


def test_scales_are_the_decoded_absmax():
    """.scales() is what users plot and check: it must be what decoding multiplies by."""
    weight = make_weight((64, 128))
    plain, double = lowbit.quantize(weight, double_quant=False), lowbit.quantize(weight)
    assert torch.equal(plain.scales(), weight.view(-1, 64).abs().amax(1))
    assert double.scales().dtype == torch.float32 and double.scales().shape == (128,)
    assert (double.scales() - plain.scales()).abs().max() < 0.02 * plain.scales().max()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_bad_dtype(dtype):
    """An unsupported output dtype is named."""
    with pytest.raises(TypeError, match="dtype: expected float32"):
        lowbit.dequantize(lowbit.quantize(torch.ones(8)), dtype)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("format", fmt.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_into_a_given_output(name, format, dtype):
    """Decoding into the caller's memory would write other bits, or beside it, also if it is not aligned."""
    q = lowbit.quantize(make_weight((33, 65)), format=format)
    memory = torch.full((33 * 65 + 2,), 7.0, dtype=dtype)
    out = memory[1:-1].view(33, 65)
    with kernels(name):
        assert lowbit.dequantize(q, out=out) is out
        assert torch.equal(out, q.dequantize(dtype))
        assert torch.equal(lowbit.dequantize(q, dtype, out=torch.empty_like(out)), out)
    assert memory[0] == memory[-1] == 7


@pytest.mark.parametrize(
    ("out", "dtype", "error", "message"),
    [
        ([1.0], None, TypeError, "out: expected a dense torch.Tensor, got list"),
        (torch.empty(8, 64).double(), None, TypeError, "out: expected float32.*float64"),
        (torch.empty(8, 64), torch.float16, TypeError, "out: expected torch.float16.*float32"),
        (torch.empty(8, 65), None, ValueError, r"out: expected shape \(8, 64\), got \(8, 65\)"),
        (torch.empty(512), None, ValueError, r"out: expected shape \(8, 64\), got \(512,\)"),
        (torch.empty(8, 64, device="meta"), None, ValueError, "out: expected device cpu.*meta"),
        (torch.empty(64, 8).T, None, ValueError, "out: expected a contiguous tensor"),
        (torch.empty(8, 64, requires_grad=True), None, ValueError, "out: expected a tensor that requires no gradients"),
    ],
)
def test_bad_out(out, dtype, error, message):
    """A wrong output would be written past its end, or only in part."""
    with pytest.raises(error, match=message):
        lowbit.dequantize(lowbit.quantize(torch.ones(8, 64)), dtype, out=out)


def test_autograd_sees_that_out_was_overwritten():
    """A backward through the old values would be silently wrong."""
    out, factor = torch.ones(8, 64), torch.ones(8, 64, requires_grad=True)
    y = (out * factor).sum()
    lowbit.dequantize(lowbit.quantize(torch.ones(8, 64)), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_out_compiles():
    """A decoding step inside a compiled function keeps one graph."""
    q, out = lowbit.quantize(make_weight((8, 64))), torch.zeros(8, 64)
    torch.compile(lambda out: lowbit.dequantize(q, out=out) * 2, fullgraph=True, backend="aot_eager")(out)
    assert torch.equal(out, q.dequantize())


def test_bad_q():
    """Passing a plain tensor is a frequent slip."""
    with pytest.raises(TypeError, match="q: expected a lowbit.QuantizedTensor"):
        lowbit.dequantize(torch.ones(8))


@pytest.mark.parametrize("name", KERNELS)
def test_large_results(name):
    """From 32 MB on kernels write past the caches: nothing may be lost there, nor at the ragged end."""
    q = lowbit.quantize(make_weight((4097, 2053)))
    expected = reference.dequantize(*q.operands(), [4097, 2053], torch.float32)
    with kernels(name):
        assert torch.equal(lowbit.dequantize(q), expected)
        padded = torch.empty(expected.numel() + 1)  # one element past an aligned address
        out = padded[1:].view(expected.shape)
        assert torch.equal(lowbit.dequantize(q, out=out), expected)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rows", [(0, 0), (0, 3), (0, 130), (3, 130), (128, 300), (256, 300), (7, 8)])
@pytest.mark.parametrize("columns", [192, 100])
def test_rows_of_a_weight_of_several_groups(name, rows, columns):
    """A slice, or the shard of a process, would be refused by the kernels or get the scales of other rows."""
    q = lowbit.quantize(make_weight((300, columns)))
    part, dense = q[slice(*rows)], q.dequantize()[slice(*rows)]
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    with kernels(name):
        assert torch.equal(part.dequantize(), dense)
        expected = torch.nn.functional.linear(x, lowbit.quantize(make_weight((300, columns))))[:, slice(*rows)]
        torch.testing.assert_close(torch.nn.functional.linear(x, part), expected)
