"""Tiny models in folders, for the tests of lowbit in transformers."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit import QuantizedTensor

transformers = pytest.importorskip("transformers")

IDS = torch.arange(3, 17).reshape(2, 7)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MIXTRAL = SIZES | {"num_local_experts": 4}
GPT2 = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}


def save_dense(folder: Path, name: str = "LlamaForCausalLM", dtype=torch.bfloat16, shards="50GB", **config) -> Path:
    """The folder, with a model of that class and random weights in it."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    cls(cls.config_class(**config or SIZES)).to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def stored(model: nn.Module) -> dict[str, QuantizedTensor]:
    """The quantized weights by name, one of a shared pair."""
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Every tensor of two models is the same, bit for bit, and stored in the same way."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_same_tensor(tensor, theirs[name], name)


def assert_same_tensor(one: torch.Tensor, other: torch.Tensor, name: str) -> None:
    assert type(one) is type(other) and one.dtype == other.dtype, name
    if isinstance(one, QuantizedTensor):
        assert repr(one) == repr(other), name
        for part, twin in zip(one.parts(), other.parts(), strict=True):
            assert (part is None and twin is None) or torch.equal(part, twin), name
    else:
        assert torch.equal(one, other), name


def load(folder: Path, cls: str = "AutoModelForCausalLM", **options) -> nn.Module:
    """The model of a folder; every key of it has found its place, and every parameter its key."""
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model
