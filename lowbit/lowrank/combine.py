"""Weighted combination of the LoRA adapters of one layer, as PEFT's ``add_weighted_adapter`` does it."""

import math
from collections.abc import Sequence
from typing import Any

import torch

#: Methods that combine the factors A and B each for itself.
_FACTOR_METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
#: Methods that combine the products scaling * B A, and approximate the result.
_PRODUCT_METHODS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
#: All methods, by PEFT's names.
METHODS = (*_FACTOR_METHODS, "cat", *_PRODUCT_METHODS)

_MAJORITY_SIGNS = ("total", "frequency")

Factors = tuple[torch.Tensor, torch.Tensor, float]


@torch.no_grad()
def combine(
    factors: Sequence[Factors],
    weights: Sequence[float],
    method: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(A, B)`` of one adapter with scaling 1 that stands for several, each times its weight.

    A is [rank, in] and B is [out, rank]; both are fp32, contiguous, new, and on the device of the first A.

    ===================  ===========================================================================================
    cat                  The sum of weight * scaling * B A, exactly; the ranks add up.
    svd                  The best approximation of that sum at ``rank``; B takes the singular values.
    linear               A and B are each the sum of the given ones, times sqrt(abs(weight * scaling)); a negative
                         weight turns the sign of A. B A also has the products of one adapter's B and another's A.
    magnitude_prune      linear, but of each A and B only the fraction ``density`` of largest magnitude is kept.
    ties                 magnitude_prune, but of each element only the adapters count whose sign, before weights, is
                         the majority's, and their mean is taken. Source: Yadav et al., "TIES-Merging", 2023 (arXiv
                         2306.01708).
    dare_linear          linear, but of each A and B every element is kept with the probability ``density`` and then
                         divided by it. Source: Yu et al., "Language Models are Super Mario", 2023 (arXiv 2311.03099).
    dare_ties            dare_linear's pruning, then the signs and the mean of ties.
    magnitude_prune_svd, ties_svd, dare_linear_svd, dare_ties_svd
                         The same of the products scaling * B A [out, in] instead of A and B, then svd.
    ===================  ===========================================================================================

    Args:
        factors: ``(A [rank, in], B [out, rank], scaling)`` of each adapter, in any floating-point dtype.
        weights: a finite number for each adapter; may be negative.
        method: a name of the table.
        rank: for svd and the methods that end in _svd: of the result (default: the largest rank given). A's rows are
            orthonormal, and zero after the first min(out, in), where the adapter needs no more. Other methods do not
            read it.
        density: for ties, dare and magnitude_prune, which need it: the fraction that is kept, in (0, 1]; 1 keeps all.
            Of n elements int(density * n) of largest magnitude are kept. Other methods do not read it.
        majority_sign: for ties: "total" (the sign of the sum) or "frequency" (the sign that more adapters have).
        generator: for dare: of the random numbers (default: torch's global one, which gives what PEFT gives).

    Raises:
        ValueError: the method or ``majority_sign`` is unknown; the factors are none, hold NaN or inf, or differ in rank
            for a method that needs equal ranks; a number is out of range, or the density is missing.
    """
    _check_options(method, rank, density, majority_sign)
    _check_factors(factors, method)
    _check_weights(weights, len(factors))
    device = factors[0][0].device
    given = [(a.to(device, torch.float32), b.to(device, torch.float32), float(scaling)) for a, b, scaling in factors]
    options = ("linear" if method == "svd" else method.removesuffix("_svd"), density, majority_sign, generator)
    with torch.autocast(device.type, enabled=False):  # else products are rounded to 16 bits
        if method in _FACTOR_METHODS:
            scaled = [weight * scaling for weight, (_, _, scaling) in zip(weights, given, strict=True)]
            roots = [math.sqrt(abs(weight)) for weight in scaled]
            signed = [math.copysign(root, weight) for root, weight in zip(roots, scaled, strict=True)]
            # All of A before all of B, as in PEFT: a seed gives the same random numbers.
            return _merge([a for a, _, _ in given], signed, *options), _merge([b for _, b, _ in given], roots, *options)
        rank = rank or max(len(a) for a, _, _ in given)
        # A rank above the sum needs more rows for A than the factors have. They are orthonormal too, as in PEFT.
        if method == "cat" or (method == "svd" and rank <= sum(len(a) for a, _, _ in given)):
            lora_a = torch.cat([a * (w * scaling) for (a, _, scaling), w in zip(given, weights, strict=True)])
            lora_b = torch.cat([b for _, b, _ in given], 1)
            return (lora_a, lora_b) if method == "cat" else _truncate(lora_a, lora_b, rank)
        merged = _merge([scaling * (b @ a) for a, b, scaling in given], weights, *options)
        return _split(*torch.linalg.svd(merged, full_matrices=False), rank)


def _merge(tensors, weights, method, density, majority_sign, generator) -> torch.Tensor:
    """One tensor from several of its shape."""
    if method != "linear" and density < 1:
        tensors = [_prune(tensor, density, method, generator) for tensor in tensors]
    stacked = torch.stack(tensors)
    weighted = stacked * stacked.new_tensor(weights)[:, None, None]
    if not method.endswith("ties"):
        return weighted.sum(0)
    election = stacked if majority_sign == "total" else stacked.sign()
    agrees = torch.where(election.sum(0) >= 0, stacked > 0, stacked < 0)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _prune(tensor: torch.Tensor, density: float, method: str, generator: torch.Generator | None) -> torch.Tensor:
    if method.startswith("dare"):
        return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    return torch.zeros_like(tensor.flatten()).index_copy_(0, kept, tensor.flatten()[kept]).view(tensor.shape)


def _truncate(lora_a: torch.Tensor, lora_b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of B A. Its SVD is that of a small matrix between two bases: [out, in] is never formed."""
    basis_b, small_b = torch.linalg.qr(lora_b)
    basis_a, small_a = torch.linalg.qr(lora_a.T)
    u, s, vh = torch.linalg.svd(small_b @ small_a.T, full_matrices=False)
    return _split(basis_b @ u, s, vh @ basis_a.T, rank)


def _split(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``rank`` parts of an SVD, filled up with zeros where there are fewer."""
    lora_a, lora_b = vh.new_zeros(rank, vh.shape[1]), u.new_zeros(len(u), rank)
    lora_a[: len(s)], lora_b[:, : len(s)] = vh[:rank], u[:, :rank] * s[:rank]
    return lora_a, lora_b


def _check_options(method: Any, rank: Any, density: Any, majority_sign: Any) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if majority_sign not in _MAJORITY_SIGNS:
        raise ValueError(f"majority_sign: expected one of {', '.join(_MAJORITY_SIGNS)}, got {majority_sign!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank: expected an int of at least 1 or None, got {rank!r}")
    if density is None and method in ("linear", "cat", "svd"):
        return
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"density: expected a number in (0, 1] for method {method!r}, got {density!r}")


def _check_weights(weights: Any, adapters: int) -> None:
    if len(weights) != adapters:
        raise ValueError(f"weights: expected {adapters}, one for each adapter, got {len(weights)}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"weights: expected finite numbers, got {weight!r}")


def _check_factors(factors: Any, method: str) -> None:
    if not factors:
        raise ValueError("factors: expected (A, B, scaling) of at least one adapter, got none")
    if not all(bool(a.isfinite().all() and b.isfinite().all()) for a, b, _ in factors):
        raise ValueError("factors: expected finite numbers, got NaN or inf")
    ranks = [len(a) for a, _, _ in factors]
    if method in _FACTOR_METHODS and len(set(ranks)) > 1:
        raise ValueError(f"factors: expected equal ranks for method {method!r}, got {ranks}; use 'cat' or 'svd'")
