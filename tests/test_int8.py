"""The int8 format: bytes and decoded weights bit for bit, products, and bitsandbytes' 8-bit files."""

import math
from pathlib import Path

import pytest
import torch
from cases import (
    DTYPES,
    KERNELS,
    LINEAR_SHAPES,
    ROWS,
    assert_within,
    dtypes,
    kernels,
    magnitudes,
    make_weight,
    product_tolerance,
    weight_error,
    weight_error_backward,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import lowbit
from lowbit import QuantizedTensor, files
from lowbit.backends import native as native_backend

GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes_0_50_2.safetensors"

needs_native = pytest.mark.skipif(native_backend.missing_reason() is not None, reason="no compiled extension")
shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 300)),
    st.tuples(st.integers(0, 20), st.integers(0, 100)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 70)),
    st.sampled_from([(3, 4099), (1, 5000)]),
)


def assert_same_bytes(ours: QuantizedTensor, theirs: QuantizedTensor) -> None:
    assert repr(ours) == repr(theirs)
    assert torch.equal(ours.packed, theirs.packed) and torch.equal(ours.absmax, theirs.absmax)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=80, deadline=None)
@given(shape=shapes, dtype=dtypes, magnitude=magnitudes, out_dtype=dtypes)
def test_bytes_and_decoded_weights_equal_the_reference(name, shape, dtype, magnitude, out_dtype):
    """Backends that disagree in one bit give one file two meanings."""
    weight = make_weight(shape, dtype, magnitude)
    with kernels("reference"):
        expected = lowbit.quantize(weight, format="int8")
        decoded = expected.dequantize(out_dtype)
    assert expected.scales().shape == (math.prod(shape[:-1]),)
    with kernels(name):
        q = lowbit.quantize(weight, format="int8")
        assert_same_bytes(q, expected)
        ours, written = q.dequantize(out_dtype), torch.empty(shape, dtype=out_dtype)
        assert lowbit.dequantize(q, out=written) is written
    assert ours.shape == shape and ours.dtype == out_dtype
    assert torch.equal(ours, decoded) and torch.equal(written, decoded)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_equals_golden_vectors(name, index):
    """The bytes are a promise, also without bitsandbytes installed."""
    with safe_open(GOLDEN, "pt") as golden, kernels(name):
        weight, codes, absmax, decoded = (
            golden.get_tensor(f"int8.{index}.{part}") for part in ("weight", "codes", "absmax", "decoded")
        )
        q = lowbit.quantize(weight, format="int8")
        assert torch.equal(q.packed.view(torch.int8).view(codes.shape), codes)
        assert torch.equal(q.scales(), absmax)
        assert torch.equal(q.dequantize(torch.float32), decoded)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-42, 1e-37, 1e-6, 0.02, 1e4])
def test_equals_live_bitsandbytes(name, dtype, magnitude):
    """A file of theirs must hold the same weights here, and one of ours there; halves of absmax try the rounding."""
    bnb = pytest.importorskip("bitsandbytes").functional
    weight = make_weight((130, 97), dtype, magnitude)
    weight[:, 5] = weight.abs().amax(1) / 2
    weight[3] = 0
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
    with kernels(name):
        q = lowbit.quantize(weight, format="int8")
        assert torch.equal(q.packed.view(torch.int8).view(130, 97), codes)
        assert torch.equal(q.scales(), absmax)
        assert torch.equal(q.dequantize(torch.float32), bnb.int8_vectorwise_dequant(codes, absmax))
        for out_dtype in DTYPES:
            assert torch.equal(q.dequantize(out_dtype), bnb.int8_vectorwise_dequant(codes, absmax).to(out_dtype))


@pytest.mark.parametrize("name", KERNELS)
def test_codes_round_to_nearest_even(name):
    """A tie that goes the wrong way is another byte than bitsandbytes'."""
    weight = torch.cat([torch.tensor([127.0]), torch.arange(-126, 127) + 0.5, torch.tensor([-127.0])])
    with kernels(name):
        codes = lowbit.quantize(weight, format="int8").packed.view(torch.int8)
    # The scale is fl(fl(1 / 127) * 127), which is 1: the weights themselves are rounded.
    assert codes.tolist() == [round(float(value)) for value in weight]


@pytest.mark.parametrize("name", KERNELS)
def test_rows_of_zeros_and_nearly(name):
    """Their scale is infinite; the codes must still be zeros, not what a NaN converts to."""
    weight = torch.tensor([[0.0, -0.0, 0.0], [1e-40, -1e-40, 0.0], [1.0, -0.5, 0.0]])
    with kernels(name):
        q = lowbit.quantize(weight, format="int8")
        assert q.packed.view(torch.int8).flatten().tolist() == [0] * 6 + [127, -64, 0]
        assert torch.equal(q.scales(), weight.abs().amax(1))
        assert q.dequantize()[:2].abs().max() == 0


