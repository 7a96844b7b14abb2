"""How LoRA's factors begin: PEFT's numbers for every method, and the weight that they leave to the base."""

import pytest
import torch
from cases import DTYPES, UNIT_ROUNDOFF, assert_within, make_weight, product_tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn

import lowbit
from lowbit.lowrank import DECOMPOSING_METHODS, RANDOM_METHODS, check_init, initial_factors

METHODS = (*RANDOM_METHODS, *DECOMPOSING_METHODS, "pissa_niter_2")
U = UNIT_ROUNDOFF[torch.float32]

sizes = st.sampled_from((1, 2, 3, 7, 16, 33))


def weight_with_gap(out_features=24, in_features=17, rank=4, seed=0) -> torch.Tensor:
    """A weight with ``rank`` singular values from 3 to 2 and the others from 1 to 1/2."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, in_features, generator=generator, dtype=torch.float64)).Q
        for size in (out_features, in_features)
    )
    s = torch.cat([torch.linspace(3, 2, rank), torch.linspace(1, 0.5, in_features - rank)]).double()
    return (u * s @ v.T).float()


def backward_error(matrix: torch.Tensor) -> float:
    """Norm of E where the computed SVD or QR of W is exact for W + E: a modest p(m, n) times u times W's norm.

    Source: LAPACK Users' Guide, section 4.9.1. p = m + n here; 8 u more for forming the factors, as in cases.py.
    """
    return (sum(matrix.shape) + 8) * U * torch.linalg.matrix_norm(matrix.double(), 2).item()


def peft_layer(weight, rank, scaling, init):
    """PEFT's layer, made right after the seed 1, whose base has its own copy of ``weight``."""
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["0"], init_lora_weights=init)
    torch.manual_seed(1)
    return get_peft_model(nn.Sequential(linear), config).base_model.model[0]


def peft_factors(layer):
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def round_nf4(weight):
    return lowbit.quantize(weight, format="nf4").dequantize(torch.float32)


@pytest.mark.parametrize("method", RANDOM_METHODS)
def test_a_seed_gives_the_random_factors_of_peft(method):
    """A user who moves a run from PEFT would start from another distribution."""
    weight = weight_with_gap()
    layer = peft_layer(weight, 4, 2.0, False)
    if method != "random":  # for which the layer is as it was made
        torch.manual_seed(1)
        if method == "orthogonal":
            layer.orthogonal_init("default")
        else:
            layer.reset_lora_parameters("default", True if method == "default" else method)
    torch.manual_seed(1)
    lora_a, lora_b, residual = initial_factors(weight, 4, 2.0, method)
    for ours, theirs in zip((lora_a, lora_b), peft_factors(layer), strict=True):
        if method == "orthogonal":  # products, whose sums depend on strides on some CPUs
            torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * U * theirs.abs().max().item())
        else:
            assert torch.equal(ours, theirs)
    assert residual is None and torch.equal(layer.get_base_layer().weight, weight)


