"""The dense, frozen 16-bit layers that a wrapped model keeps, such as ``lm_head``: products as lowbit.ops.dense's."""

import torch
from torch import nn

from lowbit import QuantizedTensor
from lowbit.ops.dense import frozen_linear


class FrozenLinear(nn.Linear):
    """An nn.Linear whose weight is frozen; what :func:`adopt` makes of those a wrapped model keeps."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return frozen_linear(input, self.weight, self.bias)


def adopt(model: nn.Module) -> None:
    """Turn each plain nn.Linear with a frozen 16-bit weight into a FrozenLinear, in place: weights stay tied."""
    for module in model.modules():
        if type(module) is not nn.Linear or isinstance(module.weight, QuantizedTensor):  # which has kernels of its own
            continue
        if module.weight.dtype in (torch.bfloat16, torch.float16) and not module.weight.requires_grad:
            module.__class__ = FrozenLinear


def release(model: nn.Module) -> None:
    """Turn each FrozenLinear back into an nn.Linear."""
    for module in model.modules():
        if type(module) is FrozenLinear:
            module.__class__ = nn.Linear