def test_error_is_within_half_a_step():
    """Each weight goes to the nearest code, for 1 byte a weight and 4 a row."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    q = lowbit.quantize(weight, format="int8")
    step = q.scales()[:, None] / 127
    assert bool(((q.dequantize() - weight).abs() <= 0.5001 * step).all())
    assert q.nbytes == 64 * 256 + 64 * 4 and q.spec == lowbit.WeightSpec("int8")


def test_block_size_and_double_quant_are_ignored():
    """A config made for NF4 would be refused, or change how rows and scales are stored."""
    weight = make_weight((8, 100))
    options = {"block_size": 128, "double_quant": True}
    assert_same_bytes(
        lowbit.quantize(weight, format="int8", **options), lowbit.quantize(weight, format="int8", double_quant=False)
    )


@pytest.mark.parametrize("name", KERNELS)
def test_non_contiguous_weight(name):
    """A transposed weight must be read in its logical order; rows are those of the view."""
    weight = make_weight((96, 70))
    with kernels(name):
        ours, theirs = (lowbit.quantize(w, format="int8") for w in (weight.T, weight.T.contiguous()))
    assert_same_bytes(ours, theirs)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 78, 79, 1026])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_weight_is_an_error(name, bad, index, dtype):
    """A NaN would silently turn a whole row into garbage."""
    weight = make_weight((13, 79), dtype)
    weight.view(-1)[index] = bad
    with kernels(name), pytest.raises(ValueError, match=f"weight.*finite.*index {index}"):
        lowbit.quantize(weight, format="int8")


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=100, deadline=None)
@given(
    rows=st.sampled_from(ROWS),
    shape=st.sampled_from(LINEAR_SHAPES),
    dtype=dtypes,
    rank=st.sampled_from((0, 1, 8)),
    has_bias=st.booleans(),
    magnitude=st.sampled_from((1e-6, 0.02, 30.0)),
)
def test_linear(name, rows, shape, dtype, rank, has_bias, magnitude):
    """A wrong product in some corner shape or dtype would train a model on noise."""
    n, k = shape
    generator = torch.Generator().manual_seed(0)
    q = lowbit.quantize(make_weight(shape, torch.float32, magnitude), format="int8")
    weight = q.dequantize(torch.float32).double()
    x = torch.randn(rows, k, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(n, generator=generator).to(dtype) if has_bias else None
    lora_a, lora_b = torch.randn(rank, k, generator=generator), torch.randn(n, rank, generator=generator)
    grad = torch.randn(rows, n, generator=generator).to(dtype)
    # t as an operand of its own: how it came about is not this format's.
    t = (x.detach().float() @ lora_a.T).requires_grad_()
    with kernels(name):
        namespace = lowbit.backends.NAMESPACES[name.partition("-")[0]]
        op = getattr(torch.ops, namespace).linear
        lora = (t, lora_b, 0.5) if rank else (None, None, 1.0)
        y = op(x, *q.operands(), n, bias, *lora)
        (grad_x,) = torch.autograd.grad(y, x, grad)
    assert y.dtype == dtype and y.shape == (rows, n) and grad_x.dtype == dtype
    exact, sizes = x.double() @ weight.T, x.double().abs() @ weight.T.abs()
    if has_bias:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    if rank:
        exact = exact + 0.5 * t.double() @ lora_b.double().T
        sizes = sizes + 0.5 * t.double().abs() @ lora_b.double().abs().T
    rounding = weight_error(name, "int8", dtype, rows, k)
    assert_within(y.detach(), exact.detach(), product_tolerance(sizes, exact, k + rank, dtype, rounding).detach())
    exact, sizes = grad.double() @ weight, grad.double().abs() @ weight.abs()
    rounding = weight_error_backward(name, "int8", dtype, rows, k)
    assert_within(grad_x, exact, product_tolerance(sizes, exact, n, dtype, rounding))


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict_round_trip(dtype):
    """A saved weight must come back bit for bit; only its dtype is the reader's to say."""
    q = lowbit.quantize(make_weight((33, 65), dtype), format="int8")
    state = files.to_state(q, "layer.weight") | {"other": torch.ones(1)}
    assert set(state) == {"layer.weight", "layer.SCB", "layer.weight_format", "other"}
    assert_same_bytes(files.from_state(state, "layer.weight", int8_dtype=dtype), q)
    assert files.from_state(state, "layer.weight").dtype == torch.float32
    assert set(files.to_state(q)) == {"weight", "SCB", "weight_format"}


