"""nn.MultiheadAttention with LoRA: against merged weights in torch's own forward, and against PEFT's files."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit import QuantizedTensor, WeightSpec
from lowbit.adapted import ProductWeight
from lowbit.quantizers.quantize import quantize_to
from lowbit_lora import LoraConfig, LoRALinear, LoraModel, LoRAMultiheadAttention, QLoRAConfig, QLoRAModel

WIDTH, HEADS = 32, 4
TARGETS = ["self_attn", "multihead_attn"]
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


class Translator(nn.Module):
    """An encoder and a decoder of torch: attention of a sequence with itself, and of one with another."""

    def __init__(self):
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 64, **options), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 64, **options), 1)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """[batch, length, WIDTH] -> the same."""
        memory = self.encoder(x, src_key_padding_mask=padding)
        return self.decoder(x, memory, memory_key_padding_mask=padding)


def translator() -> Translator:
    torch.manual_seed(0)
    return Translator().eval()


def randomized(wrapped: nn.Module, seed: int = 1) -> nn.Module:
    """Random factors: a zero hides an adapter that computes nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return wrapped


def wrapped_translator(quantized: bool = False, **options) -> LoraModel:
    kind, config = (QLoRAModel, QLoRAConfig) if quantized else (LoraModel, LoraConfig)
    return randomized(kind(translator(), config(**{"rank": 4, "target_modules": TARGETS} | options)))


def inputs(*shape: int) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(*(shape or (2, 5, WIDTH)))


