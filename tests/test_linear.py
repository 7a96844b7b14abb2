"""linear and lora_linear: forward and every gradient against dense fp64 arithmetic on the decoded weight."""

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
    weight_error,
    weight_error_backward,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit


def operands(rows, shape, rank, dtype, lora_dtype, seed=0):
    """Return x, bias, lora_a and lora_b as leaves that require gradients."""
    n, k = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, k), (n,), (rank, k), (n, rank))
    made = [torch.randn(size, generator=generator) for size in sizes]
    return [tensor.to(dtype if i < 2 else lora_dtype).requires_grad_() for i, tensor in enumerate(made)]


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=120, deadline=None)
@given(
    rows=st.sampled_from(ROWS),
    shape=st.sampled_from(LINEAR_SHAPES),
    dtype=dtypes,
    format=formats,
    block_size=block_sizes,
    double_quant=st.booleans(),
    bias_dtype=st.sampled_from((None, *DTYPES)),
    magnitude=st.sampled_from((1e-6, 0.02, 30.0)),
)
def test_linear(name, rows, shape, dtype, format, block_size, double_quant, bias_dtype, magnitude):
    """A wrong product in some corner shape or dtype would train a model on noise."""
    q = lowbit.quantize(
        make_weight(shape, torch.float32, magnitude), format=format, block_size=block_size, double_quant=double_quant
    )
    x, bias, _, _ = operands(rows, shape, 1, dtype, dtype)
    bias = None if bias_dtype is None else bias.detach().to(bias_dtype)
    weight = q.dequantize(torch.float32).double()
    with kernels(name):
        y = lowbit.linear(x, q, bias)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        (grad_x,) = torch.autograd.grad(y, x, grad)
    assert y.dtype == dtype and y.shape == (rows, shape[0]) and grad_x.dtype == dtype
    exact, magnitudes = x.double() @ weight.T, x.double().abs() @ weight.T.abs()
    if bias is not None:
        exact, magnitudes = exact + bias.double(), magnitudes + bias.double().abs()
    rounding = weight_error(name, format, dtype, rows, shape[1])
    tolerance = product_tolerance(magnitudes, exact, shape[1], dtype, rounding)
    assert_within(y.detach(), exact.detach(), tolerance.detach())
    exact, magnitudes = grad.double() @ weight, grad.double().abs() @ weight.abs()
    rounding = weight_error_backward(name, format, dtype, rows, shape[1])
    assert_within(grad_x, exact, product_tolerance(magnitudes, exact, shape[0], dtype, rounding))


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from(ROWS),
    shape=st.sampled_from(LINEAR_SHAPES),
    rank=st.sampled_from((1, 3, 8, 17)),
    scaling=st.sampled_from((0.5, 2.0, 0.7)),
)
def test_lora_linear_gradients_fp32(name, rows, shape, rank, scaling):
    """Every gradient must be the dense layer's: an optimizer would follow a wrong one without complaint."""
    q = lowbit.quantize(make_weight(shape))
    leaves = operands(rows, shape, rank, torch.float32, torch.float32)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    weight = q.dequantize().double()

    with kernels(name):
        x, bias, lora_a, lora_b = leaves
        y = lowbit.lora_linear(x, q, lora_a, lora_b, scaling, bias)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(y, leaves, grad)

    def dense(leaves, weight, grad):
        x, bias, lora_a, lora_b = leaves
        y = x @ weight.T + scaling * (x @ lora_a.T) @ lora_b.T + bias
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    expected = dense(exact_leaves, weight, grad.double())
    # The same sums of absolute values: where terms cancel, the error stays that of the terms.
    absolute_leaves = [leaf.detach().abs().requires_grad_() for leaf in exact_leaves]
    magnitudes = dense(absolute_leaves, weight.abs(), grad.double().abs())
    terms = shape[0] + shape[1] + rank + rows  # no chain of contractions is longer
    for actual, exact, magnitude in zip((y.detach(), *gradients), expected, magnitudes, strict=True):
        assert actual.dtype == torch.float32 and actual.shape == exact.shape
        assert_within(actual, exact, product_tolerance(magnitude, exact, terms, torch.float32))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora_dtype", DTYPES)
