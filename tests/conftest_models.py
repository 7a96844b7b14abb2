"""Tiny models for the tests of lowbit_lora, with random weights from a seed. They need no file and no network."""

import copy

import pytest
import torch
from torch import nn

from lowbit import QuantizedTensor

IDS = torch.arange(21).reshape(3, 7) % 50
LABELS = torch.tensor([0, 1, 1])


class Mlp(nn.Module):
    """A plain model without anything of Hugging Face: two blocks that share one layer, and a head."""

    def __init__(self, width: int = 40):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width, bias=False)
        self.shared = self.first
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.shared(torch.tanh(self.second(self.first(x))))))


def mlp(seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    return Mlp()


def bert(seed: int = 0):
    """BertForSequenceClassification without dropout, in eval mode."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).eval()


def llama(seed: int = 0, tied: bool = False, **config):
    """LlamaForCausalLM in eval mode; ``config`` replaces what a LlamaConfig has here."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "vocab_size": 50,
        "tie_word_embeddings": tied,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | config)).eval()


def decoded(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or the decoded weight of a quantized one."""
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def snapshot(model: nn.Module) -> dict:
    """All that a failed conversion must leave alone: values, flags, module types, Parameter objects."""
    return {
        "state": {key: decoded(value).clone() for key, value in model.state_dict().items()},
        "parameters": {name: (id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


def assert_untouched(model: nn.Module, before: dict) -> None:
    """Assert that the model is what ``snapshot`` saw."""
    after = snapshot(model)
    for key, value in before.pop("state").items():
        assert torch.equal(value.nan_to_num(7.5), after["state"][key].nan_to_num(7.5)), key
    after.pop("state")
    assert after == before


def train(wrapper: nn.Module, steps: int = 2, seed: int = 0) -> list[float]:
    """Do a few steps of AdamW on the model's own task; return the loss before each and at the end."""
    torch.manual_seed(seed)
    labels = LABELS if hasattr(wrapper.get_base_model(), "classifier") else IDS
    optimizer = torch.optim.AdamW(wrapper.trainable_parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = wrapper(input_ids=IDS, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(wrapper(input_ids=IDS, labels=labels).loss.item())
    return losses


def logits(model: nn.Module) -> torch.Tensor:
    """The model's logits on the fixed input."""
    with torch.no_grad():
        return model(input_ids=IDS).logits


def randomize(wrapper: nn.Module, seed: int = 0) -> nn.Module:
    """Fill B with random values: a B of zero hides a LoRA that computes nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapper.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return wrapper


def assert_as_precise(actual: torch.Tensor, model: nn.Module, run) -> None:
    """``actual`` is what ``model`` computes, up to roundings: ``run(model)`` in fp64 is the truth, and its error in the
    model's own precision the measure. The largest of many such errors varies; 4 of the model's are allowed.
    """
    exact = run(copy.deepcopy(model).double())
    own = (run(model).double() - exact).abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= 4 * own, f"off by {error:.3g}, where the model itself is by {own:.3g}"
