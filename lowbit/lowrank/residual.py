"""Factors that make up for a weight's error where its layer's inputs notice it."""

import math

import torch

#: Blocks of directions that the search for the largest singular values goes through, and how much wider than the rank
#: each is. Of random numbers [1024, 1024], whose spectrum is flat, they leave 1.0005 of the least loss at rank 16, and
#: where singular values fall as those of layers do, 1 + 1e-8 of it.
_STEPS, _SPARE = 6, 8


@torch.no_grad()
def residual_factors(
    error: torch.Tensor, hessian: torch.Tensor, rank: int, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(A, B)`` for which tr((E - scaling * B A) H (E - scaling * B A)^T) is least at this rank.

    For E = W - Q, what a quantized weight lacks, and H the Gram matrix of a layer's inputs, that is the squared error
    of the layer's outputs. With H = L L^T, scaling * B A is the truncated singular value decomposition of E L, times
    L^-1. Each row of A has the norm of its column of B. What the error has no part in begins as in "default": a zero
    column of B, and a row of A that is drawn by torch's global generator.

    Args:
        error: float32 [out, in].
        hessian: float32 [in, in], symmetric and positive definite, as ``Curvature.damped`` is; any multiple of it will
            do.
        rank: at least 1 (not checked); from min(out, in) on, B A is the whole error.
        scaling: the positive factor that the layer puts on B A (not checked).

    Returns:
        A [rank, in] and B [out, rank], fp32, contiguous, on the error's device.

    Raises:
        ValueError: the shapes do not fit; the Hessian is not positive definite; NaN or inf.
    """
    if error.ndim != 2 or hessian.shape != (error.shape[1],) * 2:
        raise ValueError(
            f"hessian: expected shape [in, in] for an error [out, in], got {tuple(hessian.shape)} for "
            f"{tuple(error.shape)}"
        )
    if not bool(torch.isfinite(error).all()):
        raise ValueError("error: expected finite numbers, got NaN or inf")
    with torch.autocast(error.device.type, enabled=False):
        root, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            raise ValueError("hessian: expected a positive definite matrix, got one that is not; add damping")
        u, s, vh = _largest(error @ root, min(rank, *error.shape))
        # What is left of a singular value in fp32 when nothing is.
        is_part = s > s[:1] * max(error.shape) * torch.finfo(torch.float32).eps
        u, s, vh = u[:, is_part], s[is_part], vh[is_part]
        rows = torch.linalg.solve_triangular(root, vh, upper=False, left=False)
    lengths = rows.norm(dim=1)
    found_a = rows * (s / (lengths * scaling)).sqrt()[:, None]
    found_b = u * (s * lengths / scaling).sqrt()
    other_a = error.new_empty(rank - len(s), error.shape[1]).uniform_(-1, 1) / math.sqrt(error.shape[1])
    other_b = error.new_zeros(len(error), rank - len(s))
    return torch.cat([found_a, other_a]), torch.cat([found_b, other_b], 1)


def _largest(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``count`` largest singular values, with their vectors: U [n, count], S, V^T [count, k].

    Of a large matrix they are found in a block Krylov space, from the same directions each time.
    Source: Musco & Musco, "Randomized Block Krylov Methods", 2015 (arXiv 1504.05477).
    """
    width = count + _SPARE
    if width * _STEPS >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :count], s[:count], vh[:count]
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(_STEPS - 1):
        block = matrix @ (matrix.T @ basis[:, -width:])
        block -= basis @ (basis.T @ block)  # of the next directions, what is new
        basis = torch.cat([basis, torch.linalg.qr(block).Q], 1)
    basis = torch.linalg.qr(basis).Q  # directions that were next to nothing are not quite orthogonal
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :count], s[:count], vh[:count]
