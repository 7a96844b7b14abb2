"""Embeddings, convolutions and transformers' Conv1D with LoRA: against dense arithmetic, and against PEFT's files."""

import copy

import pytest
import torch
from conftest_models import llama, randomize
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit_lora import (
    LoRABaseLayer,
    LoraConfig,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAEmbedding,
    LoRALinear,
    LoraModel,
    QLoRAConfig,
    QLoRAEmbedding,
    QLoRAModel,
)
from lowbit_lora.layers import Adapter, layer_class

IDS = torch.tensor([[0, 3, 9], [9, 1, 2]])


class Mixed(nn.Module):
    """A layer of each kind."""

    def __init__(self, groups: int = 1, **conv):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        self.table = nn.Embedding(10, 16, padding_idx=3)
        self.conv1d = transformers.pytorch_utils.Conv1D(24, 16)
        self.one = nn.Conv1d(24, 8, 3, padding=1, **conv)
        self.two = nn.Conv2d(1, 4, (3, 2), stride=(1, 2), groups=1, padding=1, **conv)
        self.three = nn.Conv3d(4, 4, 1, groups=groups)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids [batch, length] -> [batch, 2]."""
        x = self.conv1d(self.table(ids))
        x = self.two(torch.tanh(self.one(x.transpose(1, 2))).unsqueeze(1))
        return self.head(self.three(torch.tanh(x).unsqueeze(2)).flatten(2).mean(2))


TARGETS = ["table", "conv1d", "one", "two", "three"]


def mixed(**options) -> Mixed:
    torch.manual_seed(0)
    return Mixed(**options).eval()


def randomized(wrapped):
    """Random factors: a zero hides an adapter that computes nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return wrapped


