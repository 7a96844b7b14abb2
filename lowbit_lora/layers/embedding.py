"""LoRA on embeddings, whose table may be dense or quantized."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lowbit

from ..config import QLoRAConfig, QuantizationType
from .base import DEFAULT, Adapter, LoRABaseLayer, without_autocast


class LoRAEmbedding(LoRABaseLayer):
    """nn.Embedding with a frozen table, dense or quantized, plus LoRA: row i of the table gains scaling * B A[:, i].

    A is [rank, num_embeddings] and begins at zero, B is [embedding_dim, rank]: the rows that a batch uses are looked up
    in A, and multiplied by B. lora_dropout has no place in a look-up and is not applied, as in PEFT.

    Args:
        embedding: the layer to adapt, which becomes ``base_layer``.
        rank, lora_alpha, lora_dropout, use_rslora, lora_dtype, freeze: as in :class:`~lowbit_lora.LoRALinear`.

    Raises:
        TypeError: ``embedding`` is not an nn.Embedding.
        ValueError: rank, lora_alpha or lora_dropout out of range.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        *,
        rank: int | None = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype = torch.float32,
        freeze: bool = True,
    ):
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding: expected a torch.nn.Embedding, got {type(embedding).__name__}")
        super().__init__(embedding)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        if rank is not None:
            self.add_adapter(DEFAULT, Adapter(rank, lora_alpha, lora_dropout, use_rslora), lora_dtype)
            self.set_active([DEFAULT])
        if freeze:
            embedding.requires_grad_(False)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is an embedding: also a subclass that only multiplies the rows by its ``embed_scale``."""
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            return False
        return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")

    bias = None  # an embedding has none

    @property
    def weight(self) -> torch.Tensor:
        """The table with the active adapters, for code that reads it, such as an output layer that is tied to it."""
        return self.merged_weight()

    def _new_factors(self, rank: int, **options) -> dict[str, nn.Module | nn.Parameter]:
        return {
            "lora_embedding_A": nn.Parameter(torch.empty(rank, self.num_embeddings, **options)),
            "lora_embedding_B": nn.Parameter(torch.empty(self.embedding_dim, rank, **options)),
        }

    def _parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        return {kind: getattr(self, kind)[name] for kind in ("lora_embedding_A", "lora_embedding_B")}

    @torch.no_grad()
    def reset_lora_parameters(self, name: str | None = None, method: str = "default") -> None:
        """Fill the factors: by default A with zeros and B with normal random values, so that nothing is added yet."""
        if method != "default":
            return super().reset_lora_parameters(name, method)
        lora_a, lora_b = self.factors(name)
        nn.init.zeros_(lora_a)
        nn.init.normal_(lora_b)

    def delta(self, name: str) -> torch.Tensor:
        """scaling * B A of an adapter in fp32, in the table's shape; differentiable in A and B."""
        lora_a, lora_b = self.factors(name)
        return self.adapters[name].scaling * (lora_b.float() @ lora_a.float()).T

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Ids [...] -> rows [..., embedding_dim] in the dtype of the table."""
        base = self.base_layer
        y = base(input)
        scale = getattr(base, "embed_scale", 1.0)
        for name in self.computing():
            lora_a, lora_b = self.factors(name)
            rows = F.embedding(input, lora_a.T, base.padding_idx, sparse=base.sparse)
            with without_autocast(y.device):
                y = y + (F.linear(rows, lora_b) * (self.adapters[name].scaling * scale)).to(y.dtype)
        return y


class QLoRAEmbedding(LoRAEmbedding):
    """A LoRAEmbedding on a random table as nn.Embedding's, which is stored in 4 bits or in 8.

    Args:
        num_embeddings, embedding_dim, padding_idx, device: as nn.Embedding.
        dtype: of the decoded rows; float32, float16 or bfloat16.
        options: quantization, double_quant, block_size and scale of :class:`~lowbit_lora.QLoRAConfig`; rank and the
            other arguments of :class:`LoRAEmbedding`.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        for name, size in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {size!r}")
        self._quantize(nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype), **options)

    def _quantize(
        self,
        embedding: nn.Embedding,
        quantization: QuantizationType | str = QuantizationType.NF4,
        double_quant: bool = True,
        block_size: int = 64,
        scale: str = "absmax",
        **lora: Any,
    ) -> None:
        stored = QLoRAConfig(quantization=quantization, double_quant=double_quant, block_size=block_size, scale=scale)
        table = lowbit.quantize(embedding.weight.detach(), **stored.quantize_options())
        embedding.weight = nn.Parameter(table, requires_grad=False)
        super().__init__(embedding, **lora)
