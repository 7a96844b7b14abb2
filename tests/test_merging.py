"""lowbit_lora/merge.py: what merging gives back, and what becomes of weights that layers share."""

import copy
import pickle

import pytest
import torch
from conftest_models import (
    IDS,
    LABELS,
    assert_as_precise,
    assert_untouched,
    bert,
    llama,
    logits,
    mlp,
    randomize,
    snapshot,
    train,
)
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit_lora import LoraConfig, LoRALinear, LoraModel, QLoRAConfig, QLoRALinear, QLoRAModel

KINDS = [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)]
kinds = pytest.mark.parametrize(("model_type", "config_type"), KINDS, ids=["lora", "qlora"])


@kinds
@pytest.mark.parametrize("make", [bert, llama])
def test_merge_gives_a_plain_model_that_predicts_the_same(model_type, config_type, make):
    """What is deployed is what was trained, with nothing of lowbit left in it."""
    wrapped = model_type(make(), config_type(use_rslora=True, bias="all"))
    train(wrapped)
    before = logits(wrapped)
    merged = wrapped.merge_and_unload()
    assert type(merged) is type(make())
    assert {type(module) for module in merged.modules()} == {type(module) for module in make().modules()}
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in merged.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in make().named_parameters()
    }
    assert merged.state_dict().keys() == make().state_dict().keys()
    assert_as_precise(before, merged, logits)
    with pytest.raises(ValueError, match="merged"):
        wrapped.merge_and_unload()
    model_type(merged, config_type())  # and it can be adapted again


def test_a_merge_that_fails_changes_nothing(monkeypatch):
    """Running out of memory in a merge must not cost the trained adapter."""
    wrapped = QLoRAModel(bert(), QLoRAConfig())
    train(wrapped)
    expected, before = logits(wrapped), snapshot(wrapped.get_base_model())
    real, calls = LoRALinear.merged_weight, []

    def failing(layer, names):
        calls.append(layer)
        if len(calls) == 5:
            raise MemoryError("no more")
        return real(layer, names)

    monkeypatch.setattr(LoRALinear, "merged_weight", failing)
    with pytest.raises(MemoryError):
        wrapped.merge_and_unload()
    assert_untouched(wrapped.get_base_model(), before)
    assert torch.equal(logits(wrapped), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_trains_in_fp32_in_a_16_bit_model(dtype):
    """A new head learns nothing from updates that bf16 rounds away; the rest of the model keeps its dtype."""
    wrapped = QLoRAModel(bert().to(dtype), QLoRAConfig())
    model = wrapped.get_base_model()
    assert model.classifier.weight.dtype == torch.float32
    assert model.bert.embeddings.word_embeddings.weight.dtype == dtype
    output = wrapped(input_ids=IDS, labels=LABELS)
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    copies = [copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))]
    for twin in (*copies, wrapped):
        merged = twin.merge_and_unload()
        assert {p.dtype for p in merged.parameters()} == {dtype}
        assert not merged.classifier._forward_hooks
        assert not merged.classifier._forward_pre_hooks
        assert logits(merged).dtype == dtype


def test_tied_embeddings_stay_tied_when_saved_whole():
    """Training an embedding but not the head tied to it would silently untie the two."""
    config = QLoRAConfig(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    wrapped = QLoRAModel(llama(tied=True).bfloat16(), config)
    model = wrapped.get_base_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    losses = train(wrapped)
    assert losses[-1] < losses[0]
    merged = wrapped.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.lm_head.weight.dtype == torch.bfloat16


def test_lora_on_a_tied_head_keeps_the_tie_until_the_merge():
    """The embedding's memory must not double, and the user must be told that a merge unties."""
    wrapped = QLoRAModel(llama(tied=True), QLoRAConfig(target_modules=["lm_head", "q_proj"]))
    model = wrapped.get_base_model()
    assert type(model.lm_head) is LoRALinear
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="tied"):
        wrapped.merge_and_unload()


def test_a_layer_used_twice_stays_one_layer():
    """Two copies of a shared layer would drift apart in training."""
    wrapped = QLoRAModel(mlp(), QLoRAConfig(target_modules=["shared", "second"]))
    model = wrapped.get_base_model()
    assert type(model.first) is LoRALinear
    assert model.first is model.shared
    merged = wrapped.merge_and_unload()
    assert merged.first is merged.shared
    x = torch.randn(2, 40)
    assert merged(x).shape == (2, 3)


