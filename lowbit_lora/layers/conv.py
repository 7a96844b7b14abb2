"""LoRA on convolutions in one, two and three dimensions."""

import torch
import torch.nn.functional as F
from torch import nn

from lowbit.adapted import Factors

from .base import Adapter, LoRABaseLayer


class LoRAConv(LoRABaseLayer):
    """A convolution with a frozen weight, dense or quantized, plus LoRA, in PEFT's shapes.

    A is a convolution of the base's kernel, stride, padding and dilation to ``rank`` channels. B is one of kernel 1
    from them to the output's channels, in the base's groups, of which the rank is a multiple.
    """

    def _setup(self) -> None:
        self.in_channels, self.out_channels = self.base_layer.in_channels, self.base_layer.out_channels
        self._feature_shape = (-1, *[1] * len(self.base_layer.kernel_size))
        self._magnitude_shape = (1, *self._feature_shape)

    def _new_factors(self, adapter: Adapter, **options) -> dict[str, nn.Module | nn.Parameter]:
        base, rank, bias = self.base_layer, adapter.rank, adapter.lora_bias
        if rank % base.groups:
            raise ValueError(f"rank: expected a multiple of the convolution's groups={base.groups}, got {rank}")
        shape = {name: getattr(base, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        down = self.base_type(self.in_channels, rank, bias=False, **shape, **options)
        up = self.base_type(rank, self.out_channels, 1, groups=base.groups, bias=bias, **options)
        return {"lora_A": down, "lora_B": up}

    def product(self, name: str) -> torch.Tensor:
        """See :class:`LoRABaseLayer`; a ValueError in groups: A reads all channels, which such a weight cannot."""
        if self.base_layer.groups > 1:
            raise ValueError(
                f"a convolution in groups={self.base_layer.groups} cannot hold LoRA in its weight; leave it wrapped"
            )
        return super().product(name)

    def _added(self, input: torch.Tensor, name: str) -> torch.Tensor:
        adapter, down, up = self.adapters[name], self.lora_A[name], self.lora_B[name]
        dropped = F.dropout(input, self.dropout_probability(name), self.training)
        return adapter.scaling * up(down(dropped.to(down.weight.dtype)))

    @torch.no_grad()
    def row_norms(self, name: str) -> torch.Tensor:
        """In groups, as in PEFT, norms of no weight: B A is as if there were none, laid out in the weight's shape."""
        if self.base_layer.groups == 1:
            return super().row_norms(name)
        adapter, (lora_a, lora_b) = self.adapters[name], self.factors(name)
        factors = Factors(lora_b.view(-1, adapter.rank), lora_a.view(adapter.rank, -1), adapter.scaling)
        weight = self.base_weight(torch.float32)
        return (weight + factors.product().view(weight.shape)).flatten(1).norm(dim=1)


class LoRAConv1d(LoRAConv):
    """nn.Conv1d with LoRA; see :class:`LoRAConv`."""

    base_type = nn.Conv1d


class LoRAConv2d(LoRAConv):
    """nn.Conv2d with LoRA; see :class:`LoRAConv`."""

    base_type = nn.Conv2d


class LoRAConv3d(LoRAConv):
    """nn.Conv3d with LoRA; see :class:`LoRAConv`."""

    base_type = nn.Conv3d
