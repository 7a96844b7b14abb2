"""What calibration knows of the inputs of a stage: sums over tokens."""

from dataclasses import dataclass, field

import torch

#: A Gram matrix is computed in so many strips; of each, the part right of the diagonal: 0.625 of the whole product.
_STRIPS = 4


def gram(x: torch.Tensor, weighted: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over tokens of weight * x x^T.

    Args:
        x: [tokens, k], fp32.
        weighted: [tokens, k], weight * x; None for weights of 1.

    Returns:
        [k, k], fp32, symmetric bit for bit.
    """
    k = x.shape[1]
    weighted = x if weighted is None else weighted
    result = x.new_empty(k, k)
    width = max(64, -(-k // _STRIPS))
    for start in range(0, k, width):
        torch.mm(weighted[:, start : start + width].T, x[:, start:], out=result[start : start + width, start:])
    return result.triu_().add_(result.triu(1).T)


@dataclass
class Group:
    """Layers of a stage with the same weights of tokens, and the sums for them.

    What a layer's output lacks of the dense model's is d = W (t - x) + r for each token: t is what enters the dense
    model's layer, and r what its residual stream is ahead by, where the output is added to one.

    Args:
        layers: their names, with their weights W [out, in] in fp32.
        is_attended: tokens count by the attention that they receive.

    Attributes:
        hessian: [in, in], the sum of w x x^T over tokens.
        tokens: how many were counted.
    """

    layers: dict[str, torch.Tensor]
    is_attended: bool = False
    hessian: torch.Tensor | None = None
    tokens: int = 0
    # The sums of w x (t - x)^T and of w (t - x) (t - x)^T, for the layers without r.
    _drift: torch.Tensor | None = None
    _spread: torch.Tensor | None = None
    # By layer, the sums of w x d^T and w d^T d, for those with r.
    _pull: dict[str, torch.Tensor] = field(default_factory=dict)
    _lack: dict[str, float] = field(default_factory=dict)

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
        weighted = x if weights is None else x * weights[:, None]
        _accumulate(self, "hessian", gram(x, weighted))
        if target is None:
            return
        difference = target - x
        residuals = residuals or {}
        for name in self.layers.keys() & residuals.keys():
            lacking = torch.addmm(residuals[name], difference, self.layers[name].T)
            pull, square = weighted.T @ lacking, lacking.square_().sum(1)
            self._pull[name] = self._pull[name] + pull if name in self._pull else pull
            self._lack[name] = self._lack.get(name, 0.0) + float(square.sum() if weights is None else square @ weights)
        if self.layers.keys() - residuals.keys():
            _accumulate(self, "_drift", weighted.T @ difference)
            weighted = None if weights is None else difference * weights[:, None]
            _accumulate(self, "_spread", gram(difference, weighted))

    def goal(self, name: str) -> "Goal":
        """What a layer is to do on these tokens."""
        weight = self.layers[name]
        pull, lack = self._pull.get(name), self._lack.get(name, 0.0)
        if pull is None and self._drift is not None:
            pull, lack = self._drift @ weight.T, _form(weight, self._spread)
        return Goal(weight, self.hessian, _form(weight, self.hessian), pull, lack)


@dataclass
class Goal:
    """The outputs that one layer of a :class:`Group` should have.

    ``output`` is the sum of w |W x|^2 over tokens; ``pull`` [in, out] is that of w x d^T, None where nothing lacks, and
    ``lack`` that of w d^T d.
    """

    weight: torch.Tensor
    hessian: torch.Tensor
    output: float
    pull: torch.Tensor | None
    lack: float

    def loss(self, quantized: torch.Tensor) -> float:
        """The squared error of the outputs with a weight [out, in], as a share of their square."""
        error = quantized - self.weight
        loss = _form(error, self.hessian) + self.lack
        if self.pull is not None:
            loss -= 2 * float((self.pull.T * error).sum(dtype=torch.float64))
        return max(loss, 0.0) / max(self.output, 1e-30)


def _form(rows: torch.Tensor, matrix: torch.Tensor) -> float:
    """The sum of r M r^T over the rows r."""
    return float(((rows @ matrix) * rows).sum(dtype=torch.float64))


@dataclass
class Squares:
    """The sum of x^2 by input channel: all that a weighted search needs. It is used as :class:`Group` is."""

    layers: dict[str, torch.Tensor]
    diagonal: torch.Tensor | None = None
    tokens: int = 0

    def add(self, x, received, target=None, residuals=None) -> None:
        """Count tokens."""
        self.tokens += len(x)
        _accumulate(self, "diagonal", x.square().sum(0))

    def goal(self, name: str) -> "SquaresGoal":
        """What a layer is to do on these tokens."""
        return SquaresGoal(self.layers[name], self.diagonal)


@dataclass
class SquaresGoal:
    """As :class:`Goal`, as if channels were uncorrelated."""

    weight: torch.Tensor
    diagonal: torch.Tensor

    def loss(self, quantized: torch.Tensor) -> float:
        """The squared error of the outputs with a weight [out, in], as a share of their square."""
        lost, whole = (
            float((w.square() @ self.diagonal).sum(dtype=torch.float64)) for w in (quantized - self.weight, self.weight)
        )
        return lost / max(whole, 1e-30)


def _accumulate(sums, name: str, value: torch.Tensor) -> None:
    before = getattr(sums, name)
    setattr(sums, name, value if before is None else before.add_(value))
