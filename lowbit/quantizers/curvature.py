"""What a layer's inputs say of errors in its weight: the loss tr(E H E^T), H being the inputs' Gram matrix."""

import torch

from ..checks import check_positive
from ..tensor import QuantizedTensor


class Curvature:
    """A Hessian, checked and made ready for ``quantize(..., codes="descent")``.

    Make one where several weights read the same inputs, as q, k and v do: its factors are found once.

    Args:
        hessian: float32 [k, k], symmetric and positive semidefinite: X^T X of the layer's inputs X [tokens, k], or a
            multiple of it. Channels that were always zero and fewer tokens than k are fine; all zeros count as no
            preference.
        damping: added to the diagonal, in units of its mean. More of it trusts the data less.

    Attributes:
        damped: fp32 [k, k], H divided by the mean of its diagonal, plus damping.
        damping: as given.
        diagonal: of the Hessian as given, fp32 [k]: the importance of each input column.

    Raises:
        TypeError: not a float32 tensor.
        ValueError: not square, not symmetric, NaN, inf or a negative number on the diagonal, or damping not above 0.
    """

    def __init__(self, hessian: torch.Tensor, damping: float = 0.1):
        check_positive("damping", damping)
        _check_hessian(hessian)
        self.damping, self.diagonal = damping, hessian.diagonal().clone()
        mean = self.diagonal.double().mean().item() if len(hessian) else 0.0
        self._unit = mean if mean > 0 else 1.0
        # In two steps: the reciprocal of a tiny mean could leave fp32.
        self.damped = hessian / self._unit
        self.damped.diagonal().add_(damping)
        self._factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        """Input columns."""
        return len(self.damped)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.damped.device

    def factor(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(order int64 [k], U fp32 [k, k])``: in which order columns are rounded, and U^T U = H^-1 in that order.

        Blocks come by the mean of their diagonal and the columns of a block by theirs, the largest first. U is upper
        triangular.

        Raises:
            ValueError: the Hessian is not positive semidefinite.
        """
        if block_size not in self._factors:
            diagonal = self.damped.diagonal().view(-1, block_size)
            blocks = diagonal.mean(1).argsort(descending=True, stable=True)
            within = diagonal[blocks].argsort(dim=1, descending=True, stable=True)
            order = (within + block_size * blocks[:, None]).view(-1)
            self._factors[block_size] = order, _upper_factor_of_inverse(self.damped[order][:, order])
        return self._factors[block_size]

    def loss(self, error: torch.Tensor) -> torch.Tensor:
        """e H e^T of each row e of an error fp32 [n, k], without damping: fp64 [n], in units of the Hessian given."""
        return self.loss_from(error, error @ self.damped)

    def loss_from(self, error: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """:meth:`loss`, given ``error @ damped``."""
        error = error.double()
        # Rounding alone can make it negative.
        return ((product.double() - self.damping * error) * error).sum(1).clamp(min=0) * self._unit


def loss(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor | Curvature) -> float:
    """tr((W - Q) H (W - Q)^T): how much a layer's output changes, its squared error summed over the tokens of H.

    Args:
        weight: dense, [..., k].
        quantized: of the same shape, quantized or dense.
        hessian: as :func:`lowbit.quantize` takes it, fp32 [k, k].
    """
    if isinstance(quantized, QuantizedTensor):
        quantized = quantized.dequantize(torch.float32)
    curvature = hessian if isinstance(hessian, Curvature) else Curvature(hessian)
    error = (weight.detach().float() - quantized.float()).reshape(-1, weight.shape[-1])
    return float(curvature.loss(error).sum())


def _upper_factor_of_inverse(hessian: torch.Tensor) -> torch.Tensor:
    """U, upper triangular, with U^T U = H^-1."""
    # H read from its end is L L^T, so that H = R R^T, R being L read from its end: upper triangular, and U = R^-1.
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        raise ValueError("hessian: expected a positive semidefinite matrix, got one that is not, even with damping")
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)


def _check_hessian(hessian: torch.Tensor) -> None:
    if not isinstance(hessian, torch.Tensor):
        raise TypeError(f"hessian: expected a torch.Tensor or a Curvature, got {type(hessian).__name__}")
    if hessian.dtype != torch.float32:
        raise TypeError(f"hessian: expected torch.float32, got {hessian.dtype}")
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian: expected a square matrix [k, k], got shape {tuple(hessian.shape)}")
    if hessian.is_meta:
        raise ValueError("hessian: expected a matrix with data, got one on meta")
    if not bool(torch.isfinite(hessian).all()):
        count = int((~torch.isfinite(hessian)).sum())
        raise ValueError(f"hessian: expected finite values, got {count} NaN or inf")
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()):
        column = int((diagonal < 0).nonzero()[0])
        raise ValueError(
            f"hessian: expected a diagonal of at least 0, got {diagonal[column].item()} in column {column}"
        )
    # Of sums of products in another order only the last bits differ.
    if len(hessian) and float((hessian - hessian.T).abs().max()) > 1e-3 * float(diagonal.max()):
        raise ValueError("hessian: expected a symmetric matrix, got one that is not")
