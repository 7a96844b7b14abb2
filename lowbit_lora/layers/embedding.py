"""LoRA on embeddings, whose table may be dense or quantized."""

import torch
import torch.nn.functional as F
from torch import nn

from lowbit.functional import check_sizes
from lowbit.ops import lora

from .base import Adapter, LoRABaseLayer, stored


class LoRAEmbedding(LoRABaseLayer):
    """nn.Embedding with a frozen table, dense or quantized, plus LoRA: row i of the table gains scaling * B A[:, i].

    A is [rank, num_embeddings] and begins at zero, B is [embedding_dim, rank]: the rows that a batch uses are looked up
    in A, and multiplied by B. lora_dropout has no place in a look-up and is not applied, as in PEFT.
    """

    base_type = nn.Embedding
    out_dim = 1

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Also a subclass that only multiplies the rows by its ``embed_scale``."""
        is_plain = super().takes(module) or hasattr(module, "embed_scale")
        return is_plain and isinstance(module, nn.Embedding) and module.max_norm is None

    def _setup(self) -> None:
        self.num_embeddings, self.embedding_dim = self.base_layer.num_embeddings, self.base_layer.embedding_dim
        del self.lora_A, self.lora_B
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()

    def _new_factors(self, adapter: Adapter, **options) -> dict[str, nn.Module | nn.Parameter]:
        if adapter.lora_bias:
            raise ValueError("lora_bias: expected False for an embedding, whose factors have no bias")
        lora_a = torch.empty(adapter.rank, self.num_embeddings, **options)
        lora_b = torch.empty(self.embedding_dim, adapter.rank, **options)
        return {"lora_embedding_A": nn.Parameter(lora_a), "lora_embedding_B": nn.Parameter(lora_b)}

    def factors(self, name: str | None = None) -> tuple[nn.Parameter, nn.Parameter]:
        name = self._only_active() if name is None else name
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    @torch.no_grad()
    def reset_lora_parameters(self, name: str | None = None, method: str = "default") -> None:
        """By default A is zeros and B normal random values, so that nothing is added yet."""
        if method != "default":
            return super().reset_lora_parameters(name, method)
        lora_a, lora_b = self.factors(name)
        nn.init.zeros_(lora_a)
        nn.init.normal_(lora_b)

    def _added(self, input: torch.Tensor, name: str) -> torch.Tensor:
        base, (lora_a, lora_b) = self.base_layer, self.factors(name)
        rows = F.embedding(input, lora_a.T, base.padding_idx, sparse=base.sparse)
        scale = self.adapters[name].scaling * getattr(base, "embed_scale", 1.0)
        return lora.up(rows * scale, lora_b, self.stored_weight.dtype)


class QLoRAEmbedding(LoRAEmbedding):
    """A LoRAEmbedding on a random table as nn.Embedding's, which is stored in 4 bits or in 8.

    The first arguments are nn.Embedding's; ``dtype`` is that of the decoded rows: float32, float16 or bfloat16. The
    options are those of LoRABaseLayer and, of :class:`~lowbit_lora.QLoRAConfig`, quantization, double_quant, block_size
    and scale. An argument out of range is a TypeError or a ValueError.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device=None,
        dtype=None,
        **options,
    ):
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        embedding = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        embedding = stored(embedding, options)
        super().__init__(embedding, **options)
