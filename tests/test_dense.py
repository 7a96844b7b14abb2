"""Dense frozen layers of a wrapped model: the same products and gradients as nn.Linear's, computed in fp32."""

import pytest
import torch
from cases import assert_within, product_tolerance
from torch import nn

from lowbit import QuantizedTensor
from lowbit.modules import FrozenLinear
from lowbit.ops import dense as dense_module
from lowbit.ops.dense import frozen_linear
from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch):
    """The fp32 path on every CPU, also where torch is fast in 16 bits."""
    monkeypatch.setattr(dense_module, "_slow_in_16_bits", lambda: True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 33])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (130, 64)])
def test_frozen_linear(dtype, rows, shape, monkeypatch):
    """A wrong logit or gradient here would train every layer below on noise."""
    monkeypatch.setattr(dense_module, "_PIECE", 64 * 48)  # several pieces, the last one short
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = shape
    sizes = ((rows, in_features), shape, (out_features,))
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    x.requires_grad_()
    bias.requires_grad_()
    y = frozen_linear(x, weight, bias)
    grad = torch.randn(y.shape, generator=generator).to(dtype)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad)
    assert y.dtype == grad_x.dtype == grad_bias.dtype == dtype

    x, weight, bias, grad = (tensor.detach().double() for tensor in (x, weight, bias, grad))
    exact, magnitude = x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()
    # Few rows are torch's own product, which may round the sum before it adds the bias.
    extra = torch.finfo(dtype).eps / 2 * magnitude if rows < 16 else 0.0
    assert_within(y.detach(), exact, product_tolerance(magnitude, exact, in_features + 1, dtype) + extra)
    exact, magnitude = grad @ weight, grad.abs() @ weight.abs()
    assert_within(grad_x, exact, product_tolerance(magnitude, exact, out_features, dtype))
    exact, magnitude = grad.sum(0), grad.abs().sum(0)
    assert_within(grad_bias, exact, product_tolerance(magnitude, exact, max(rows, 1), dtype))


class Tied(nn.Module):
    """An embedding and a head that share a weight, as in many language models."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


@pytest.mark.parametrize(("wrapper", "config"), [(QLoRAModel, QLoRAConfig), (LoraModel, LoraConfig)])
def test_a_wrapped_model_adopts_its_head_and_gives_it_back(wrapper, config):
    """Ties, results and the unloaded model's classes have to stay what they were."""
    torch.manual_seed(0)
    base = Tied().bfloat16()
    head, weight = base.head, base.head.weight
    model = wrapper(base, config(rank=2, target_modules=["body"]))
    assert type(base.head) is FrozenLinear and base.head is head
    assert base.head.weight is base.embed.weight is weight
    ids = torch.arange(40).view(2, 20)
    model(ids).float().square().sum().backward()
    _, lora_b = base.body.factors()
    assert bool(torch.isfinite(lora_b.grad).all()) and lora_b.grad.abs().sum() > 0
    plain = model.merge_and_unload()
    assert type(plain.head) is nn.Linear and plain.head.weight is plain.embed.weight
    assert base is plain
    assert all(type(module) is not FrozenLinear for module in plain.modules())


def test_a_weight_that_trains_is_left_to_torch():
    """The frozen product has no gradient for its weight: an unfrozen one must not come here."""
    layer = FrozenLinear(4, 3).bfloat16()
    layer(torch.ones(20, 4, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None


def test_a_quantized_layer_keeps_its_own_product():
    """It would be decoded piece by piece, which takes many times as long."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    wrapped = QLoRAModel(model, QLoRAConfig(target_modules=["0"]))
    assert type(wrapped.model[1]) is nn.Linear and isinstance(wrapped.model[1].weight, QuantizedTensor)