def test_layers_that_share_a_weight_share_its_4_bit_form(tmp_path):
    """Weight tying halves memory; neither wrapping, a checkpoint nor merging may undo it."""
    model = mlp()
    model.second.weight = model.first.weight
    wrapped = QLoRAModel(model, QLoRAConfig(target_modules=["head"]))
    assert model.first.weight is model.second.weight and isinstance(model.first.weight, QuantizedTensor)
    torch.save(wrapped.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["model.first.weight"].packed.data_ptr() == state["model.second.weight"].packed.data_ptr()
    wrapped.load_state_dict(state)
    assert model.first.weight is model.second.weight
    merged = wrapped.merge_and_unload()
    assert merged.first.weight is merged.second.weight


def test_merging_says_that_it_unties_a_4_bit_weight():
    """Two layers with LoRA on one weight have two weights once they are merged: the file would double unseen."""
    model = mlp()
    model.second.weight = model.first.weight
    wrapped = randomize(QLoRAModel(model, QLoRAConfig(target_modules=["first", "second"])))
    assert model.first.base_layer.weight is model.second.base_layer.weight
    x = torch.randn(2, 40)
    expected = wrapped(x).detach()
    with pytest.warns(UserWarning, match="(first|second).weight is tied"):
        merged = wrapped.merge_and_unload()
    assert_as_precise(expected, merged, lambda model: model(x.to(model.norm.weight.dtype)).detach())


@pytest.mark.parametrize("rest", ["dense", "quantized"])
def test_lora_on_a_model_that_was_quantized_in_place(rest):
    """lowbit.quantize_ and LoRA go together; merging decodes what has LoRA and leaves the rest as it was stored."""
    model = lowbit.quantize_(mlp(), skip=["head"] if rest == "quantized" else ["head", "second"])
    wrapped = randomize(LoraModel(model, LoraConfig(target_modules=["first"])))
    second = model.second.weight
    x = torch.randn(2, 40)
    expected = wrapped(x).detach()
    merged = wrapped.merge_and_unload()
    assert type(merged.first.weight) is nn.Parameter and merged.second.weight is second
    plain = lowbit.dequantize_(copy.deepcopy(merged))
    assert_as_precise(expected, plain, lambda model: model(x.to(model.norm.weight.dtype)).detach())


def test_merging_into_quantized_weights_reports_what_is_left():
    """Quantizing again loses much of a small change, and nobody would know."""
    wrapped = randomize(QLoRAModel(llama(), QLoRAConfig(rank=4)))
    expected = {n: m.base_weight(torch.float32) for n, m in wrapped.model.named_modules() if isinstance(m, LoRALinear)}
    deltas = {n: m.delta("default") for n, m in wrapped.model.named_modules() if isinstance(m, LoRALinear)}
    merged = wrapped.merge_and_unload(into="quantized", minimum_cosine=0.0)
    assert {survival.name for survival in wrapped.merge_report.layers} == set(expected)
    for survival in wrapped.merge_report.layers:
        weight = merged.get_submodule(survival.name).weight
        assert isinstance(weight, QuantizedTensor)
        got = weight.dequantize(torch.float32) - expected[survival.name]
        wanted = deltas[survival.name]
        cosine = torch.cosine_similarity(got.flatten(), wanted.flatten(), 0)
        assert abs(survival.cosine - float(cosine)) < 1e-4
        assert abs(survival.norm_ratio - float(got.norm() / wanted.norm())) < 1e-4


def test_a_merge_that_would_lose_the_adapter_is_refused():
    """A tiny change does not survive 4 bits: the model would answer as if it had not been trained."""
    wrapped = QLoRAModel(llama(), QLoRAConfig(rank=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for layer in (module for module in wrapped.modules() if isinstance(module, LoRALinear)):
            layer.factors()[1].normal_(std=1e-4)
    before, expected = snapshot(wrapped.get_base_model()), logits(wrapped)
    with pytest.raises(ValueError, match=r"cosine.*4 of 4 layers.*proj.*minimum_cosine"):
        wrapped.merge_and_unload(into="quantized")
    assert_untouched(wrapped.get_base_model(), before)
    assert torch.equal(logits(wrapped), expected)


def test_another_quantizer_can_be_given():
    """A calibrated quantizer, which keeps more, has its place."""
    wrapped, seen = randomize(QLoRAModel(llama(), QLoRAConfig(rank=4))), []

    def quantizer(values, old):
        seen.append(values.dtype)
        return lowbit.quantize(values)

    wrapped.merge_and_unload(into="quantized", minimum_cosine=0.0, quantizer=quantizer)
    assert seen and set(seen) == {torch.float32}


@kinds
def test_merging_in_another_dtype(model_type, config_type):
    """A merged model is often wanted in bf16, whatever the base is in."""
    wrapped = randomize(model_type(llama(), config_type(target_modules=["q_proj"])))
    expected = logits(wrapped)
    merged = wrapped.merge_and_unload(dtype=torch.bfloat16)
    weight = merged.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.bfloat16 and type(weight) is nn.Parameter
    torch.testing.assert_close(logits(merged.float()), expected, rtol=0.05, atol=0.05)


@kinds
def test_a_merge_that_is_not_finite_is_refused_on_request(model_type, config_type):
    """A diverged run would be published as a model that answers NaN."""
    wrapped = randomize(model_type(llama(), config_type(target_modules=["q_proj"])))
    layer = wrapped.model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        layer.factors()[0][0, 0] = torch.inf
    before = snapshot(wrapped.get_base_model())
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj: expected finite"):
        wrapped.merge_and_unload(safe=True)
    assert_untouched(wrapped.get_base_model(), before)
    with pytest.raises(ValueError, match="into: expected one of dense, quantized"):
        wrapped.merge_and_unload(into="int4")


def test_embeddings_and_head_in_four_bits_stay_tied(tmp_path):
    """The largest table of a small model would stay in 16 bits, or be stored twice."""
    config = QLoRAConfig(target_modules=["q_proj"], quantize_head=True, quantize_embeddings=True)
    wrapped = randomize(QLoRAModel(llama(tied=True), config))
    model = wrapped.get_base_model()
    assert isinstance(model.lm_head.weight, QuantizedTensor)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wrapped.save_pretrained(tmp_path)
    again = QLoRAModel.from_pretrained(llama(tied=True), tmp_path)
    assert torch.equal(logits(again), logits(wrapped))
    merged = wrapped.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and type(merged.lm_head.weight) is nn.Parameter
    only_head = QLoRAModel(llama(), QLoRAConfig(target_modules=["q_proj"], quantize_head=True)).get_base_model()
    assert isinstance(only_head.lm_head.weight, QuantizedTensor)
    assert not isinstance(only_head.model.embed_tokens.weight, QuantizedTensor)


def test_adapters_in_a_quantized_weight_come_out_again():
    """Somebody who tries a merge that loses much could not go back without loading the model again."""
    wrapped = randomize(QLoRAModel(llama(), QLoRAConfig(rank=4, target_modules=["q_proj", "v_proj"])))
    before, expected = snapshot(wrapped.get_base_model()), logits(wrapped)
    with pytest.raises(ValueError, match=r"in 4 of 4 layers: model.layers.\d.self_attn.\w_proj \(cosine"):
        wrapped.merge_adapter(into="quantized", minimum_cosine=1.0)
    assert_untouched(wrapped.get_base_model(), dict(before))
    survivals = wrapped.merge_adapter(into="quantized", minimum_cosine=0.0)
    layers = {name: module for name, module in wrapped.model.named_modules() if isinstance(module, LoRALinear)}
    assert [survival.name for survival in survivals] == [*layers]
    for survival, layer in zip(survivals, layers.values(), strict=True):
        assert isinstance(layer.base_layer.weight, QuantizedTensor)
        assert layer.survival.cosine == survival.cosine and 0 < survival.cosine <= 1
    merged = logits(wrapped)
    assert not torch.equal(merged, expected)
    wrapped.unmerge_adapter()
    assert_untouched(wrapped.get_base_model(), before)
    assert torch.equal(logits(wrapped), expected)


def test_a_single_layer_merges_into_its_quantized_weight():
    """A layer that is used alone has no model that could do it."""
    layer = QLoRALinear(64, 32, rank=4)
    with torch.no_grad():
        layer.factors()[1].normal_(std=1e-4)
    stored, x = layer.base_layer.weight, torch.randn(3, 64)
    with pytest.raises(ValueError, match="cosine"):
        layer.merge(into="quantized")
    with pytest.raises(ValueError, match="into: expected"):
        layer.merge(into="int4")
    assert layer.base_layer.weight is stored and not layer.merged
    assert layer.merge(into="quantized", minimum_cosine=-1.0) is layer.base_layer
    weight = layer.base_layer.weight
    assert isinstance(weight, QuantizedTensor) and weight.spec == stored.spec
    torch.testing.assert_close(layer(x), lowbit.linear(x, weight, layer.base_layer.bias))
    layer.unmerge()
    assert layer.base_layer.weight is stored and layer.survival is None


def test_a_weight_that_no_adapter_changes_keeps_its_bytes():
    """Layers whose adapter learned nothing would be refused, or get other bytes for nothing."""
    wrapped = QLoRAModel(llama(), QLoRAConfig(rank=4))  # B is zero
    stored = {name: parameter for name, parameter in wrapped.model.named_parameters() if name.endswith("layer.weight")}
    assert all(survival.cosine == 1 for survival in wrapped.merge_adapter(into="quantized"))
    assert stored
    for name, parameter in stored.items():
        assert torch.equal(wrapped.model.get_parameter(name).packed, parameter.packed)