@pytest.mark.parametrize("scaling", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("method", ["pissa", "pissa_niter_4", "olora"])
def test_decompositions_are_those_of_peft(method, scaling):
    """A user who moves a run from PEFT would train other directions of the weight."""
    weight = weight_with_gap()
    layer = peft_layer(weight, 4, scaling, False)
    torch.manual_seed(2)
    layer.olora_init("default") if method == "olora" else layer.pissa_init("default", method)
    torch.manual_seed(2)
    lora_a, lora_b, residual = initial_factors(weight, 4, scaling, method)
    theirs_a, theirs_b = peft_factors(layer)
    assert lora_a.shape == theirs_a.shape and lora_b.shape == theirs_b.shape
    # Wedin: an error E turns the singular spaces by E / gap, of 1 here, on either side: B A moves by E + 2 * 3 E. The
    # QR of columns whose least singular value is at least 1/2 turns by 2 E, and its R is as large as 3. Two programs.
    tolerance = torch.tensor(2 * 7 * backward_error(weight), dtype=torch.float64).expand(weight.shape)
    theirs = scaling * theirs_b.double() @ theirs_a.double()
    assert_within(scaling * lora_b.double() @ lora_a.double(), theirs, tolerance)
    assert_within(residual, layer.get_base_layer().weight.double(), tolerance)


@settings(max_examples=150, deadline=None)
@given(
    out_features=sizes,
    in_features=sizes,
    rank=st.integers(1, 8),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    method=st.sampled_from(("pissa", "pissa_niter_1", "olora")),
    scaling=st.sampled_from((0.25, 1, 2.0, 11.3)),
    magnitude=st.sampled_from((1e-6, 0.02, 1.0, 100.0)),
    transposed=st.booleans(),
)
def test_residual_and_factors_add_up(out_features, in_features, rank, dtype, method, scaling, magnitude, transposed):
    """The model would not begin as what was pretrained."""
    rank = min(rank, out_features, in_features)
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    weight = make_weight(shape, dtype, magnitude)
    weight = weight.T if transposed else weight
    before = weight.clone()
    lora_a, lora_b, residual = initial_factors(weight, rank, scaling, method)
    assert torch.equal(weight, before)
    assert lora_a.shape == (rank, in_features) and lora_b.shape == (out_features, rank)
    assert residual.shape == weight.shape and residual.dtype == dtype
    product, wide = scaling * lora_b.double() @ lora_a.double(), weight.double()
    exact = wide - product
    total = wide.abs() + scaling * lora_b.double().abs() @ lora_a.double().abs()
    if dtype == torch.float64:
        tolerance = (rank + 9) * 2.0**-53 * total
    else:
        tolerance = product_tolerance(total, exact, rank + 1, dtype)
    assert_within(residual, exact, tolerance)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (20, 33), (33, 20)])
@pytest.mark.parametrize("rank", [1, 5])
def test_pissa_takes_the_principal_part(shape, rank):
    """Training would start from minor directions, and converge as slowly as plain LoRA."""
    rank = min(rank, *shape)
    weight = make_weight(shape, magnitude=1.0)
    lora_a, lora_b, residual = initial_factors(weight, rank, 2.5, "pissa")
    exact = torch.linalg.svdvals(weight.double())
    # Weyl: each singular value of the computed residual is within the norm of the error of its exact one.
    left = torch.linalg.svdvals(residual.double())[: len(exact) - rank]
    assert_within(left, exact[rank:], torch.full_like(left, 2 * backward_error(weight)))
    # Evenly split: the part of singular value s has the norm sqrt(s / scaling) in both.
    for norms in (lora_a.double().norm(dim=1), lora_b.double().norm(dim=0)):
        assert_within(2.5 * norms**2, exact[:rank], torch.full_like(norms, 2 * backward_error(weight)))


def test_more_iterations_bring_fast_pissa_closer():
    """The number in the name would be lost, and every fast PiSSA a poor one."""
    weight = make_weight((64, 48), magnitude=1.0)

    def left(method):
        torch.manual_seed(0)
        return initial_factors(weight, 4, 1.0, method)[2].double().norm().item()

    best = left("pissa")
    errors = [left(f"pissa_niter_{n}") - best for n in (0, 2, 64)]
    assert errors[0] > errors[1] > abs(errors[2])
    # The power iteration has converged where (s5 / s4)^(2 * 64 + 1) is below the rounding.
    s = torch.linalg.svdvals(weight.double())
    converged = 7 * (s[4] / s[3]).item() ** 129 * s[0].item()
    assert abs(errors[2]) <= converged + 48**0.5 * 2 * backward_error(weight)


def test_olora_factors_come_from_qr():
    """B would not be orthonormal, which is what OLoRA's stable start rests on."""
    weight = weight_with_gap()
    lora_a, lora_b, _ = initial_factors(weight, 4, 2.0, "olora")
    error = backward_error(torch.eye(24, 17))
    gram = lora_b.double().T @ lora_b.double()
    assert_within(gram, torch.eye(4).double(), torch.full_like(gram, 2 * error))
    # The first columns of Q R are the first columns of W; R is upper triangular.
    columns = (lora_b.double() @ lora_a.double())[:, :4]
    assert_within(columns, weight[:, :4].double(), torch.full_like(columns, 2 * backward_error(weight)))
    assert torch.equal(lora_a[:, :4], lora_a[:, :4].triu())


