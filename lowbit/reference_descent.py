"""The oracle of ``codes="descent"``: codes and scales of one block of columns under a Hessian, in plain torch.

Every backend computes the same bits: each line below is one fp32 operation, rounded once, and ``fma`` is one too. All
rows are independent. ``lowbit/quantizers/descent.py`` says what the blocks are parts of.
"""

import torch

from . import format as fmt
from .format import WeightSpec
from .reference_optim import fma


def gptq_block(weight, factor, candidates, spec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One block's step of GPTQ with a choice of scale.

    The columns of ``weight`` fp32 [n, b] are rounded one after the other, and each one's error is made up for by those
    that come after it, as ``factor`` says: fp32 [b, b], upper triangular, that part of the U with U^T U = H^-1. This is
    done for each of ``candidates`` fp32 [n, c], and each row keeps the scale with the least sum of squared errors, the
    first of equal ones.

    Returns:
        The decoded block fp32 [n, b]; its errors fp32 [n, b], by which the blocks that follow are corrected; and the
        index of the chosen scale, int32 [n].

    Source: Frantar et al., "GPTQ", 2023 (arXiv 2210.17323).
    """
    nearest = _nearest(spec, weight.device)
    scales, inverse = candidates, _inverse(candidates)
    left = weight[:, None].expand(-1, scales.shape[1], -1).clone()  # [n, c, b], as the rows before have corrected it
    decoded, errors, loss = torch.empty_like(left), torch.empty_like(left), torch.zeros_like(scales)
    for j in range(weight.shape[1]):
        decoded[..., j] = nearest(left[..., j] * inverse) * scales
        errors[..., j] = (left[..., j] - decoded[..., j]) * (1.0 / factor[j, j])
        loss = fma(errors[..., j], errors[..., j], loss)
        left[..., j + 1 :] = fma(-errors[..., j, None], factor[j, j + 1 :], left[..., j + 1 :])
    choice = _first_least(loss, torch.inf)
    return _chosen(decoded, choice), _chosen(errors, choice), choice.int()


def descend_block(decoded, gradient, hessian, candidates, sweeps, spec) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinate descent over the codes and the scale of one block, all other blocks fixed.

    ``decoded`` is Q fp32 [n, b], ``gradient`` (W - Q) H there, fp32 [n, b], and ``hessian`` that block on the diagonal
    of H, fp32 [b, b]. For each of ``candidates`` fp32 [n, c], the first being the block's own scale, ``sweeps`` times
    each column in turn takes the code that is best while the others stay. A row takes the result that lowers
    tr((W - Q) H (W - Q)^T) most, or stays as it is.

    Returns:
        The decoded block fp32 [n, b], and the index of the chosen scale, int32 [n].
    """
    nearest = _nearest(spec, decoded.device)
    scales, inverse = candidates, _inverse(candidates)
    old = decoded[:, None].expand(-1, scales.shape[1], -1)
    new, left = old.clone(), gradient[:, None].expand_as(old).clone()
    for _ in range(sweeps):
        for j in range(decoded.shape[1]):
            target = fma(left[..., j], (1.0 / hessian[j, j]).expand_as(scales), new[..., j])
            value = nearest(target * inverse) * scales
            left = fma((new[..., j] - value)[..., None], hessian[j], left)
            new[..., j] = value
    change, loss = new - old, torch.zeros_like(scales)
    for j in range(decoded.shape[1]):  # c H c^T - 2 c g^T for the change c, since g has become g - c H
        loss = fma(-change[..., j], gradient[:, None, j] + left[..., j], loss)
    choice = _first_least(loss, 0.0)
    falls = _chosen(loss, choice) < 0
    return torch.where(falls[:, None], _chosen(new, choice), decoded), choice.int()


def _nearest(spec: str, device: torch.device):
    """The function to the nearest value of the codebook."""
    format = WeightSpec.parse(spec).format
    midpoints, code_of_rank = (table.to(device) for table in fmt.thresholds(format))
    ordered = fmt.codebook(format, device)[code_of_rank.int()]
    return lambda x: ordered[torch.bucketize(x, midpoints).clamp(max=15)]


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    """fl(1 / scale), or 0 where that could overflow: all codes are then that of zero."""
    return torch.where(scales.abs() >= fmt.TINY_ABSMAX, 1.0 / scales, 0.0)


def _first_least(loss: torch.Tensor, limit: float) -> torch.Tensor:
    """The index of the least of each row of [n, c], the first of equal ones; 0 where none is less than ``limit``."""
    best, least = torch.zeros_like(loss[:, 0], dtype=torch.int64), torch.full_like(loss[:, 0], limit)
    for c in range(loss.shape[1]):
        better = loss[:, c] < least
        best, least = torch.where(better, c, best), torch.where(better, loss[:, c], least)
    return best


def _chosen(values: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    """values[i, choice[i]] for each row i."""
    return values[torch.arange(len(choice), device=choice.device), choice]
