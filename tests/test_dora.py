"""DoRA and B's bias: what PEFT computes, from norms that never form the weight."""

import copy

import pytest
import torch
from conftest_models import bert, logits, randomize, train
from torch import nn

import lowbit
from lowbit_lora import LoRABaseLayer, LoraConfig, LoraModel, QLoRAConfig, QLoRAModel
from lowbit_lora.layers import layer_class

kinds = pytest.mark.parametrize(("model_type", "config_type"), [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)])
SPEC = lowbit.WeightSpec()


def stored(module):
    """The module with its weight in 4 bits."""
    module.weight = nn.Parameter(lowbit.quantize(module.weight.detach()), requires_grad=False)
    return module


bases = pytest.mark.parametrize(
    ("base", "x"),
    [
        (lambda: nn.Linear(64, 24), torch.randn(5, 64)),
        (lambda: stored(nn.Linear(64, 24)), torch.randn(2, 5, 64)),
        (lambda: nn.Linear(64, 24, bias=False).bfloat16(), torch.randn(5, 64).bfloat16()),
        (lambda: nn.Embedding(30, 64), torch.arange(12).view(3, 4)),
        (lambda: stored(nn.Embedding(30, 64)), torch.arange(12).view(3, 4)),
        (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), torch.randn(2, 4, 9, 9)),
        (lambda: nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
    ],
    ids=["linear", "linear-4bit", "linear-bf16", "embedding", "embedding-4bit", "conv2d", "conv1d"],
)


def layer_of(base, **options):
    torch.manual_seed(0)
    base = base()
    layer = layer_class(base)(base, rank=4, use_dora=True, **options).eval()
    with torch.no_grad():
        for factor in layer.factors():
            factor.normal_(std=0.3)
        layer.lora_magnitude_vector["default"].mul_(1.5)
    return layer


@bases
def test_norms_are_those_of_the_sum(base, x):
    """The norms come from products with the packed weight: a wrong one would scale a feature wrongly."""
    layer = layer_of(base)
    total = layer.base_weight(torch.float32).double() + layer.product("default").double()
    rows = total.T if layer.out_dim else total.flatten(1)
    torch.testing.assert_close(layer.row_norms("default").double(), rows.norm(dim=1), rtol=1e-5, atol=1e-6)


@bases
def test_the_forward_is_the_merged_weights(base, x):
    """magnitude * (W + s B A) / norm, and the base's bias, which DoRA does not scale."""
    layer = layer_of(base)
    y = layer(x)
    expected = copy.deepcopy(layer)
    expected.merge()
    low = y.dtype == torch.bfloat16
    torch.testing.assert_close(expected(x), y, rtol=2e-2 if low else 1e-5, atol=5e-2 if low else 1e-5)
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer(x), y)


@bases
def test_a_new_adapter_changes_nothing(base, x):
    """Training would start from another model."""
    torch.manual_seed(0)
    base = base()
    layer = layer_class(base)(base, rank=4, use_dora=True)
    low = layer.base_layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), base(x), rtol=1e-2 if low else 1e-5, atol=1e-2 if low else 1e-6)
    assert layer.lora_magnitude_vector["default"].dtype == torch.float32


@bases
def test_gradients_are_those_of_the_definition(base, x):
    """Magnitudes and factors would be trained on something else; the norm counts as a constant, as in the paper."""
    layer = layer_of(base)
    y = layer(x)
    if y.dtype == torch.bfloat16:
        pytest.skip("compared in fp32")
    own = [*layer.factors(), layer.lora_magnitude_vector["default"]]
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, own, grad)
    base_layer = copy.deepcopy(layer.base_layer)
    weight = layer.base_weight(torch.float32) + layer.delta("default")
    arguments = {} if layer.bias is None else {"bias": layer.bias.detach()}
    expected = torch.func.functional_call(base_layer, {"weight": weight, **arguments}, (x,))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, own, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_models_train(model_type, config_type, dropout):
    """DoRA would not lower the loss, or leave the magnitudes as they are."""
    wrapped = model_type(bert(), config_type(rank=4, use_dora=True, lora_dropout=dropout)).train()
    before = {n: p.clone() for n, p in wrapped.named_parameters() if "magnitude" in n}
    losses = train(wrapped)
    assert losses[-1] < losses[0]
    assert before and all(not torch.equal(dict(wrapped.named_parameters())[n], p) for n, p in before.items())


def test_magnitudes_of_a_quantized_base_are_those_of_the_stored_weight():
    """Norms of the weight before quantization would change the model at the first step."""
    wrapped = QLoRAModel(bert(), QLoRAConfig(use_dora=True))
    layers = [module for module in wrapped.modules() if isinstance(module, LoRABaseLayer)]
    for layer in layers:
        norms = layer.base_weight(torch.float32).norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"], norms, rtol=1e-5, atol=1e-6)


@kinds
def test_beside_another_adapter(model_type, config_type):
    """With a plain adapter active too, both parts are added."""
    wrapped = model_type(bert(), config_type(target_modules=["query"], use_dora=True, modules_to_save=[]))
    wrapped.add_adapter("plain", LoraConfig(target_modules=["query", "value"], lora_bias=True, modules_to_save=[]))
    randomize(wrapped)
    wrapped.set_adapter(["default", "plain"])
    expected = logits(wrapped)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), expected, rtol=1e-4, atol=1e-5)


def test_a_bias_of_b_is_added_and_merged():
    """B's bias would be lost: a layer without a bias gains one when it is merged."""
    for bias in (True, False):
        layer = layer_class(nn.Linear(8, 3))(nn.Linear(8, 3, bias=bias), rank=2, lora_bias=True)
        nn.init.normal_(layer.lora_B["default"].bias)
        x = torch.randn(4, 8)
        y = layer(x)
        expected = layer.base_layer(x) + layer.adapter.scaling * layer.lora_B["default"].bias
        torch.testing.assert_close(y, expected)
        layer.merge()
        torch.testing.assert_close(layer(x), y)
        layer.unmerge()
        assert (layer.base_layer.bias is None) is not bias and torch.equal(layer(x), y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoraConfig(use_dora=True, lora_bias=True), "lora_bias"),
        (
            lambda: LoraModel(nn.Sequential(nn.Embedding(4, 4)), LoraConfig(target_modules=["0"], lora_bias=True)),
            "bias",
        ),
        (lambda: rows_of_dora(), "DoRA"),
    ],
)
def test_what_does_not_go_together_is_told(call, message):
    """It would be computed without one of the two."""
    with pytest.raises(ValueError, match=message):
        call()


def rows_of_dora():
    wrapped = LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], use_dora=True))
    wrapped(torch.randn(2, 4), adapter_names=["default", "__base__"])
