"""linear_grad_input in Triton, interpreted and as sm_80 PTX on the emulator, against fp64 arithmetic.

``quantized`` gives blocks of different magnitudes: one's scale for another's is far outside of every tolerance.
"""

import math

import pytest
import torch
from cases import DTYPES, assert_within, block_sizes, dtypes, product_tolerance, scaled_codebook_tolerance
from conftest_triton import compiled_only, emulate, interpreted, launches
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_grad_input import RANKS, operands, quantized

from lowbit import reference
from lowbit.ops import rows as flat

linear_grad_input = pytest.importorskip("lowbit.backends.triton.linear_grad_input")
shapes = pytest.importorskip("lowbit.backends.triton.shapes_backward")

HALF = (torch.float16, torch.bfloat16)


def assert_right(out, grad, parts, grad_t=None, lora_a=None):
    """Within the bound for what the format and the shape make the kernels do."""
    rows, k, (format, block_size) = flat(grad), out.shape[-1], parts[4:]
    weight = reference.dequantize(*parts, [grad.shape[-1], k], torch.float32).double()
    exact, magnitude, lora = rows.double() @ weight, rows.double().abs() @ weight.abs(), 0.0
    terms = rows.shape[1]
    if lora_a is not None:
        exact = exact + flat(grad_t).double() @ lora_a.double()
        lora = flat(grad_t).double().abs() @ lora_a.double().abs()
        magnitude, terms = magnitude + lora, terms + 3 * lora_a.shape[0]
    if format != "int8" and k % block_size:
        tolerance = product_tolerance(magnitude, exact, terms, grad.dtype)
    else:
        total = rows.double().abs().sum(1, keepdim=True)
        tolerance = scaled_codebook_tolerance(magnitude, exact, terms, format, grad.dtype, total, lora)
    assert out.dtype == grad.dtype
    assert_within(out.reshape(exact.shape), exact, tolerance)


def interpret(grad, parts, k, grad_t=None, lora_a=None):
    return torch.ops.lowbit_triton.linear_grad_input.default(grad, *parts, k, grad_t, lora_a)


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    m=st.sampled_from((0, 1, 3, 17, 33)),
    n=st.sampled_from((0, 1, 5, 130, 300)),
    k=st.sampled_from((0, 1, 31, 32, 64, 96, 130, 192, 320)),
    rank=st.sampled_from(RANKS),
    dtype=dtypes,
    format=st.sampled_from(("nf4", "fp4", "int8")),
    block_size=st.one_of(st.sampled_from((32, 64)), block_sizes),
    double_quant=st.booleans(),
    magnitude=st.sampled_from((1e-6, 0.02, 30.0)),
    processors=st.sampled_from((1, 40)),
)
def test_any_product(m, n, k, rank, dtype, format, block_size, double_quant, magnitude, processors):
    """A wrong column, scale, mask or split would train a layer on another layer's gradient."""
    parts = quantized((n, k), format, block_size, double_quant, magnitude)
    grad, grad_t, lora_a = operands(m, n, k, rank, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_grad_input, "processors", lambda device: processors)
        out = interpret(grad, parts, k, grad_t, lora_a)
    assert out.shape == (m, k)
    assert_right(out, grad, parts, grad_t, lora_a)


@interpreted
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512])
def test_blocks_and_tiles(block_size, double_quant):
    """A tile of 256 columns spans eight blocks or a part of one: every column has to get its own block's scale."""
    parts = quantized((70, 512), "nf4", block_size, double_quant)
    grad, *_ = operands(2, 70, 512, 0, torch.bfloat16)
    assert_right(interpret(grad, parts, 512), grad, parts)


@interpreted
@pytest.mark.parametrize(("m", "capability"), [(130, None), (4, (8, 0)), (70, (8, 0)), (130, (9, 0))])
def test_tiles_of_each_gpu(monkeypatch, m, capability):
    """Each GPU's own tiles, several of them: rows in the wrong band would be left unwritten."""
    monkeypatch.setattr(linear_grad_input, "capability", lambda device: capability)
    parts = quantized((70, 320), "nf4", 64, True)
    grad, grad_t, lora_a = operands(m, 70, 320, 8, torch.bfloat16)
    assert_right(interpret(grad, parts, 320, grad_t, lora_a), grad, parts, grad_t, lora_a)


@interpreted
@pytest.mark.parametrize("lora_dtype", DTYPES)
def test_strides_and_leading_dimensions(lora_dtype):
    """Gradients come as views of anything; operands read as if they were contiguous would be other numbers."""
    parts = quantized((40, 64), "nf4", 64, True)
    grad, grad_t, lora_a = operands(15, 40, 64, 8, torch.bfloat16)
    expanded = torch.stack([grad, grad], 1)[:, 0].view(3, 5, 40)
    grad_t = grad_t.to(lora_dtype).T.contiguous().T.reshape(3, 5, 8)
    lora_a = lora_a.to(lora_dtype).T.contiguous().T
    out = interpret(expanded, parts, 64, grad_t, lora_a)
    assert out.shape == (3, 5, 64)
    assert_right(out, expanded, parts, grad_t, lora_a)
    transposed = grad.T.contiguous().T
    assert torch.equal(interpret(transposed, parts, 64), interpret(grad, parts, 64))
    repeated = grad[:1].expand(4, 40)
    assert torch.equal(interpret(repeated, parts, 64), interpret(grad[:1], parts, 64).expand(4, 64))
    assert interpret(grad[0], parts, 64).shape == (64,)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_does_not_depend_on_the_run(monkeypatch, dtype):
    """Partial sums are added in one order: two runs of one training step have to agree in every bit."""
    monkeypatch.setattr(linear_grad_input, "processors", lambda device: 40)
    parts = quantized((600, 128), "nf4", 64, True)
    grad, grad_t, lora_a = operands(4, 600, 128, 8, dtype)
    row_bytes = 64
    assert shapes.grad_input_shape(4, 600, row_bytes, dtype, 40, None).splits > 1
    first = interpret(grad, parts, 128, grad_t, lora_a)
    assert torch.equal(interpret(grad, parts, 128, grad_t, lora_a), first)
    assert_right(first, grad, parts, grad_t, lora_a)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_spread_as_in_the_reference(dtype, bad):
    """Training that went wrong has to be seen, in just the elements where the reference shows it."""
    assert_spreads(interpret, dtype, bad)


