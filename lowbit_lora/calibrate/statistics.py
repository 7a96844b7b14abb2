"""What calibration knows of the inputs of a stage: sums over tokens."""

from dataclasses import dataclass, field

import torch

#: A Gram matrix is computed in so many strips; of each, the part right of the diagonal: 0.625 of the whole product.
_STRIPS = 4


def gram(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over tokens of weight * x x^T.

    Args:
        x: [tokens, k], fp32.
        weights: [tokens], or None for ones.

    Returns:
        [k, k], fp32, symmetric bit for bit.
    """
    k = x.shape[1]
    weighted = x if weights is None else x * weights[:, None]
    result = x.new_empty(k, k)
    width = max(64, -(-k // _STRIPS))
    for start in range(0, k, width):
        torch.mm(weighted[:, start : start + width].T, x[:, start:], out=result[start : start + width, start:])
    return result.triu_().add_(result.triu(1).T)


@dataclass
class Group:
    """Layers of a stage with the same weights of tokens, and the sums for them.

    Args:
        layers: their names, with their weights [out, in] in fp32.
        is_attended: tokens count by the attention that they receive.

    ``hessian`` [in, in] is the sum of w x x^T over tokens. ``pull`` [in, out], by layer, is the sum of w x d^T, where
    d is what the layer's output lacks of the dense model's; ``lack`` is the sum of w d^T d.
    """

    layers: dict[str, torch.Tensor]
    is_attended: bool = False
    hessian: torch.Tensor | None = None
    pull: dict[str, torch.Tensor] = field(default_factory=dict)
    lack: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def add(
        self,
        x: torch.Tensor,
        received: torch.Tensor | None,
        target: torch.Tensor | None = None,
        residuals: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Count tokens.

        Args:
            x: [tokens, in], what enters the layers.
            received: [tokens], the attention that each gets, 1 on average; None if that is not known.
            target: [tokens, in], what enters the dense model's; None where that is x.
            residuals: by layer, [tokens, out]: what the dense model's residual stream is ahead of this one.
        """
        weights = (1 + received) / 2 if self.is_attended and received is not None else None
        self.tokens += len(x)
        _accumulate(self, "hessian", gram(x, weights))
        if target is None:
            return
        weighted = x if weights is None else x * weights[:, None]
        difference = target - x
        for name, weight in self.layers.items():
            lacking = difference @ weight.T
            if residuals and name in residuals:
                lacking += residuals[name]
            pull = weighted.T @ lacking
            self.pull[name] = self.pull[name] + pull if name in self.pull else pull
            square = lacking.square().sum(1)
            self.lack[name] = self.lack.get(name, 0.0) + float(square.sum() if weights is None else square @ weights)

    def loss(self, name: str, quantized: torch.Tensor) -> float:
        """The squared error of the layer's output, over tokens, as a share of the output's square."""
        weight = self.layers[name]
        error = quantized - weight
        product = error @ self.hessian
        loss = float((product * error).sum(dtype=torch.float64))
        if name in self.pull:
            loss += self.lack[name] - 2 * float((self.pull[name].T * error).sum(dtype=torch.float64))
        return loss / max(float(((weight @ self.hessian) * weight).sum(dtype=torch.float64)), 1e-30)


@dataclass
class Squares:
    """The sum of x^2 by input channel: all that a weighted search needs. ``add`` and ``loss`` as in :class:`Group`."""

    layers: dict[str, torch.Tensor]
    is_attended: bool = False
    diagonal: torch.Tensor | None = None
    tokens: int = 0

    def add(self, x, received, target=None, residuals=None) -> None:
        self.tokens += len(x)
        _accumulate(self, "diagonal", x.square().sum(0))

    def loss(self, name: str, quantized: torch.Tensor) -> float:
        weight = self.layers[name]
        lost = ((quantized - weight).square() @ self.diagonal).sum(dtype=torch.float64)
        return float(lost / (weight.square() @ self.diagonal).sum(dtype=torch.float64).clamp_min(1e-30))


def _accumulate(sums, name: str, value: torch.Tensor) -> None:
    before = getattr(sums, name)
    setattr(sums, name, value if before is None else before.add_(value))