def test_lora_dtypes(name, dtype, lora_dtype):
    """Output follows x; gradients follow their parameters: anything else breaks the optimizer or the next layer."""
    q = lowbit.quantize(make_weight((96, 128)))
    x, bias, lora_a, lora_b = leaves = operands(6, (96, 128), 8, dtype, lora_dtype)
    with kernels(name):
        y = lowbit.lora_linear(x, q, lora_a, lora_b, 0.5, bias)
        gradients = torch.autograd.grad(y.float().square().sum(), leaves)
    assert y.dtype == dtype
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]

    x, bias, lora_a, lora_b = (leaf.detach().double() for leaf in leaves)
    t = x @ lora_a.T
    exact = x @ q.dequantize().double().T + 0.5 * t @ lora_b.T + bias
    magnitude = x.abs() @ q.dequantize().double().abs().T + 0.5 * (x.abs() @ lora_a.abs().T) @ lora_b.abs().T
    # t is rounded to the wider of both dtypes before it is used.
    wider = torch.promote_types(dtype, lora_dtype)
    roundoff = torch.finfo(wider).eps / 2 * 0.5 * t.abs() @ lora_b.abs().T
    rounding = weight_error(name, "nf4", dtype, 6, 128)
    tolerance = product_tolerance(magnitude + bias.abs(), exact, 128 + 8, dtype, rounding) + roundoff * 1.01
    assert_within(y.detach(), exact, tolerance)


@pytest.mark.parametrize("name", KERNELS)
def test_leading_dimensions_and_strides(name):
    """Batches, sequences and transposed views must come out as the same rows do."""
    q = lowbit.quantize(make_weight((40, 64)))
    x = torch.randn(3, 5, 7, 64, generator=torch.Generator().manual_seed(0))
    with kernels(name):
        rows = lowbit.linear(x.reshape(-1, 64), q)
        assert torch.equal(lowbit.linear(x, q), rows.view(3, 5, 7, 40))
        strided = x.transpose(0, 2)
        # Close, not equal: the reference's BLAS picks its summation order by the layout.
        torch.testing.assert_close(lowbit.linear(strided, q), rows.view(3, 5, 7, 40).transpose(0, 2))
        assert lowbit.linear(x[0, 0, 0], q).shape == (40,)
        assert lowbit.linear(x[:0], q).shape == (0, 5, 7, 40)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("scaling", [1.0, 0.5])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_strided_operands(name, scaling, lora_dtype):
    """Kernels read operands where they lie: those that are not contiguous must not be read as if they were."""
    q = lowbit.quantize(make_weight((48, 64)))
    x, bias, lora_a, lora_b = (leaf.detach() for leaf in operands(3, (48, 64), 4, torch.float32, lora_dtype))
    strided = [lora_a.T.contiguous().T, lora_b.T.contiguous().T, torch.stack([bias, bias], 1)[:, 1]]
    assert not any(operand.is_contiguous() for operand in strided)
    with kernels(name):
        y = lowbit.lora_linear(x, q, *strided[:2], scaling, strided[2])
    x, bias, lora_a, lora_b, weight = (tensor.double() for tensor in (x, bias, lora_a, lora_b, q.dequantize()))
    exact = x @ weight.T + scaling * (x @ lora_a.T) @ lora_b.T + bias
    magnitude = x.abs() @ weight.abs().T + scaling * (x.abs() @ lora_a.abs().T) @ lora_b.abs().T + bias.abs()
    assert_within(y, exact, product_tolerance(magnitude, exact, 64 + 64 + 4, torch.float32))


@pytest.mark.parametrize("name", KERNELS)
def test_dropout_is_lora_only_and_seeded(name):
    """Dropout must not touch the frozen path, must stop in eval, and must repeat with the seed."""
    q = lowbit.quantize(make_weight((48, 64)))
    x, _, lora_a, lora_b = operands(9, (48, 64), 4, torch.float32, torch.float32)
    with kernels(name), torch.no_grad():
        plain = lowbit.lora_linear(x, q, lora_a, lora_b, 1.0)
        assert torch.equal(lowbit.lora_linear(x, q, lora_a, lora_b, 1.0, dropout_p=0.5, training=False), plain)
        torch.manual_seed(3)
        first = lowbit.lora_linear(x, q, lora_a, lora_b, 1.0, dropout_p=0.5, training=True)
        torch.manual_seed(3)
        assert torch.equal(lowbit.lora_linear(x, q, lora_a, lora_b, 1.0, dropout_p=0.5, training=True), first)
        assert not torch.equal(first, plain)
        zero = torch.zeros_like(lora_b)
        assert torch.equal(
            lowbit.lora_linear(x, q, lora_a, zero, 1.0, dropout_p=0.5, training=True), lowbit.linear(x, q)
        )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rows", [1, 3, 4, 50])
def test_infinity_and_nan_stay_in_their_row(name, rows):
    """An overflow in one sample must show up there, and nowhere else."""
    q = lowbit.quantize(make_weight((33, 130)))
    x = torch.randn(rows, 130, generator=torch.Generator().manual_seed(0))
    with kernels(name):
        clean = lowbit.linear(x, q)
        x[0, 129] = float("nan")
        y = lowbit.linear(x, q)
    assert bool(y[0].isnan().all())
    assert torch.equal(y[1:], clean[1:])


