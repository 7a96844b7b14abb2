"""quantize(codes="descent"): the same bytes on every kernel set, no row worse than the search's, clear errors."""

import functools

import pytest
import torch
from cases import FORMATS, KERNELS, assert_within, descent_case, gram, kernels, make_weight
from conftest_bitsandbytes import assert_bitsandbytes_decodes
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit
from lowbit import reference_descent
from lowbit.quantizers import Curvature, loss

FP32 = 2.0**-24


#: (rows, columns, candidate scales, format): no rows, lanes without a row, fewer scales than are tried at once, more.
BLOCKS = ((0, 32, 2, "nf4"), (1, 64, 1, "nf4"), (15, 32, 5, "fp4"), (17, 64, 6, "nf4"), (40, 32, 4, "nf4"))


@functools.cache
def by_the_reference(rows, columns, count, format):
    """``(arguments of gptq_block, of descend_block, results of the first, of the second)`` for one of BLOCKS."""
    weight, hessian, upper, candidates = descent_case(rows, columns, count, rows)
    spec = f"{format}:{columns}"
    rounded = (weight, upper, candidates, spec)
    found = reference_descent.gptq_block(*rounded)
    descended = (found[0], (weight - found[0]) @ hessian, hessian, candidates.roll(1, 1), 2, spec)
    return rounded, descended, found, reference_descent.descend_block(*descended)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_equal_the_reference(name, block):
    """One calibration must give one file, whatever machine quantized it."""
    rounded, descended, *expected = by_the_reference(*block)
    ops = torch.ops.lowbit if name != "reference" else torch.ops.lowbit_reference
    with kernels(name):
        ours = ops.gptq_block(*rounded), ops.descend_block(*descended)
    for each, theirs in zip(ours, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(each, theirs, strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_errors_of_gptq_say_what_the_block_loses(format):
    """The oracle itself: W - Q = E U and |E|^2 = tr((W - Q) H (W - Q)^T) in fp64, by which the scales are compared."""
    weight, hessian, upper, candidates = descent_case(24, 64, 7, 3)
    decoded, errors, choice = reference_descent.gptq_block(weight, upper, candidates, f"{format}:64")
    exact, magnitude = errors.double() @ upper.double(), errors.abs().double() @ upper.abs().double()
    # Each element is a sum of at most 64 products, rounded one by one.
    assert_within((weight - decoded), exact, 66 * FP32 * (magnitude + weight.abs()))

    def losses(q):
        error = (weight - q).double()
        return ((error @ hessian.double()) * error).sum(1)

    each = [
        losses(reference_descent.gptq_block(weight, upper, candidates[:, c, None], f"{format}:64")[0])
        for c in range(candidates.shape[1])
    ]
    least = torch.stack(each, 1).min(1)
    assert torch.equal(losses(decoded), torch.stack(each, 1).gather(1, choice[:, None].long())[:, 0])
    assert bool((losses(decoded) <= least.values * (1 + 1e-4)).all())


@pytest.mark.parametrize("format", FORMATS)
def test_no_single_code_improves_a_block_that_has_descended(format):
    """The oracle itself: after enough sweeps every code is the best one while the others stay, counted in fp64."""
    weight, hessian, upper, candidates = descent_case(6, 32, 1, 5)
    decoded, _, _ = reference_descent.gptq_block(weight, upper, candidates, f"{format}:32")
    gradient = (weight - decoded) @ hessian
    found, _ = reference_descent.descend_block(decoded, gradient, hessian, candidates, 20, f"{format}:32")

    def losses(q):  # of q [..., rows, columns]
        error = weight.double() - q.double()
        return ((error @ hessian.double()) * error).sum(-1)

    assert bool((losses(found) <= losses(decoded)).all())
    assert bool((losses(found) < 0.99 * losses(decoded))[weight.abs().amax(1) > 0].any())
    for value in lowbit.format.codebook(format):
        for column in range(32):
            other = found.clone()
            other[:, column] = value * candidates[:, 0]
            assert bool((losses(other) >= losses(found) * (1 - 1e-5)).all())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_loss_falls_to_half(format, double_quant):
    """The point of it: half the weighted search's error of the layer's output, or less, in the same bytes."""
    weight, hessian = torch.randn(48, 192, generator=torch.Generator().manual_seed(0)) * 0.02, gram(192)
    options = {"format": format, "double_quant": double_quant}
    searched = lowbit.quantize(weight, scale="search", importance=hessian.diagonal(), **options)
    found = lowbit.quantize(weight, codes="descent", hessian=hessian, **options)
    assert found.nbytes == searched.nbytes
    assert loss(weight, found, hessian) < 0.5 * loss(weight, searched, hessian)
    once = lowbit.quantize(weight, codes="descent", hessian=hessian, sweeps=1, **options)
    assert loss(weight, found, hessian) < loss(weight, once, hessian)


@settings(max_examples=25, deadline=None)
@given(
    block_size=st.sampled_from((32, 64, 128)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    double_quant=st.booleans(),
    weights=st.sampled_from(("normal", "zero", "zero blocks", "equal", "outlier")),
    inputs=st.sampled_from(("many", "one token", "dead channels", "massive token", "none")),
    magnitude=st.sampled_from((1e-30, 0.02, 1e4)),
    data_magnitude=st.sampled_from((1e-20, 1.0, 1e10)),
)
def test_no_row_is_worse_than_by_the_search(
    block_size, dtype, double_quant, weights, inputs, magnitude, data_magnitude
):
    """Calibration data is what it is: few tokens or odd ones must not make NaN, nor a layer worse than uncalibrated."""
    k = 128
    weight = make_weight((6, k), dtype, magnitude)
    if weights == "zero":
        weight = weight * 0
    if weights == "zero blocks":
        weight[:, :block_size] = 0
    if weights == "equal":
        weight = torch.full_like(weight, magnitude)
    if weights == "outlier":
        weight[2, 7] *= 1000
    hessian = {
        "many": lambda: gram(k),
        "one token": lambda: gram(k, tokens=1),
        "dead channels": lambda: gram(k, dead=range(0, k, 3)),
        "massive token": lambda: gram(k, massive=1e3),
        "none": lambda: torch.zeros(k, k),
    }[inputs]() * data_magnitude
    options = {"block_size": block_size, "double_quant": double_quant}
    found = lowbit.quantize(weight, codes="descent", hessian=hessian, **options)
    searched = lowbit.quantize(weight, scale="search", importance=hessian.diagonal(), **options)
    assert bool(torch.isfinite(found.dequantize(torch.float32)).all())

    def losses(q):
        error = (weight.float() - q.dequantize(torch.float32)).double()
        return ((error @ hessian.double()) * error).sum(1)

    # The two are compared in fp32, and their errors are sums of numbers of the weights' size.
    size = weight.double().abs() @ hessian.double().abs() * weight.double().abs()
    assert bool((losses(found) <= losses(searched) * (1 + 1e-4) + 1e-9 * size.sum(1)).all())


def test_rows_that_cut_blocks_are_searched():
    """Blocks that span two rows have no Hessian of their own; such a layer must still be calibrated."""
    weight, hessian = make_weight((7, 100)), gram(100)
    found = lowbit.quantize(weight, codes="descent", hessian=hessian)
    searched = lowbit.quantize(weight, scale="search", importance=hessian.diagonal())
    assert all(torch.equal(a, b) for a, b in zip(found.parts(), searched.parts(), strict=True))


def test_a_curvature_is_as_good_as_its_hessian():
    """q, k and v share one: they have to come out as if each had got the matrix."""
    weight, hessian = make_weight((20, 128)), gram(128)
    curvature = Curvature(hessian, damping=0.3)
    for _ in range(2):
        shared = lowbit.quantize(weight, codes="descent", hessian=curvature)
        alone = lowbit.quantize(weight, codes="descent", hessian=hessian, damping=0.3)
        assert all(torch.equal(a, b) for a, b in zip(shared.parts(), alone.parts(), strict=True))


def test_experts_have_a_hessian_each():
    """Experts see their own tokens: each must be rounded by its own matrix, as if it stood alone."""
    weight = make_weight((3, 8, 64))
    hessians = [gram(64, seed=seed) for seed in range(3)]
    for given_as in (hessians, torch.stack(hessians), [Curvature(hessian) for hessian in hessians]):
        stack = lowbit.quantize(weight, codes="descent", hessian=given_as, double_quant=False)
        for e in range(3):
            alone = lowbit.quantize(weight[e], codes="descent", hessian=hessians[e], double_quant=False)
            assert torch.equal(stack[e].dequantize(), alone.dequantize())
    doubly = lowbit.quantize(weight, codes="descent", hessian=hessians)
    searched = lowbit.quantize(weight, scale="search")
    assert all(loss(weight[e], doubly[e], hessians[e]) < loss(weight[e], searched[e], hessians[e]) for e in range(3))


def test_bitsandbytes_decodes_the_same():
    """A calibrated checkpoint has to load elsewhere."""
    assert_bitsandbytes_decodes(lowbit.quantize(make_weight((32, 128)), codes="descent", hessian=gram(128)))


def test_blocks_do_not_depend_on_the_number_of_threads():
    """The same calibration must give the same codes on every machine size."""
    weight, hessian, upper, candidates = descent_case(300, 64, 6, 1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            decoded, errors, choice = torch.ops.lowbit.gptq_block(weight, upper, candidates, "nf4:64")
            gradient = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
            descended = torch.ops.lowbit.descend_block(decoded, gradient, hessian, candidates, 2, "nf4:64")
            results.append((decoded, errors, choice, *descended))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_factor_is_that_of_the_inverse():
    """A wrong factor or order would quietly cost most of what GPTQ gains."""
    hessian = gram(192)
    curvature = Curvature(hessian)
    order, upper = curvature.factor(64)
    damped = hessian.double() / hessian.diagonal().double().mean() + 0.1 * torch.eye(192, dtype=torch.float64)
    product = upper.double().T @ upper.double() @ damped[order][:, order]
    assert torch.equal(upper, upper.triu())
    # Off by the roundings of a sum of 192, times how badly conditioned the matrix is.
    condition = float(torch.linalg.cond(damped))
    assert float((product - torch.eye(192, dtype=torch.float64)).abs().max()) < 192 * FP32 * condition
    diagonal = damped.diagonal()[order].view(-1, 64)
    assert bool((diagonal[:, 1:] <= diagonal[:, :-1] + 1e-6).all())
    assert bool((diagonal.mean(1)[1:] <= diagonal.mean(1)[:-1]).all())


def test_loss_is_the_change_of_the_outputs():
    """What is reported per layer has to be the squared error of its output over the calibration tokens."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(2))
    weight = make_weight((9, 64))
    q = lowbit.quantize(weight)
    expected = float((x.double() @ (weight - q.dequantize()).double().T).square().sum())
    hessian = x.T @ x
    for given_as in (hessian, Curvature(hessian)):
        assert loss(weight, q, given_as) == pytest.approx(expected, rel=1e-5)
    assert loss(weight, weight, hessian) == 0


NAN = torch.eye(64).index_put((torch.tensor(3), torch.tensor(3)), torch.tensor(float("nan")))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"codes": "best"}, ValueError, "codes: expected one of nearest, descent, got 'best'"),
        ({"codes": "nearest"}, ValueError, "hessian: expected codes='descent' with it, got codes='nearest'"),
        ({"hessian": None}, ValueError, "hessian: expected the layer's Gram matrix with codes='descent', got None"),
        ({"hessian": torch.eye(63)}, ValueError, r"hessian: expected shape \(64, 64\).*got \(63, 63\)"),
        ({"hessian": torch.ones(64)}, ValueError, r"hessian: expected a square matrix.*\(64,\)"),
        ({"hessian": torch.eye(64).double()}, TypeError, "hessian: expected torch.float32, got torch.float64"),
        ({"hessian": 3}, TypeError, "hessian: expected a torch.Tensor or a Curvature, got int"),
        ({"hessian": NAN}, ValueError, "hessian: expected finite values, got 1 NaN or inf"),
        ({"hessian": -torch.eye(64)}, ValueError, "hessian: expected a diagonal of at least 0, got -1.0 in column 0"),
        ({"hessian": torch.ones(64, 64).triu()}, ValueError, "hessian: expected a symmetric matrix"),
        ({"hessian": torch.eye(64, device="meta")}, ValueError, "hessian: expected a matrix with data"),
        ({"hessian": [torch.eye(64)] * 2}, ValueError, "hessian: expected as many as the weight"),
        ({"damping": 0}, ValueError, "damping: expected a positive number, got 0"),
        ({"sweeps": 0}, ValueError, "sweeps: expected at least 1, got 0"),
        ({"format": "int8"}, ValueError, "codes: expected 'nearest' for format 'int8', got 'descent'"),
        (
            {"importance": torch.ones(64), "scale": "search"},
            ValueError,
            "importance: expected None with codes='descent'",
        ),
    ],
)
def test_bad_arguments(options, error, message):
    """Calibration gone wrong has to be heard of, not quantized with."""
    with pytest.raises(error, match=message):
        lowbit.quantize(make_weight((8, 64)), **{"codes": "descent", "hessian": torch.eye(64), **options})


def test_a_matrix_that_is_no_gram_matrix_is_refused():
    """An indefinite matrix would make GPTQ run away."""
    matrix = torch.eye(32).kron(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="hessian: expected a positive semidefinite matrix"):
        lowbit.quantize(make_weight((8, 64)), codes="descent", hessian=matrix)


def test_bad_weights():
    """NaN in a weight, or a weight without columns, must be refused by name."""
    weight = make_weight((8, 64))
    weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="weight: expected finite values, got 1 NaN or inf"):
        lowbit.quantize(weight, codes="descent", hessian=torch.eye(64))
    with pytest.raises(ValueError, match="weight: expected at least 2 dimensions"):
        lowbit.quantize(make_weight((64,)), codes="descent", hessian=torch.eye(64))


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)])
def test_empty_weights(shape):
    """Models have empty layers; they stay empty."""
    q = lowbit.quantize(torch.zeros(shape), codes="descent", hessian=torch.eye(shape[1]))
    assert q.shape == shape


OPERANDS = {"block": torch.ones(4, 64), "matrix": torch.eye(64), "candidates": torch.ones(4, 3), "spec": "nf4:64"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block": torch.ones(4, 32)}, "(weight|decoded): expected shape"),
        ({"block": torch.ones(64)}, "expected 2 dimensions"),
        ({"block": torch.ones(4, 64).double()}, "(weight|decoded): expected dtype float32, got float64"),
        ({"matrix": torch.eye(32)}, "(factor|hessian): expected shape"),
        ({"candidates": torch.ones(3, 3)}, "candidates: expected shape"),
        ({"candidates": torch.ones(4, 0)}, "candidates: expected at least 1"),
        ({"spec": "int8"}, "spec: expected nf4 or fp4"),
    ],
)
def test_a_wrong_call_of_an_op_is_refused(wrong, message):
    """A kernel that trusted these sizes would leave its buffers."""
    if lowbit.backends.native.missing_reason() is not None:
        pytest.skip("needs the extension")
    block, matrix, candidates, spec = {**OPERANDS, **wrong}.values()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowbit.gptq_block(block, matrix, candidates, spec)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowbit.descend_block(block, block, matrix, candidates, 2, spec)


def test_a_wrong_descent_is_refused():
    """What only this op takes is checked too."""
    if lowbit.backends.native.missing_reason() is not None:
        pytest.skip("needs the extension")
    block, matrix, candidates, spec = OPERANDS.values()
    with pytest.raises(RuntimeError, match="gradient: expected shape"):
        torch.ops.lowbit.descend_block(block, block[:, 1:], matrix, candidates, 2, spec)
    with pytest.raises(RuntimeError, match="sweeps: expected at least 1, got 0"):
        torch.ops.lowbit.descend_block(block, block, matrix, candidates, 0, spec)
