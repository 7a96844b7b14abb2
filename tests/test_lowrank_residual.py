"""Factors that make up for a weight's error under a Hessian: least at their rank, whatever the Hessian is like."""

import pytest
import torch
from cases import UNIT_ROUNDOFF
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.lowrank import residual, residual_factors
from lowbit.quantizers import Curvature

U = UNIT_ROUNDOFF[torch.float32]


def error_and_hessian(out_features=24, in_features=40, tokens=200, dead=0, damping=0.1, seed=0):
    """An error, and the damped Gram matrix of correlated inputs, of which some channels are ``dead``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_features, generator=generator) @ torch.randn(
        in_features, in_features, generator=generator
    )
    x[:, :dead] = 0
    error = torch.randn(out_features, in_features, generator=generator)
    return error, Curvature(x.T @ x, damping).damped


def loss(error, hessian, product=None) -> float:
    """tr((E - P) H (E - P)^T) in fp64."""
    rest = error.double() - (0 if product is None else product.double())
    return float(((rest @ hessian.double()) * rest).sum())


def least(error, hessian, rank) -> float:
    """The least loss of any product of that rank, fp64: what it leaves of the singular values of E L (Eckart)."""
    values = torch.linalg.svdvals(error.double() @ torch.linalg.cholesky(hessian.double()))
    return float(values[rank:].square().sum())


def slack(error, hessian) -> float:
    """What rounding in fp32 may add to the loss.

    A backward stable factorisation is exact for a matrix that differs by a modest p(m, n) u times its norm (LAPACK
    Users' Guide, section 4.9.1), here of E L; p is m + n, as in test_lowrank_initial.py, for each of the three steps,
    and the solve with L multiplies the error of its right side by the condition of L.
    """
    root = torch.linalg.cholesky(hessian.double())
    share = 3 * sum(error.shape) * U * float(torch.linalg.cond(root))
    return share * loss(error, hessian)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from((1, 3, 16, 33)),
    st.sampled_from((1, 2, 17, 40)),
    st.integers(1, 12),
    st.sampled_from((1, 5, 200)),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_no_product_of_that_rank_leaves_less(out_features, in_features, rank, tokens, dead, seed):
    """The adapters would begin with less than they can hold; fewer tokens than inputs and dead channels included."""
    error, hessian = error_and_hessian(out_features, in_features, tokens, min(dead, in_features - 1), seed=seed)
    lora_a, lora_b = residual_factors(error, hessian, rank)
    assert lora_a.shape == (rank, in_features) and lora_b.shape == (out_features, rank)
    assert lora_a.isfinite().all() and lora_b.isfinite().all()
    found = loss(error, hessian, lora_b.double() @ lora_a.double())
    assert found <= least(error, hessian, rank) + slack(error, hessian)


def test_a_large_matrix_is_searched_almost_as_well(monkeypatch):
    """Where an exact decomposition would take minutes, next to nothing may be lost by not computing it."""
    error, hessian = error_and_hessian(150, 300, tokens=900)
    monkeypatch.setattr(torch.linalg, "svd", _of_small_matrices_only(torch.linalg.svd, 150))
    state = torch.random.get_rng_state()
    first = residual_factors(error, hessian, 8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(first, residual_factors(error, hessian, 8), strict=True))
    best, whole = least(error, hessian, 8), loss(error, hessian)
    found = loss(error, hessian, first[1].double() @ first[0].double())
    # At most 1% of what the best product takes away stays, on the flattest spectrum there is: docstring of _STEPS.
    assert best - slack(error, hessian) <= found <= best + 0.01 * (whole - best)


def _of_small_matrices_only(svd, size):
    def checked(matrix, **options):
        assert min(matrix.shape) < size, "the whole matrix was decomposed"
        return svd(matrix, **options)

    return checked


def test_a_large_matrix_of_low_rank_is_found_whole():
    """Blocks of directions that come to nothing must not count twice, or give NaN."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(200, 3, generator=generator) @ torch.randn(3, 180, generator=generator)
    u, s, vh = residual._largest(matrix, 8)
    assert residual._STEPS * (8 + residual._SPARE) < 180
    torch.testing.assert_close((u * s) @ vh, matrix, rtol=0, atol=380 * U * float(torch.linalg.matrix_norm(matrix, 2)))


def test_under_the_hessian_it_is_better_than_the_plain_decomposition():
    """It would be LoftQ's, which knows nothing of the data."""
    error, hessian = error_and_hessian()
    u, s, vh = torch.linalg.svd(error, full_matrices=False)
    plain = (u[:, :8] * s[:8]) @ vh[:8]
    lora_a, lora_b = residual_factors(error, hessian, 8)
    assert loss(error, hessian, lora_b @ lora_a) < 0.8 * loss(error, hessian, plain)
    assert loss(error, torch.eye(40), plain) < loss(error, torch.eye(40), lora_b @ lora_a)


def test_without_preferences_it_is_the_plain_decomposition():
    """All inputs alike: Eckart and Young's product, split as LoftQ splits it."""
    error, _ = error_and_hessian()
    u, s, vh = torch.linalg.svd(error, full_matrices=False)
    lora_a, lora_b = residual_factors(error, 3.0 * torch.eye(40), 8, scaling=2.0)
    torch.testing.assert_close(2.0 * lora_b @ lora_a, (u[:, :8] * s[:8]) @ vh[:8], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lora_a.norm(dim=1), (s[:8] / 2.0).sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(lora_b.norm(dim=0), lora_a.norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_a_rank_beyond_the_sizes_holds_the_whole_error(shape):
    """The rest of the factors has to be able to learn: A is random there, and B zero, as without any start."""
    error, hessian = error_and_hessian(*shape)
    lora_a, lora_b = residual_factors(error, hessian, 16)
    assert loss(error, hessian, lora_b @ lora_a) <= slack(error, hessian)
    assert lora_b[:, 6:].eq(0).all() and lora_b[:, :6].norm(dim=0).gt(0).all()
    assert lora_a.norm(dim=1).gt(0).all()


def test_no_error_begins_as_without_a_start():
    """A block of zeros in both factors would never get a gradient."""
    _, hessian = error_and_hessian()
    lora_a, lora_b = residual_factors(torch.zeros(24, 40), hessian, 8)
    assert lora_b.eq(0).all() and lora_a.norm(dim=1).gt(0).all()
    assert lora_a.abs().max() <= 40**-0.5


def test_the_layers_scaling_is_divided_out():
    """An adapter with another alpha would begin elsewhere."""
    error, hessian = error_and_hessian()
    lora_a, lora_b = residual_factors(error, hessian, 4)
    scaled_a, scaled_b = residual_factors(error, hessian, 4, scaling=4.0)
    torch.testing.assert_close(scaled_a, lora_a / 2)
    torch.testing.assert_close(scaled_b, lora_b / 2)


@pytest.mark.parametrize(
    ("error", "hessian", "message"),
    [
        (torch.ones(3, 4), torch.eye(3), r"hessian: expected shape \[in, in\].*got \(3, 3\) for \(3, 4\)"),
        (torch.ones(4), torch.eye(4), "hessian: expected shape"),
        (torch.ones(3, 4), torch.zeros(4, 4), "positive definite.*damping"),
        (torch.ones(3, 4), torch.diag(torch.tensor([1.0, 1.0, -1.0, 1.0])), "positive definite"),
        (torch.full((3, 4), torch.nan), torch.eye(4), "error: expected finite"),
    ],
)
def test_wrong_arguments(error, hessian, message):
    """What does not fit is named before NaN comes of it."""
    with pytest.raises(ValueError, match=message):
        residual_factors(error, hessian, 2)
