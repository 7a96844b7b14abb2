"""Weighted combination of adapters: the numbers of PEFT's add_weighted_adapter, and what each method promises."""

import math

import pytest
import torch
from cases import UNIT_ROUNDOFF, assert_within
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from lowbit.lowrank import METHODS, combine

U = UNIT_ROUNDOFF[torch.float32]
FACTOR_METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
PRODUCT_METHODS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
#: Of three adapters: positive, negative, all negative, and one left out.
WEIGHTS = ((0.7, 0.3, 1.5), (1.0, -0.5, 0.25), (-1.0, -2.0, -0.3), (0.0, 1.0, 2))
OUT, IN = 11, 8


def make_factors(ranks, out_features=OUT, in_features=IN, scalings=(2.0, 0.5, 3.0), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rank, in_features, generator=generator),
            torch.randn(out_features, rank, generator=generator),
            scalings[index % len(scalings)],
        )
        for index, rank in enumerate(ranks)
    ]


def product(factors):
    """Scaling * B A in fp64."""
    lora_a, lora_b, scaling = (*factors, 1.0)[:3]
    return scaling * lora_b.double() @ lora_a.double()


def weighted_sum(factors, weights):
    return sum(weight * product(each) for weight, each in zip(weights, factors, strict=True))


def magnitude(factors, weights):
    """The same sum of absolute values, which its rounding errors are relative to."""
    return sum(abs(w * s) * b.double().abs() @ a.double().abs() for w, (a, b, s) in zip(weights, factors, strict=True))


@pytest.fixture
def peft_combine(monkeypatch):
    """PEFT's (A, B) for the arguments of ``combine``; its random numbers begin with the seed 0."""

    def combined(factors, weights, method, rank=None, density=None, majority_sign="total"):
        model = None
        for index, (a, b, scaling) in enumerate(factors):
            config = LoraConfig(r=len(a), lora_alpha=scaling * len(a), target_modules=["0"])
            if model is None:
                base = nn.Sequential(nn.Linear(a.shape[1], len(b)))
                model = get_peft_model(base, config, adapter_name="0")
            else:
                model.add_adapter(str(index), config)
            layer = model.base_model.model[0]
            layer.lora_A[str(index)].weight.data, layer.lora_B[str(index)].weight.data = a.clone(), b.clone()
        names = [str(index) for index in range(len(factors))]
        # Called after the new adapter is made, whose first factors are random too.
        monkeypatch.setattr("peft.tuners.lora.model._freeze_adapter", lambda *_: torch.manual_seed(0))
        model.add_weighted_adapter(
            names, list(weights), "new", method, svd_rank=rank, density=density, majority_sign_method=majority_sign
        )
        assert layer.scaling["new"] == 1
        return layer.lora_A["new"].weight.data, layer.lora_B["new"].weight.data

    return combined


def options_of(method, density, majority_sign):
    return {"density": density, "majority_sign": majority_sign} if method not in ("linear", "cat", "svd") else {}


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("method", [*FACTOR_METHODS, "cat"])
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_factors_are_those_of_peft(method, weights, density, majority_sign, peft_combine):
    """The same recipe of a merge would give another model than in PEFT."""
    factors = make_factors((3, 3, 3) if method != "cat" else (3, 1, 4))
    options = options_of(method, density, majority_sign)
    theirs = peft_combine(factors, weights, method, **options)
    torch.manual_seed(0)
    ours = combine(factors, weights, method, **options)
    # Each of up to three terms is rounded by its weight, its root and dare's division, each sum twice, the mean once.
    if method == "cat":
        largest = [torch.cat([abs(w * s) * a.abs() for w, (a, _, s) in zip(weights, factors, strict=True)]), theirs[1]]
    else:
        roots = [math.sqrt(abs(w * s)) for w, (_, _, s) in zip(weights, factors, strict=True)]
        divisor = density if method.startswith("dare") else 1.0
        largest = [sum(r * each[i].abs() / divisor for r, each in zip(roots, factors, strict=True)) for i in (0, 1)]
    for our, their, size in zip(ours, theirs, largest, strict=True):
        assert our.shape == their.shape and our.dtype == torch.float32
        assert torch.equal(our == 0, their == 0)  # the same elements are pruned, or lose the vote
        assert_within(our, their.double(), 2 * 6 * U * size.double().abs())


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("rank", [None, 1, 2, IN])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("method", PRODUCT_METHODS)
def test_products_are_those_of_peft(method, weights, rank, majority_sign, peft_combine):
    """The same recipe of a merge would give another model than in PEFT."""
    factors = make_factors((3, 1, 2))
    options = options_of(method, 0.6, majority_sign)
    theirs = peft_combine(factors, weights, method, rank, **options)
    torch.manual_seed(0)
    ours = combine(factors, weights, method, rank=rank, **options)
    assert [our.shape for our in ours] == [their.shape for their in theirs]

    # The products round to 9 u of their terms' magnitudes (three adapters of rank 3, dare's division), and an SVD of W
    # is exact for W + E with E of (m + n) u W (LAPACK Users' Guide, 4.9.1). Wedin: an error E turns the singular spaces
    # by E / gap, so that the truncated W moves by E + 2 s1 E / gap. Two programs.
    torch.manual_seed(0)
    full = product(combine(factors, weights, method, rank=IN, **options))
    s = torch.linalg.svdvals(full)
    kept = len(ours[0])
    gap = (s[kept - 1] - s[kept]).item() if kept < len(s) else math.inf
    rounding = (OUT + IN) * U * s[0].item() + 9 * U / 0.6 * magnitude(factors, weights).norm().item()
    assert gap > 100 * rounding or s[kept] < rounding, "choose other factors: their truncation is not unique"
    turned = 2 * s[0].item() / gap if gap > 100 * rounding else 0.0
    tolerance = torch.full_like(full, 2 * (1 + turned) * rounding)
    assert_within(product(ours), product(theirs), tolerance)
    # As in PEFT, A's rows are orthonormal and B takes the singular values.
    norms = ours[0].double().norm(dim=1)
    assert_within(norms, torch.ones_like(norms), torch.full_like(norms, (OUT + IN) * U))


