"""LoRA on nn.MultiheadAttention, whose weights may be dense or quantized."""

from typing import Any

import torch
from torch import nn

from lowbit.adapted import standing_in

from ..config import check_unset
from .base import Adapter
from .linear import LoRALinear
from .parameter import LoRAParameter, product_weight


class Twice(Adapter):
    """The settings of an adapter whose scaling counts twice."""

    times = 2


class OutputProjection(LoRALinear):
    """The projection of an attention's output with LoRA: W + 2 * scaling * B A.

    PEFT, up to 0.21.2, adds this part twice (github.com/huggingface/peft/pull/3774), in what it computes and merges.
    Its adapters were trained so: here they compute the same, and ours do in PEFT.
    """

    adapter_type = Twice

    def config_name(self, name: str) -> str:
        """The attention's name, which stands for both of its layers."""
        return name.removesuffix(".base_layer.out_proj")


class LoRAMultiheadAttention(LoRAParameter):
    """nn.MultiheadAttention with LoRA on its packed projection (A [rank, embed_dim], B [3 * embed_dim, rank]) and on
    its output's projection, as in PEFT.

    torch's own forward computes. Its fused paths of inference, which know no LoRA, decline. The output's projection is
    a layer of its own, ``out_proj``, with adapters of the same names. Unlike in PEFT lora_dropout counts, except in
    compiled code, which merges. There is no use_dora and no lora_bias.

    Raises:
        TypeError, ValueError: as LoRABaseLayer; separate projections of keys and values (``kdim``, ``vdim``).
    """

    base_type = nn.MultiheadAttention
    weight_name = "in_proj_weight"

    def __init__(self, base_layer: nn.MultiheadAttention, **options: Any):
        super().__init__(base_layer, **options)
        self.out_proj = OutputProjection(base_layer.out_proj, **options)

    @classmethod
    def _check_base(cls, module: nn.Module) -> None:
        super()._check_base(module)
        if module.in_proj_weight is None:
            raise ValueError(
                f"base_layer: expected keys and values of embed_dim={module.embed_dim}, whose projections are one "
                f"weight, got kdim={module.kdim} and vdim={module.vdim}"
            )

    def nested(self) -> dict[str, OutputProjection]:
        return {"base_layer.out_proj": self.out_proj}

    def _new_factors(self, adapter: Adapter, **options) -> dict[str, nn.Module | nn.Parameter]:
        check_unset(adapter, ("use_dora", "lora_bias"), "a torch.nn.MultiheadAttention")
        return self._linear_factors(self.stored_weight.shape, adapter.rank, **options)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if torch.compiler.is_compiling():
            weights = {self.weight_name: self.merged_weight(), "out_proj.weight": self.out_proj.merged_weight()}
            return torch.func.functional_call(self.base_layer, weights, args, kwargs)
        packed, projection = product_weight(self), self.base_layer.out_proj
        standing = standing_in(projection, "weight", product_weight(self.out_proj))
        with standing, standing_in(self.base_layer, self.weight_name, packed):
            return self.base_layer.forward(*args, **kwargs)
