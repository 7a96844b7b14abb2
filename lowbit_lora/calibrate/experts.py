"""Stacks of experts, as transformers 5 fuses them: each expert is calibrated on its own tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lowbit import QuantizedTensor
from lowbit.quantizers import Curvature
from lowbit.quantizers.quantize import quantize_to

from .layers import Result, Settings
from .statistics import gram

#: Of an expert with fewer tokens than this share of its inputs only the mean squares of all tokens are used.
_TOO_FEW = 0.125


@dataclass
class Experts:
    """The tokens of a stage of experts, all batches together.

    Args:
        module: transformers' module with ``gate_up_proj`` (or ``up_proj``) and ``down_proj``, [experts, out, in].
        x: [tokens, hidden].
        routes: int [tokens, any]: the experts of each token.
    """

    module: nn.Module
    x: torch.Tensor
    routes: torch.Tensor

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module computes as this one expects."""
        has_up = getattr(module, "gate_up_proj", None) is not None or getattr(module, "up_proj", None) is not None
        return has_up and getattr(module, "down_proj", None) is not None and hasattr(module, "act_fn")

    @property
    def up_name(self) -> str:
        """The name of the first stack."""
        return "gate_up_proj" if getattr(self.module, "gate_up_proj", None) is not None else "up_proj"

    def of(self, expert: int) -> torch.Tensor:
        """The tokens [any, hidden] of an expert."""
        return self.x[(self.routes == expert).any(1)]

    def inside(self, expert: int, up: torch.Tensor) -> torch.Tensor:
        """What enters ``down_proj`` for its tokens, with the stack ``up`` [experts, out, in]."""
        y = F.linear(self.of(expert), up[expert].float())
        bias = getattr(self.module, f"{self.up_name}_bias", None)
        if bias is not None:
            y = y + bias[expert]
        if self.up_name == "up_proj":
            return self.module.act_fn(y)
        if hasattr(self.module, "_apply_gate"):
            return self.module._apply_gate(y)
        gate, value = y.chunk(2, dim=-1)
        return self.module.act_fn(gate) * value


@dataclass
class StackResult(Result):
    """A quantized stack [experts, out, in]; losses are means over experts that had tokens.

    ``damped`` experts had few tokens, ``searched`` ones next to none.
    """

    damped: int = 0
    searched: int = 0


def quantize_stack(weight: torch.Tensor, inputs: list[torch.Tensor], settings: Settings) -> StackResult:
    """Quantize a stack [experts, out, in] on the inputs [tokens, in] of each expert.

    An expert with fewer tokens than inputs gets more damping, by as much; with next to none it is searched, weighted by
    the mean squares that all tokens have.
    """
    spec, width = settings.spec, weight.shape[-1]
    overall = sum(x.square().sum(0) for x in inputs)
    overall = overall / overall.mean().clamp_min(1e-30)
    searched = quantize_to(weight, spec, "search", overall)
    losses = [_loss(inputs, weight, candidate) for candidate in (quantize_to(weight, spec), searched)]
    if settings.method == "scale":
        return StackResult(searched, *losses, losses[1], "weighted search")
    curvatures, damped, undone = [], 0, 0
    for x in inputs:
        if len(x) < _TOO_FEW * width or not bool(x.any()):
            undone += 1
            curvatures.append(Curvature(torch.diag(overall), settings.damping))
        else:
            damped += len(x) < width
            curvatures.append(Curvature(gram(x), settings.damping * max(1.0, width / len(x))))
    descended = quantize_to(weight, spec, codes="descent", hessian=curvatures, sweeps=settings.sweeps)
    loss = _loss(inputs, weight, descended)
    if loss > losses[1]:
        return StackResult(searched, *losses, losses[1], "weighted search", damped, undone)
    return StackResult(descended, *losses, loss, "descent", damped, undone)


def _loss(inputs: list[torch.Tensor], weight: torch.Tensor, quantized: QuantizedTensor) -> float:
    """The squared error of an expert's outputs as a share of their square, the mean over experts with tokens."""
    shares = []
    for x, dense, decoded in zip(inputs, weight, quantized.dequantize(torch.float32), strict=True):
        if len(x):
            lost, whole = ((x @ matrix.T).square().sum() for matrix in (decoded - dense, dense))
            shares.append(float(lost / whole.clamp_min(1e-30)))
    return sum(shares) / max(len(shares), 1)