def test_dare_is_random_and_keeps_the_mean():
    """Without the division by the density, the merged adapter would be too weak."""
    factors = [(torch.ones(40, 100), torch.ones(60, 40), 1.0)]
    lora_a, lora_b = combine(factors, [1.0], "dare_linear", density=0.25)
    for merged in (lora_a, lora_b):
        assert set(merged.unique().tolist()) == {0.0, 4.0}
        # Six standard deviations of the binomial distribution.
        assert abs((merged != 0).double().mean() - 0.25) < 6 * math.sqrt(0.25 * 0.75 / merged.numel())


def test_a_generator_decides_dare():
    """A merge could not be repeated, or would change the random numbers of the training around it."""
    factors, before = make_factors((3, 3)), torch.get_rng_state()
    options = {"method": "dare_ties", "density": 0.5}
    first, second, other = (
        combine(factors, [1, 2.0], generator=torch.Generator().manual_seed(seed), **options) for seed in (4, 4, 5)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), before)


sizes = st.sampled_from((1, 2, 5, 16, 33))
# Weights below 1e-3 would leave fp32's normal numbers, which the tolerances are for.
signed = st.floats(1e-3, 3) | st.floats(-3, -1e-3) | st.just(0.0)
adapters = st.lists(st.tuples(st.integers(1, 6), signed), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(
    adapters=adapters,
    out_features=sizes,
    in_features=sizes,
    transposed=st.booleans(),
    method=st.sampled_from(("cat", "svd")),
    above=st.booleans(),
)
def test_cat_and_svd_are_the_exact_sum(adapters, out_features, in_features, transposed, method, above):
    """The merged adapter would not do what its parts did, for layers of some shape."""
    ranks, weights = (list(column) for column in zip(*adapters, strict=True))
    factors = make_factors(ranks, out_features, in_features)
    if transposed:
        factors = [(a.T.contiguous().T, b.T.contiguous().T, scaling) for a, b, scaling in factors]
    rank = sum(ranks) + 1 if method == "svd" and above else sum(ranks)
    lora_a, lora_b = combine(factors, weights, method, rank=rank if method == "svd" else None)
    assert lora_a.shape == (rank, in_features) and lora_b.shape == (out_features, rank)
    size = magnitude(factors, weights)
    tolerance = 2 * U * size  # weight * scaling, and its product with A
    if method == "svd":  # two QR and an SVD, each with an error of (m + n) u, relative to the norms of both sides
        scaled = torch.cat([w * s * a.double() for w, (a, _, s) in zip(weights, factors, strict=True)])
        sides = scaled.norm() * torch.cat([b.double() for _, b, _ in factors], 1).norm()
        tolerance = tolerance + 3 * (out_features + in_features + rank) * U * sides
    assert_within(product((lora_a, lora_b)), weighted_sum(factors, weights), tolerance)


@pytest.mark.parametrize("method", PRODUCT_METHODS)
def test_rank_above_the_layer_is_filled_with_zeros(method):
    """An adapter of rank 8 on a head of two classes would get factors that do not fit each other, as in PEFT."""
    factors = make_factors((8, 8), out_features=2)
    lora_a, lora_b = combine(factors, [1.0, 0.5], method, **options_of(method, 1.0, "total"))
    assert lora_a.shape == (8, IN) and lora_b.shape == (2, 8)
    assert not lora_a[2:].any() and not lora_b[:, 2:].any()
    if method == "svd":
        exact = weighted_sum(factors, [1.0, 0.5])
        tolerance = torch.full_like(exact, 3 * 18 * U * magnitude(factors, [1.0, 0.5]).norm())
        assert_within(product((lora_a, lora_b)), exact, tolerance)


def test_svd_of_a_large_layer_is_cheap():
    """The merge of a large model would take hours, or 80 GB for this layer, where its factors take 5 MB."""
    factors = make_factors((2, 2), out_features=200_000, in_features=100_000)
    lora_a, lora_b = combine(factors, [1.0, -1.0], "svd")
    assert lora_a.shape == (2, 100_000) and lora_b.shape == (200_000, 2)


def test_one_adapter_is_pruned_as_several_are(monkeypatch):
    """A layer that only one of the merged adapters has would differ from PEFT, which prunes it there too."""
    factors = make_factors((2,), IN, IN)[0]
    base = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["0", "1"]), adapter_name="both")
    model.add_adapter("first", LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    layer = base[1]
    layer.lora_A["both"].weight.data, layer.lora_B["both"].weight.data = factors[0].clone(), factors[1].clone()
    model.add_weighted_adapter(["first", "both"], [1.0, 0.5], "new", "ties", density=0.5)
    ours = combine([factors], [0.5], "ties", density=0.5)
    for our, name in zip(ours, ("lora_A", "lora_B"), strict=True):
        their = getattr(layer, name)["new"].weight.data.double()
        assert int((our == 0).sum()) == our.numel() // 2
        assert_within(our, their, 4 * U * their.abs())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_combined_in_fp32(method, dtype):
    """Adapters saved in 16 bits would be summed, or decomposed, in 16 bits."""
    factors = [(a.to(dtype), b.to(dtype), s) for a, b, s in make_factors((2, 2))]
    before = [(a.clone(), b.clone()) for a, b, _ in factors]
    wide = [(a.float(), b.float(), s) for a, b, s in factors]
    options = options_of(method, 0.5, "total")
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = combine(factors, [1.0, 2.0], method, **options)
    torch.manual_seed(0)
    for our, expected in zip(ours, combine(wide, [1.0, 2.0], method, **options), strict=True):
        assert our.dtype == torch.float32 and torch.equal(our, expected)
    assert all(
        torch.equal(old, new)
        for was, now in zip(before, factors, strict=True)
        for old, new in zip(was, now[:2], strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_plain_memory_of_their_own(method):
    """Saving would fail in safetensors, or a change of the merged adapter would reach those it came from."""
    parameters = [(nn.Parameter(a), nn.Parameter(b), s) for a, b, s in make_factors((2,), scalings=(1.0,))]
    for factor in combine(parameters, [1.0], method, **options_of(method, 1.0, "total")):
        assert factor.is_contiguous() and not factor.requires_grad
        assert factor.untyped_storage().nbytes() == 4 * factor.numel()
        given = {each.untyped_storage().data_ptr() for each in parameters[0][:2]}
        assert factor.untyped_storage().data_ptr() not in given


@pytest.mark.parametrize("method", FACTOR_METHODS)
def test_ranks_that_differ_are_named(method):
    """The user would get torch's error about sizes, and not learn which methods can do it."""
    with pytest.raises(ValueError, match=rf"equal ranks for method '{method}', got \[2, 3\]; use 'cat' or 'svd'"):
        combine(make_factors((2, 3)), [1, 1], method, density=0.5)


A, B = torch.ones(2, IN), torch.ones(OUT, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "mean"}, ValueError, "method: expected one of linear, .*, got 'mean'"),
        ({"method": ["svd"]}, ValueError, r"method: expected one of linear, .*, got \['svd'\]"),
        ({"weights": [1.0]}, ValueError, "weights: expected 2, one for each adapter, got 1"),
        ({"weights": [1.0, math.nan]}, ValueError, "weights: expected finite numbers, got nan"),
        ({"weights": [1.0, "2"]}, ValueError, "weights: expected finite numbers, got '2'"),
        ({"method": "ties", "density": 0.0}, ValueError, r"density: expected a number in \(0, 1\] .*, got 0.0"),
        ({"method": "ties", "density": 1.1}, ValueError, r"density: expected a number in \(0, 1\] .*, got 1.1"),
        ({"method": "ties", "density": True}, ValueError, "density: expected a number .*, got True"),
        ({"majority_sign": "most"}, ValueError, "majority_sign: expected one of total, frequency, got 'most'"),
        ({"method": "svd", "rank": 0}, ValueError, "rank: expected an int of at least 1 or None, got 0"),
        ({"method": "svd", "rank": 2.0}, ValueError, "rank: expected an int of at least 1 or None, got 2.0"),
        ({"factors": []}, ValueError, "factors: expected .* at least one adapter, got none"),
        ({"factors": [(A, B / 0, 1.0)]}, ValueError, "factors: expected finite numbers, got NaN or inf"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    """The user would search for a mistake in a stack trace of torch."""
    with pytest.raises(error, match=message):
        combine(**({"factors": [(A, B, 1.0), (A, B, 2.0)], "weights": [1.0, 2.0], "method": "linear"} | arguments))


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"linear", "cat", "svd"}))
def test_pruning_needs_a_density(method):
    """PEFT's error comes from a comparison with None."""
    with pytest.raises(ValueError, match=rf"density: expected a number in \(0, 1\] for method '{method}', got None"):
        combine(make_factors((2, 2)), [1, 1], method)