@pytest.mark.parametrize("conv", [{}, {"padding_mode": "reflect"}, {"bias": False}], ids=str)
def test_merged_weights_compute_the_same(conv):
    """What a merged model computes, and so what is deployed, would be another model."""
    wrapped = randomized(LoraModel(mixed(**conv), LoraConfig(rank=4, target_modules=TARGETS)))
    kinds = {type(layer) for layer in wrapped.model.modules() if isinstance(layer, LoRABaseLayer)}
    assert kinds == {LoRAEmbedding, LoRALinear, LoRAConv1d, LoRAConv2d, LoRAConv3d}
    with torch.no_grad():
        before, base = wrapped(IDS), mixed(**conv)(IDS)
        assert (before - base).abs().max() > 0.01
        wrapped.merge_adapter()
        torch.testing.assert_close(wrapped(IDS), before, rtol=1e-4, atol=1e-5)
        wrapped.unmerge_adapter()
        assert torch.equal(wrapped(IDS), before)
        torch.testing.assert_close(wrapped.merge_and_unload()(IDS), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kind", [(nn.Conv1d, LoRAConv1d), (nn.Conv2d, LoRAConv2d), (nn.Conv3d, LoRAConv3d)], ids=str)
def test_convolutions_with_strides_and_dilation(kind, dilation):
    """A takes its stride, padding and dilation from the base; with others shapes or pixels would not meet."""
    conv_type, layer_type = kind
    dimensions = int(conv_type.__name__[4])
    torch.manual_seed(0)
    conv = conv_type(3, 5, 3, stride=2, padding=2, dilation=dilation, padding_mode="circular")
    layer = randomized(layer_type(conv, rank=2))
    x = torch.randn(2, 3, *[9] * dimensions, requires_grad=True)
    merged = copy.deepcopy(conv)
    merged.weight = nn.Parameter(layer.merged_weight().detach())
    torch.testing.assert_close(layer(x), merged(x), rtol=1e-4, atol=1e-5)
    layer(x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.factors()) and conv.weight.grad is None


def test_a_convolution_in_groups_trains_and_does_not_merge():
    """PEFT's factors read all channels, which a weight in groups cannot: a silent merge would be another model."""
    layer = randomized(LoRAConv2d(nn.Conv2d(4, 8, 3, groups=2), rank=4))
    layer(torch.randn(1, 4, 5, 5)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.factors())
    with pytest.raises(ValueError, match="groups=2"):
        layer.merge()
    assert layer.weight.shape == layer.base_layer.weight.shape  # read, not computed with
    with pytest.raises(ValueError, match="groups=2"):
        layer.weight.sum()
    with pytest.raises(ValueError, match="multiple of the convolution's groups=2, got 3"):
        LoRAConv2d(nn.Conv2d(4, 8, 3, groups=2), rank=3)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_peft_computes_the_same_from_our_file(tmp_path, groups, use_dora):
    """Adapters move between the libraries, for each kind of layer."""
    peft = pytest.importorskip("peft")
    config = LoraConfig(rank=4, target_modules=TARGETS, use_rslora=True, use_dora=use_dora)
    wrapped = randomized(LoraModel(mixed(groups=groups), config))
    wrapped.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(mixed(groups=groups), tmp_path)
    torch.testing.assert_close(wrapped(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)


def test_we_compute_the_same_from_pefts_file(tmp_path):
    """The other way round; PEFT also writes settings that we do not."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    theirs = peft.get_peft_model(mixed(), config)
    theirs.save_pretrained(tmp_path)
    ours = LoraModel.from_pretrained(mixed(), tmp_path)
    torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)


def test_quantized_embedding():
    """The table is stored in 4 bits, only the rows of a batch are decoded, and LoRA trains on them."""
    torch.manual_seed(0)
    layer = randomized(QLoRAEmbedding(50, 64, rank=4, dtype=torch.bfloat16))
    table = layer.base_layer.weight
    assert isinstance(table, QuantizedTensor) and table.spec.double_quant
    y = layer(IDS)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 64)
    expected = layer.merged_weight()[IDS].float()
    assert (y.float() - expected).abs().max() <= 3 * 2**-9 * expected.abs().max()
    y.float().sum().backward()
    lora_a, _ = layer.factors()
    assert lora_a.grad[:, IDS.flatten()].abs().min() > 0 and lora_a.grad[:, 4].abs().max() == 0
    for wrong in ({"num_embeddings": 0}, {"embedding_dim": 2.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected an int of at least 1"):
            QLoRAEmbedding(**({"num_embeddings": 5, "embedding_dim": 4} | wrong))


def test_a_scaled_embedding_scales_its_adapter():
    """Gemma multiplies the rows: an adapter beside that would be too small by the square root of the width."""
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    base = gemma.Gemma3TextScaledWordEmbedding(10, 16, 0, embed_scale=4.0)
    layer = randomized(LoRAEmbedding(base, rank=4))
    with torch.no_grad():
        before = layer(IDS)
        torch.testing.assert_close(layer.merge()(IDS), before, rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_changes_nothing():
    """Training begins at the base model."""
    wrapped = LoraModel(mixed(), LoraConfig(rank=4, target_modules=TARGETS))
    assert torch.equal(wrapped(IDS), mixed()(IDS))


def test_qlora_keeps_what_it_does_not_store():
    """QLoRA stores linear weights in 4 bits; embeddings and convolutions with LoRA stay dense unless asked for."""
    wrapped = randomized(QLoRAModel(mixed(), QLoRAConfig(rank=4, target_modules=TARGETS)))
    stored = {name for name, p in wrapped.named_parameters() if isinstance(p, QuantizedTensor)}
    assert "model.conv1d.base_layer.weight" in stored and len(stored) == 2  # Conv1D and the plain head
    merged = copy.deepcopy(wrapped).merge_and_unload()
    torch.testing.assert_close(merged(IDS), wrapped(IDS), rtol=1e-4, atol=1e-5)


def test_tied_embeddings_are_adapted_where_they_are_named():
    """The head of a tied model reads the table itself: LoRA on the look-up leaves it alone."""
    wrapped = randomize(LoraModel(llama(tied=True), LoraConfig(target_modules=["embed_tokens"])))
    model = wrapped.get_base_model()
    assert model.lm_head.weight is model.model.embed_tokens.base_layer.weight


def test_subclasses_that_compute_something_else_are_no_layers():
    """LoRA would add its product to something that is no product."""

    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Named(nn.Linear):
        pass

    assert layer_class(Named(2, 2)) is LoRALinear
    assert layer_class(Scaled(2, 2)) is None and layer_class(nn.Embedding(2, 2, max_norm=1.0)) is None
    assert layer_class(nn.ConvTranspose1d(2, 2, 1)) is None and layer_class(nn.LayerNorm(2)) is None


@pytest.mark.parametrize("layer", [LoRALinear, LoRAEmbedding, LoRAConv1d, LoRAConv2d, LoRAConv3d])
def test_another_kind_of_base_is_refused(layer):
    """The message names what came."""
    with pytest.raises(TypeError, match="LayerNorm"):
        layer(nn.LayerNorm(4))


def test_adapters_of_one_layer():
    """The layer alone, as in a model of one's own."""
    layer = LoRALinear(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'default'"):
        layer.add_adapter("default", Adapter())
    layer.add_adapter("b", Adapter(rank=2))
    with pytest.raises(ValueError, match="neither active nor merged"):
        layer.delete_adapter("default")
    layer.set_active(["default", "b"])
    with pytest.raises(ValueError, match="2 are active"):
        layer.factors()
    layer.set_active([])
    x = torch.randn(2, 4)
    assert torch.equal(layer(x), layer.base_layer(x)) and lowbit is not None


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_initialisations_begin_at_the_base(init):
    """Training begins at the base model, and with gradients for one factor at least."""
    torch.manual_seed(0)
    wrapped = LoraModel(mixed(), LoraConfig(rank=4, target_modules=TARGETS, init_lora_weights=init))
    torch.testing.assert_close(wrapped(IDS), mixed()(IDS), rtol=1e-5, atol=1e-6)
    wrapped(IDS).sum().backward()
    for layer in [module for module in wrapped.model.modules() if isinstance(module, LoRABaseLayer)]:
        assert max(p.grad.abs().max() for p in layer.factors()) > 0


def test_random_factors_change_the_model():
    """PEFT's init_lora_weights=False is for tests, which would otherwise test an adapter of zeros."""
    wrapped = LoraModel(mixed(), LoraConfig(rank=4, target_modules=TARGETS, init_lora_weights="random"))
    assert (wrapped(IDS) - mixed()(IDS)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="init_lora_weights: expected one of default, .*'pisa'"):
        LoraConfig(init_lora_weights="pisa")
    with pytest.raises(ValueError, match="even ranks"):
        LoraConfig(rank=3, init_lora_weights="orthogonal")


def test_hooks_fire_once():
    """A hook that changes an output would change it twice: base and layer share their hooks."""
    model, seen = mixed(), []
    for name in TARGETS:
        getattr(model, name).register_forward_hook(lambda module, args, y, name=name: seen.append(name))
    wrapped = LoraModel(model, LoraConfig(rank=4, target_modules=TARGETS))
    wrapped(IDS)
    wrapped(IDS, adapter_names=["default", "__base__"])
    with wrapped.disable_adapter():
        wrapped(IDS)
    wrapped.merge_adapter()
    wrapped(IDS)
    assert seen == TARGETS * 4