def test_results_do_not_depend_on_the_number_of_threads():
    """A run on another machine with the same seed must give the same bits."""
    q = lowbit.quantize(make_weight((200, 384)))
    x = torch.randn(70, 384, generator=torch.Generator().manual_seed(0), requires_grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = lowbit.linear(x, q)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("rows", [2, 16])
def test_nothing_dense_is_saved_for_backward(rows):
    """QLoRA's memory promise: x once in its own dtype, and nothing of the weight's size, be it decoded or packed."""
    q = lowbit.quantize(make_weight((256, 512)))
    x, bias, lora_a, lora_b = operands(rows, (256, 512), 4, torch.bfloat16, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lowbit.lora_linear(x, q, lora_a, lora_b, 1.0, bias)
    unique = {t.data_ptr(): t for t in saved}.values()
    assert max(t.nbytes for t in unique) == max(x.nbytes, lora_a.nbytes) < q.packed.nbytes
    assert [t.dtype for t in unique if t.shape == x.shape] == [torch.bfloat16]


X = torch.ones(2, 64)
A, B = torch.ones(4, 64), torch.ones(32, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 63)}, ValueError, r"x: expected shape \(2, 64\), got \(2, 63\)"),
        ({"x": torch.ones(2, 64, dtype=torch.int64)}, TypeError, "x: expected float32.*int64"),
        ({"x": torch.ones(2, 64, dtype=torch.float64)}, TypeError, "x: expected float32.*float64"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least 1 dimension"),
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"x": X.to("meta")}, ValueError, "x: expected device cpu.*meta"),
        ({"bias": torch.ones(31)}, ValueError, r"bias: expected shape \(32,\), got \(31,\)"),
        ({"lora_a": torch.ones(4, 63)}, ValueError, r"lora_a: expected shape \(4, 64\), got \(4, 63\)"),
        ({"lora_a": torch.ones(0, 64)}, ValueError, "lora_a: expected a rank of at least 1"),
        ({"lora_b": torch.ones(32, 5)}, ValueError, r"lora_b: expected shape \(32, 4\), got \(32, 5\)"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
        ({"q": torch.ones(32)}, TypeError, r"q: expected a weight of shape .* got shape \(32,\)"),
        ({"q": torch.ones(32, 63)}, ValueError, "x: expected a last dimension of 63"),
        ({"q": [[1.0]]}, TypeError, "q: expected a weight of shape .* got list"),
        ({"q": torch.ones(32, 64), "lora_b": torch.ones(32, 5)}, ValueError, r"lora_b: expected shape \(32, 4\)"),
        ({"q": torch.ones(32, 64), "precision": "int8"}, ValueError, "precision: expected 'exact' for a dense weight"),
        ({"q": lowbit.quantize(torch.ones(64))}, ValueError, "q: expected a weight of 2 dimensions"),
    ],
)
def test_bad_arguments(change, error, message):
    """Each wrong argument is named with what was expected and what came."""
    arguments = {"x": X, "q": lowbit.quantize(torch.ones(32, 64)), "lora_a": A, "lora_b": B, "scaling": 1.0}
    with pytest.raises(error, match=message):
        lowbit.lora_linear(**(arguments | change))


def test_a_call_that_fitted_does_not_excuse_the_next():
    """Parameters change between calls of a layer: each call is checked."""
    q = lowbit.quantize(torch.ones(32, 64))
    lowbit.lora_linear(X, q, A, B, 1.0)
    lowbit.lora_linear(X, q, A, B, 1.0)
    with pytest.raises(ValueError, match="lora_b: expected shape"):
        lowbit.lora_linear(X, q, A, torch.ones(4, 32), 1.0)
    with pytest.raises(ValueError, match="x: expected shape"):
        lowbit.lora_linear(torch.ones(2, 32), q, A, B, 1.0)
    with pytest.raises(TypeError, match="x: expected float32"):
        lowbit.lora_linear(X.double(), q, A, B, 1.0)
    changed = torch.nn.Parameter(torch.ones(4, 64))
    lowbit.lora_linear(X, q, changed, B, 1.0)
    changed.data = torch.ones(4, 32)
    with pytest.raises(ValueError, match="lora_a: expected shape"):
        lowbit.lora_linear(X, q, changed, B, 1.0)


class WithoutGradient(torch.autograd.Function):
    """The identity, through which no gradient comes."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_an_output_without_a_gradient():
    """A loss that does not depend on a layer, by a function of the user's, would fail in the layer's backward."""
    x, bias, lora_a, lora_b = operands(3, (16, 64), 4, torch.float32, torch.float32)
    y = lowbit.lora_linear(x, lowbit.quantize(make_weight((16, 64), torch.float32)), lora_a, lora_b, 0.5, bias)
    (WithoutGradient.apply(y).sum() + 2 * lora_a.sum()).backward()
    assert torch.equal(lora_a.grad, torch.full_like(lora_a, 2.0)) and lora_b.grad is None and x.grad is None