@pytest.mark.parametrize("shape", [(6, 8), (33, 17), (1, 1), (3, 200)])
@pytest.mark.parametrize("rank", [2, 6, 16])
def test_orthogonal_factors_cancel(shape, rank):
    """The first step would start from a changed model."""
    torch.manual_seed(0)
    lora_a, lora_b, _ = initial_factors(torch.empty(shape), rank, 1.0, "orthogonal")
    product = lora_b.double() @ lora_a.double()
    # Rows of the computed basis are orthogonal up to E; factors are of norms below 1/10 of the draws'.
    norms = torch.linalg.matrix_norm(lora_b.double(), 2) * torch.linalg.matrix_norm(lora_a.double(), 2)
    assert product.abs().max() <= 2 * (backward_error(torch.eye(rank)) + rank * U) * norms
    assert lora_a.abs().min() > 0 and lora_b.abs().min() > 0


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("scaling", [1.0, 0.5, 3.0])
def test_loftq_alternates_as_in_peft(iterations, scaling):
    """Factors would make up for the error of another weight than the base stores, or for a multiple of it."""
    weight = weight_with_gap(rank=4)

    def quantize(dense):  # smooth, unlike a real one: rounding cannot switch codes, so that two programs agree
        return dense + 0.3 * torch.sin(2 * dense)

    lora_a, lora_b, residual = initial_factors(
        weight, 4, scaling, "loftq", quantize=quantize, loftq_iterations=iterations
    )
    # PEFT's own loop needs a GPU; this is it in fp64, with PEFT's decomposition. PEFT leaves out the scaling.
    dense, product = weight.double(), torch.zeros(weight.shape, dtype=torch.float64)
    tolerance = 0.0
    for _ in range(iterations):
        quantized = dense - product
        error = dense - quantize(quantized)
        found = _low_rank_decomposition(error, 4)
        gap = (found["S"][3] - found["S"][4]).item()
        # An error of the quantized matrix grows by quantize's slope, at most 1.6, and by the truncation, as above.
        grown = 1 + 2 * found["S"][0].item() / gap
        tolerance = grown * (1.6 * tolerance + backward_error(weight))
        product = found["L"] @ found["R"]
    got = scaling * lora_b.double() @ lora_a.double()
    assert_within(got, product, torch.full_like(got, tolerance))
    if iterations == 1:
        assert residual is None
    else:
        assert_within(residual, quantized, torch.full_like(got, tolerance))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("iterations", [1, 2, 4])
@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_loftq_makes_up_for_the_error_of_the_stored_weight(dtype, iterations, scaling):
    """A base that stores the residual would not be the one that the factors correct."""
    weight = make_weight((96, 128), dtype, seed=3)
    rank, seen = 8, []

    def quantize(dense):
        seen.append(dense)
        return round_nf4(dense)

    lora_a, lora_b, residual = initial_factors(
        weight, rank, scaling, "loftq", quantize=quantize, loftq_iterations=iterations
    )
    stored = weight if residual is None else residual
    assert len(seen) == iterations and all(dense.dtype == dtype for dense in seen)
    assert torch.equal(stored, seen[-1])
    error = weight.double() - round_nf4(stored).double()
    left = error - scaling * lora_b.double() @ lora_a.double()
    best = torch.linalg.svdvals(error)[rank:].norm().item()
    # Eckart and Young: no factors of this rank leave less of the error of what is stored.
    assert abs(left.norm().item() - best) <= rank**0.5 * 2 * backward_error(error)
    plain = weight.double() - round_nf4(weight).double()
    assert left.norm() < plain.norm()


def test_more_iterations_of_loftq_leave_less():
    """The user would pay for iterations that do nothing."""
    weight = make_weight((96, 128), seed=3)
    errors = []
    for iterations in (1, 5):
        lora_a, lora_b, residual = initial_factors(
            weight, 16, 2.0, "loftq", quantize=round_nf4, loftq_iterations=iterations
        )
        stored = round_nf4(weight if residual is None else residual)
        errors.append((weight - stored - 2 * lora_b @ lora_a).norm().item())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_plain_memory_of_their_own(method):
    """Saving would fail in safetensors, and each layer would keep its whole decomposition in memory."""
    weight = nn.Parameter(make_weight((12, 12), torch.bfloat16))
    lora_a, lora_b, residual = initial_factors(weight, 12, 1.0, method, quantize=round_nf4, loftq_iterations=2)
    for factor in (lora_a, lora_b):
        assert factor.dtype == torch.float32 and factor.is_contiguous() and not factor.requires_grad
        assert factor.untyped_storage().nbytes() == 4 * factor.numel()
    assert residual is None or (residual.dtype == torch.bfloat16 and not residual.requires_grad)


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_2", "olora", "loftq", "orthogonal"])
def test_autocast_does_not_reach_the_factors(method):
    """A model prepared inside autocast would start from products rounded to 16 bits."""
    weight = weight_with_gap()
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(initial_factors(weight, 4, 2.0, method, quantize=round_nf4, loftq_iterations=2))
    for plain, autocast in zip(*results, strict=True):
        assert plain is autocast or torch.equal(plain, autocast)