def attention(spec: WeightSpec | None = None, **options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    with torch.no_grad():
        for bias in (module.in_proj_bias, module.out_proj.bias):
            if bias is not None:
                bias.normal_(std=0.1)
    if spec is not None:
        for owner, key in ((module, "in_proj_weight"), (module.out_proj, "weight")):
            quantized = quantize_to(owner._parameters[key].detach(), spec, "absmax")
            owner._parameters[key] = nn.Parameter(quantized, requires_grad=False)
    return module


def plain(layer: LoRAMultiheadAttention) -> nn.MultiheadAttention:
    """torch's module with the sums W + scaling * B A, formed in fp32 from the definition, as its dense weights."""
    module = copy.deepcopy(layer.base_layer)
    for owner, key, part, scaling in (
        (module, "in_proj_weight", layer, 2),
        (module.out_proj, "weight", layer.out_proj, 4),
    ):
        lora_a, lora_b = part.factors()
        del owner._parameters[key]
        setattr(owner, key, (part.base_weight(torch.float32) + scaling * lora_b @ lora_a).to(lora_a.dtype))
    return module


CALLS = {
    "self": ({}, 1, {}),
    "self, batch first": ({"batch_first": True}, 1, {"need_weights": False}),
    "self, causal": ({}, 1, {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True, "need_weights": False}),
    "padding and weights of each head": ({}, 1, {"key_padding_mask": PADDING.T[:2, :5], "average_attn_weights": False}),
    "keys are values": ({"batch_first": True}, 2, {"attn_mask": torch.linspace(-1, 1, 15).view(3, 5)}),
    "all differ": ({"add_bias_kv": True, "add_zero_attn": True}, 3, {}),
    "no bias, not batched": ({"bias": False}, 0, {}),
}


@pytest.mark.parametrize("spec", [None, WeightSpec(), WeightSpec("int8"), WeightSpec(block_size=4096)])
@pytest.mark.parametrize("call", CALLS)
def test_it_computes_and_trains_as_merged_weights_do(call, spec, monkeypatch):
    """Each way of calling multiplies by other pieces of the packed weight; one without LoRA would be another model."""
    options, different, keywords = CALLS[call]
    layer = randomized(LoRAMultiheadAttention(attention(spec, **options), rank=8, lora_alpha=16))
    x, y, z = inputs(3, 5, 2, WIDTH).requires_grad_()
    if "batch_first" in options:
        x, y, z = x.transpose(0, 1), y.transpose(0, 1), z.transpose(0, 1)
    if different == 0:
        x = x[:, 0]
    arguments = {0: (x, x, x), 1: (x, x, x), 2: (x[:, :3], y, y), 3: (x, y, z)}[different]
    if "key_padding_mask" in keywords:
        keywords = {**keywords, "key_padding_mask": PADDING}
    expected, their_weights = plain(layer)(*arguments, **keywords)
    monkeypatch.setattr(ProductWeight, "merged", None)  # the dense sum is not formed
    output, weights = layer(*arguments, **keywords)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert (weights is None) == (their_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, their_weights, rtol=1e-4, atol=1e-5)
    of = [*layer.factors(), *layer.out_proj.factors(), arguments[0]]
    ours = torch.autograd.grad(output.square().sum(), of)
    theirs = torch.autograd.grad(expected.square().sum(), of)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("quantized", [False, True])
def test_fused_inference_does_not_pass_lora_by(quantized):
    """torch's encoder layers compute in one kernel in eval mode, from the weights: predictions would be the base's."""
    model, x = wrapped_translator(quantized), inputs()
    trained = model(x, PADDING)
    with torch.no_grad():
        torch.testing.assert_close(model(x, PADDING), trained.detach(), rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            base = model(x, PADDING)
        assert (base - trained).abs().max() > 0.1
        model.merge_adapter()
        torch.testing.assert_close(model(x, PADDING), trained, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x, PADDING), trained, rtol=1e-4, atol=1e-5)
    trained.square().mean().backward()
    assert len(model.trainable_parameters()) == 2 * 2 * 4
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.trainable_parameters())
    before = {name: p for name, p in translator().named_parameters()}
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x, PADDING), trained, rtol=1e-4, atol=1e-5)
    assert {name: p.shape for name, p in merged.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert type(merged.encoder.layers[0].self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_files_go_both_ways_with_peft(tmp_path, bias):
    """An adapter of one library would be another function in the other.

    PEFT 0.21.2 adds the output projection's part twice; so do we (see OutputProjection). Where this fails with a newer
    PEFT, that has changed (huggingface/peft#3774).
    """
    peft = pytest.importorskip("peft")
    options = {"alpha_pattern": {"multihead_attn": 3}, "use_rslora": True, "bias": bias}
    ours, x = wrapped_translator(rank_pattern={"layers.0.self_attn": 2}, **options), inputs()
    with torch.no_grad():
        for parameter in ours.trainable_parameters():
            parameter.normal_(std=0.1)
    ours.save_pretrained(tmp_path / "ours")
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # in torch's fused layers PEFT computes without LoRA
    try:
        theirs = peft.PeftModel.from_pretrained(translator(), tmp_path / "ours", is_trainable=True).eval()
        torch.testing.assert_close(ours(x, PADDING), theirs(x, PADDING), rtol=0, atol=1e-5)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        theirs.save_pretrained(tmp_path / "theirs")
        expected = theirs(x, PADDING)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    again = LoraModel.from_pretrained(translator(), tmp_path / "theirs")
    torch.testing.assert_close(again(x, PADDING), expected, rtol=0, atol=1e-5)
    assert (expected - ours(x, PADDING)).abs().max() > 0.1


@pytest.mark.parametrize("quantized", [False, True])
def test_several_adapters(quantized, tmp_path):
    """The two layers of an attention would take part in different adapters."""
    model, x = wrapped_translator(quantized), inputs()
    model.add_adapter("other", LoraConfig(rank=2, target_modules=["self_attn", "linear1"], lora_alpha=4))
    randomized(model, 2)
    with torch.no_grad():
        first = model(x)
        model.set_adapter("other")
        second = model(x)
        model.set_adapter(["default", "other"])
        both = model(x)
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
        model.set_adapter("sum")
        torch.testing.assert_close(model(x), both, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path, adapters_to_save=["sum"])
        again = (QLoRAModel if quantized else LoraModel).from_pretrained(translator(), tmp_path / "sum")
        torch.testing.assert_close(again(x), both, rtol=1e-4, atol=1e-5)
        model.set_adapter("default")
        torch.testing.assert_close(model(x), first, rtol=1e-4, atol=1e-5)
        model.delete_adapter("sum")
        model.rename_adapter("other", "second")
        model.set_adapter("second")
        torch.testing.assert_close(model(x), second, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="adapter_names: .*in_proj_weight of a MultiheadAttention"):
            model(x, adapter_names=["default", "second"])
    outputs = [first, second, both]
    assert all((one - other).abs().max() > 0.05 for one, other in itertools.combinations(outputs, 2))


def test_hot_swapping(tmp_path):
    """Another adapter's values in the memory of one would be scaled by the one's alpha, and the output's twice."""
    x = inputs()
    other = wrapped_translator(lora_alpha=3, rank=2, alpha_pattern={"multihead_attn": 5})
    other.save_pretrained(tmp_path)
    model = wrapped_translator()
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [None, WeightSpec()])
def test_dropout(spec):
    """lora_dropout that is passed over in silence is a regularisation that the user believes in."""
    layer = randomized(LoRAMultiheadAttention(attention(spec), rank=8, lora_alpha=16, lora_dropout=0.5)).train()
    x, base = inputs(5, 2, WIDTH), layer.base_layer

    def product(x, part, bias, scaling):
        lora_a, lora_b = part.factors()
        return F.linear(x, part.base_weight(), bias) + scaling * F.dropout(x, 0.5) @ lora_a.T @ lora_b.T

    torch.manual_seed(3)
    output = layer(x, x, x, need_weights=False)[0]
    torch.manual_seed(3)
    q, k, v = (
        p.view(5, 2, HEADS, -1).permute(1, 2, 0, 3) for p in product(x, layer, base.in_proj_bias, 2).chunk(3, -1)
    )
    attended = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).reshape(10, WIDTH)
    expected = product(attended, layer.out_proj, base.out_proj.bias, 4).view(5, 2, WIDTH)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert (layer(x, x, x)[0] - output).abs().max() > 0.1
    torch.testing.assert_close(layer.eval()(x, x, x)[0], plain(layer)(x, x, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_bf16(quantized):
    """A model in 16 bits is what is trained: outputs stay in its dtype, and gradients in the factors'."""
    model, x = wrapped_translator(quantized).bfloat16(), inputs()
    for parameter in model.trainable_parameters():
        parameter.data = parameter.data.float()
    exact = copy.deepcopy(model).float()(x)
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16 and (y.float() - exact).norm() < 0.02 * exact.norm()
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.trainable_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        auto = wrapped_translator(quantized)(x)
    assert (auto.float() - exact).norm() < 0.03 * exact.norm()


def test_compiled():
    """A graph would hold the weights without LoRA."""
    model, x = wrapped_translator(True), inputs()
    layer = model.encoder.layers[0].self_attn
    compiled = torch.compile(lambda x: layer(x, x, x, need_weights=False)[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x, x, x)[0], rtol=1e-4, atol=1e-5)


def test_what_code_around_it_reads():
    """torch's layers read the attention's attributes; a name that is missing is a model that does not run."""
    layer = LoRAMultiheadAttention(attention(batch_first=True))
    assert (layer.embed_dim, layer.num_heads, layer.batch_first) == (WIDTH, HEADS, True)
    assert isinstance(layer.in_proj_weight, ProductWeight) and layer.in_proj_bias is layer.base_layer.in_proj_bias
    assert isinstance(layer.out_proj, LoRALinear) and layer.out_proj.bias is layer.base_layer.out_proj.bias
    seen, x = [], inputs()
    wrapped = wrapped_translator()
    wrapped.decoder.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    wrapped(x)
    assert len(seen) == 1
    assert wrapped.base_state_dict().keys() == translator().state_dict().keys()
    torch.testing.assert_close(copy.deepcopy(wrapped)(x), wrapped(x), rtol=0, atol=0)
    with pytest.raises(TypeError):
        layer(x)
    assert type(layer.base_layer.in_proj_weight) is nn.Parameter
    assert type(layer.base_layer.out_proj.weight) is nn.Parameter
    assert isinstance(wrapped_translator(True).encoder.layers[0].self_attn.base_layer.in_proj_weight, QuantizedTensor)


def test_errors_name_what_is_wrong():
    """What cannot be adapted would otherwise fail in the middle of a product, or be passed over."""
    with pytest.raises(ValueError, match="got kdim=8 and vdim=32"):
        LoRAMultiheadAttention(nn.MultiheadAttention(WIDTH, HEADS, kdim=8))
    with pytest.raises(TypeError, match="expected a torch.nn.MultiheadAttention, got a Linear"):
        LoRAMultiheadAttention(nn.Linear(2, 2))
    for option in ("use_dora", "lora_bias"):
        model = translator()
        with pytest.raises(ValueError, match=f"{option}: expected none with a torch.nn.MultiheadAttention"):
            LoraModel(model, LoraConfig(target_modules=TARGETS, **{option: True}))
        assert not any("lora" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="init_lora_weights: .*MultiheadAttention"):
        LoraModel(translator(), LoraConfig(target_modules=TARGETS, init_lora_weights="olora"))
    assert lowbit.modules.linear_weights(attention()) == ["in_proj_weight"]
