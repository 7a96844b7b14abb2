"""LoRA on convolutions in one, two and three dimensions."""

import torch
import torch.nn.functional as F
from torch import nn

from .base import DEFAULT, Adapter, LoRABaseLayer, without_autocast


class LoRAConvNd(LoRABaseLayer):
    """A convolution with a frozen weight, dense or quantized, plus LoRA, in PEFT's shapes.

    A is a convolution of the base's kernel, stride, padding and dilation to ``rank`` channels. B is one of kernel 1
    from them to the output's channels, in the base's groups.

    Args:
        conv: the layer to adapt, which becomes ``base_layer``.
        rank, lora_alpha, lora_dropout, use_rslora, lora_dtype, freeze: as in :class:`~lowbit_lora.LoRALinear`.

    Raises:
        TypeError: ``conv`` is not the convolution that the class is for.
        ValueError: rank, lora_alpha or lora_dropout out of range; the rank is no multiple of the base's groups.
    """

    conv_type: type[nn.Module] = nn.Module

    def __init__(
        self,
        conv: nn.Module,
        *,
        rank: int | None = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype = torch.float32,
        freeze: bool = True,
    ):
        if not isinstance(conv, self.conv_type):
            raise TypeError(f"conv: expected a torch.nn.{self.conv_type.__name__}, got {type(conv).__name__}")
        super().__init__(conv)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        if rank is not None:
            self.add_adapter(DEFAULT, Adapter(rank, lora_alpha, lora_dropout, use_rslora), lora_dtype)
            self.set_active([DEFAULT])
        if freeze:
            conv.requires_grad_(False)

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether a module is such a convolution: also a subclass, if it computes what its base class does."""
        return isinstance(module, cls.conv_type) and type(module).forward is cls.conv_type.forward

    @property
    def weight(self) -> torch.Tensor:
        """The weight with the active adapters, for code that reads it instead of calling the layer."""
        return self.base_weight() if not self.active else self.merged_weight()

    def _new_factors(self, rank: int, **options) -> dict[str, nn.Module | nn.Parameter]:
        base = self.base_layer
        if rank % base.groups:
            raise ValueError(f"rank: expected a multiple of the convolution's groups={base.groups}, got {rank}")
        shape = {name: getattr(base, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        down = self.conv_type(self.in_channels, rank, bias=False, **shape, **options)
        up = self.conv_type(rank, self.out_channels, 1, groups=base.groups, bias=False, **options)
        return {"lora_A": down, "lora_B": up}

    def delta(self, name: str) -> torch.Tensor:
        """scaling * B A of an adapter in fp32, in the weight's shape; differentiable in A and B.

        Raises:
            ValueError: the convolution has groups: A reads all channels, which a weight in groups cannot.
        """
        if self.base_layer.groups > 1:
            raise ValueError(
                f"a convolution in groups={self.base_layer.groups} cannot hold LoRA in its weight; leave it wrapped"
            )
        lora_a, lora_b = self.factors(name)
        product = lora_b.float().flatten(1) @ lora_a.float().flatten(1)
        return self.adapters[name].scaling * product.view(self.base_layer.weight.shape)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[batch, in_channels, ...] -> [batch, out_channels, ...] in the dtype of the base's output."""
        y = self.base_layer(input)
        for name in self.computing():
            adapter, down, up = self.adapters[name], self.lora_A[name], self.lora_B[name]
            dropped = F.dropout(input, adapter.lora_dropout, self.training)
            with without_autocast(y.device):
                y = y + (adapter.scaling * up(down(dropped.to(down.weight.dtype)))).to(y.dtype)
        return y


class LoRAConv1d(LoRAConvNd):
    """nn.Conv1d with LoRA; see :class:`LoRAConvNd`."""

    conv_type = nn.Conv1d


class LoRAConv2d(LoRAConvNd):
    """nn.Conv2d with LoRA; see :class:`LoRAConvNd`."""

    conv_type = nn.Conv2d


class LoRAConv3d(LoRAConvNd):
    """nn.Conv3d with LoRA; see :class:`LoRAConvNd`."""

    conv_type = nn.Conv3d