def assert_spreads(run, dtype, bad):
    k = 256
    packed, absmax, _, _, format, block_size = quantized((130, k), "nf4", 64, False)
    grad = operands(5, 130, k, 0, dtype)[0]
    grad[1, 100] = bad
    absmax[4 * 129 + 1] = bad  # columns 64 to 127 of the last row
    parts = (packed, absmax, None, None, format, block_size)
    out, expected = run(grad, parts, k), reference.linear_grad_input(grad, *parts, k)
    finite = expected.isfinite()
    assert not finite.all() and finite.any()
    assert torch.equal(out.isfinite(), finite)
    assert torch.equal(out[~finite].nan_to_num(), expected[~finite].nan_to_num())


def assert_lora_spreads(run):
    """Infinite factors, also together, next to ones that are a bf16 (and next to a 0, which makes NaN)."""
    parts = quantized((8, 64), "nf4", 64, True)
    grad, grad_t, lora_a = operands(6, 8, 64, 1, torch.bfloat16)
    grad_t[:, 0] = torch.tensor([float("inf"), -float("inf"), 1.0, 0.0, 0.3, float("nan")])
    lora_a[0, :4] = torch.tensor([1.0, -float("inf"), 0.0, -0.7])
    out, expected = run(grad, parts, 64, grad_t, lora_a), reference.linear_grad_input(grad, *parts, 64, grad_t, lora_a)
    finite = expected.isfinite()
    assert torch.equal(out.isfinite(), finite)
    assert torch.equal(out[~finite].nan_to_num(), expected[~finite].nan_to_num())


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinite_lora_spreads_as_in_the_reference():
    """Split into two bf16, an infinity must not become NaN, nor a number."""
    assert_lora_spreads(interpret)


def run_ptx(grad, parts, k, grad_t=None, lora_a=None):
    """What the sm_80 PTX makes, assembly included."""
    with launches("sm_80") as made:
        out = linear_grad_input.linear_grad_input(grad, *parts, k, grad_t, lora_a)
    for launch in made:
        emulate(launch)
    return out


@compiled_only
@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "dtype", "format", "block_size", "double_quant", "magnitude"),
    [
        (3, 40, 128, 0, torch.bfloat16, "nf4", 64, True, 0.02),
        (5, 300, 320, 17, torch.bfloat16, "nf4", 32, True, 0.02),
        (17, 130, 192, 8, torch.float16, "fp4", 64, False, 1e-6),
        (70, 100, 256, 1, torch.bfloat16, "fp4", 128, False, 30.0),
        (2, 33, 64, 8, torch.float32, "nf4", 32, True, 0.02),
        (3, 33, 77, 0, torch.bfloat16, "int8", 32, True, 0.02),
    ],
)
def test_ptx(monkeypatch, m, n, k, rank, dtype, format, block_size, double_quant, magnitude):
    """The assembly and the layouts of the compiled kernel: the interpreter runs neither."""
    monkeypatch.setattr(linear_grad_input, "processors", lambda device: 4)
    parts = quantized((n, k), format, block_size, double_quant, magnitude)
    grad, grad_t, lora_a = operands(m, n, k, rank, dtype)
    assert_right(run_ptx(grad, parts, k, grad_t, lora_a), grad, parts, grad_t, lora_a)


@compiled_only
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_non_finite_values_in_ptx(bad):
    """Scales are split in two, and an infinite one has no second part: the difference of two would be a NaN."""
    assert_spreads(run_ptx, torch.bfloat16, bad)


@compiled_only
def test_infinite_lora_in_ptx():
    """The compiler may not take a difference of infinities for 0."""
    assert_lora_spreads(run_ptx)


@given(
    m=st.integers(1, 10000),
    n=st.integers(0, 30000),
    blocks=st.integers(1, 400),
    dtype=dtypes,
    count=st.integers(1, 200),
    capability=st.sampled_from((None, (8, 0), (9, 0), (12, 0))),
)
def test_splits_cover_every_row_of_w_once(m, n, blocks, dtype, count, capability):
    """A row of W in no split, or in two, is a wrong gradient; a split without rows is a launch for nothing."""
    shape = shapes.grad_input_shape(m, n, 16 * blocks, dtype, count, capability)
    assert shape.split_rows % shape.tile_n == 0
    assert shape.splits == max(1, math.ceil(n / max(shape.split_rows, 1)))
    assert shape.bytes % (16 * shape.warps) == 0  # whole fragments for each warp