@pytest.mark.parametrize("method", RANDOM_METHODS)
def test_random_methods_read_no_values(method):
    """A model could no longer be made on the meta device before its weights are loaded."""
    lora_a, lora_b, residual = initial_factors(torch.empty(3, 5, device="meta"), 8, 1.0, method)
    assert lora_a.shape == (8, 5) and lora_b.shape == (3, 8) and residual is None
    assert lora_a.is_meta and lora_b.is_meta
    initial_factors(torch.full((3, 5), torch.nan), 8, 1.0, method)


@pytest.mark.parametrize("method", METHODS)
def test_check_init_knows_every_method(method):
    """A config with a method that works would be refused."""
    assert check_init(method) is None


@pytest.mark.parametrize(
    "method", ["", "PiSSA", "pissa_niter_", "pissa_niter_-1", "pissa_niter_4x", "eva", "pissa_niter_٣"]
)
def test_check_init_names_the_choices(method):
    """A typo would be found only after the model is loaded, or never."""
    with pytest.raises(
        ValueError, match="init_lora_weights: expected one of default, .*loftq, or pissa_niter_N .* got"
    ):
        check_init(method, "init_lora_weights")


@pytest.mark.parametrize("method", [True, None, 3, b"pissa"])
def test_check_init_wants_a_string(method):
    """PEFT's True and False would be taken for a method by chance."""
    with pytest.raises(TypeError, match="method: expected a string, one of default"):
        check_init(method)


@pytest.mark.parametrize("method", [*DECOMPOSING_METHODS, "pissa_niter_2"])
@pytest.mark.parametrize(
    ("weight", "rank", "message"),
    [
        (torch.ones(3, 5), 4, r"rank: expected at most 3 for method '\w+' and a weight of shape \(3, 5\), got 4"),
        (torch.tensor([[1.0, torch.nan]]), 1, "weight: expected finite numbers .* got NaN or inf"),
        (torch.tensor([[1.0], [torch.inf]]), 1, "weight: expected finite numbers .* got NaN or inf"),
        (torch.ones(3, 5, device="meta"), 1, "weight: expected values .* got a tensor on the meta device"),
    ],
)
def test_decompositions_refuse_what_they_cannot_decompose(method, weight, rank, message):
    """The user would get factors of another rank than asked for, NaN, or an error from inside LAPACK."""
    with pytest.raises(ValueError, match=message):
        initial_factors(weight, rank, 1.0, method, quantize=round_nf4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"weight": torch.ones(2, 2, dtype=torch.int64)},
            TypeError,
            "weight: expected a floating-point .* got torch.i",
        ),
        ({"weight": [[1.0]]}, TypeError, "weight: expected a floating-point tensor"),
        ({"weight": torch.ones(2, 2, 1)}, ValueError, r"weight: expected a shape \[out, in\] .* got \(2, 2, 1\)"),
        ({"weight": torch.ones(0, 2)}, ValueError, r"weight: expected a shape \[out, in\] .* got \(0, 2\)"),
        ({"rank": 3, "method": "orthogonal"}, ValueError, "rank: expected an even number .* got 3"),
        ({"method": "loft"}, ValueError, "method: expected one of"),
        ({"method": "loftq", "quantize": lambda w: w / 0}, ValueError, "weight: expected numbers whose decomposition"),
        (
            {"method": "pissa", "weight": torch.full((4, 4), 3e38)},
            ValueError,
            "weight: expected numbers whose decomposition fits torch.float32, .* the largest is 3e",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    """The user would search for a mistake in a stack trace of torch."""
    arguments = {"weight": torch.ones(4, 4), "rank": 2, "scaling": 1.0, "method": "default"} | arguments
    with pytest.raises(error, match=message):
        initial_factors(**arguments)