def test_state_dict_is_bitsandbytes():
    """Linear8bitLt writes what we read and loads, strictly, what we write."""
    bnb = pytest.importorskip("bitsandbytes")
    linear = torch.nn.Linear(96, 40)

    def theirs_from(linear):
        layer = bnb.nn.Linear8bitLt(96, 40, has_fp16_weights=False)
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")  # quantizes

    theirs = theirs_from(linear)
    state = theirs.state_dict()
    # They round to float16 before they quantize.
    ours = lowbit.quantize(linear.weight.half(), format="int8")
    assert_same_bytes(files.from_state(state, int8_dtype=torch.float16), ours)
    written = files.to_state(ours)
    for key, value in written.items():
        assert value.dtype == state[key].dtype and value.shape == state[key].shape and torch.equal(value, state[key])

    other = theirs_from(torch.nn.Linear(96, 40))
    other.load_state_dict(written | {"bias": linear.bias.detach()}, strict=True)
    assert torch.equal(other.weight, state["weight"])
    assert torch.equal(other.weight.SCB, state["SCB"])


def broken_states():
    state = files.to_state(lowbit.quantize(make_weight((33, 65)), format="int8"))
    yield {k: v for k, v in state.items() if k != "SCB"}, ValueError, "missing key 'SCB'"
    yield state | {"SCB": torch.ones(32)}, ValueError, "absmax: expected 33 elements"
    yield state | {"SCB": torch.ones(33).half()}, TypeError, "absmax: expected torch.float32"
    yield state | {"weight": state["weight"].view(-1)}, ValueError, "weight: expected int8 codes of 2 dimensions"
    yield state | {"weight": state["weight"].view(torch.uint8)}, ValueError, "expected one key"
    yield state | {"weight_format": torch.ones((), dtype=torch.uint8)}, ValueError, "weight_format: expected 0"


@pytest.mark.parametrize(("state", "error", "message"), list(broken_states()))
def test_broken_state_is_an_error(state, error, message):
    """A damaged file, or one in an old hardware layout, must be refused, not decoded to noise."""
    with pytest.raises(error, match=message):
        files.from_state(state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed": torch.zeros(399, dtype=torch.uint8)}, ValueError, "packed: expected 400 elements"),
        ({"absmax": torch.ones(5)}, ValueError, "absmax: expected 4 elements"),
        ({"absmax": torch.ones(4).byte()}, TypeError, "absmax: expected torch.float32"),
        ({"group_scales": torch.ones(1), "offset": torch.ones(())}, ValueError, "expected None .* for 'int8'"),
    ],
)
def test_parts_that_do_not_fit(change, error, message):
    """Kernels trust these sizes."""
    parts = {
        "packed": torch.zeros(400, dtype=torch.uint8),
        "absmax": torch.ones(4),
        "shape": (4, 100),
        "dtype": torch.float32,
        "spec": lowbit.WeightSpec("int8"),
    }
    QuantizedTensor(**parts)
    with pytest.raises(error, match=message):
        QuantizedTensor(**(parts | change))


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(399, dtype=torch.uint8)}, "packed: expected 400 elements, got 399"),
        ({1: torch.ones(3)}, "absmax: expected 4 elements, got 3"),
        ({1: torch.ones(4).byte()}, "absmax: expected dtype float32, got uint8"),
        ({2: torch.ones(1), 3: torch.ones(())}, "expected neither"),
        ({4: "int8:100"}, "spec: expected .*int8.*, got .*int8:100"),
        ({5: [8, 50]}, "absmax: expected 8 elements, got 4"),
        ({5: [2**32, 2**32]}, "shape: expected sizes whose product fits"),
    ],
)
def test_wrong_direct_calls_raise(change, message):
    """A wrong call of torch.ops.lowbit must not read out of bounds."""
    arguments = [torch.zeros(400, dtype=torch.uint8), torch.ones(4), None, None, "int8", [4, 100], torch.float32]
    torch.ops.lowbit.dequantize(*arguments)
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowbit.dequantize(*arguments)


@needs_native
def test_wrong_direct_quantize_raises():
    """A wrong call would write codes out of bounds."""
    with pytest.raises(RuntimeError, match="spec: expected .*int8.*, got .*int8:21"):
        torch.ops.lowbit.quantize(torch.ones(3, 7), "int8:21")


def test_results_do_not_depend_on_the_number_of_threads():
    """A run on another machine with the same seed must give the same bits."""
    weight, threads, results = make_weight((200, 999)), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(lowbit.quantize(weight, format="int8"))
            assert torch.equal(results[-1].dequantize(), results[0].dequantize())
    finally:
        torch.set_num_threads(threads)
    assert_same_bytes(*results)
