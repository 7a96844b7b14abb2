"""Factors that are taken out of the weight: the model begins as it was, and its files fit the base as it was."""

import pytest
import torch
from conftest_models import assert_untouched, bert, llama, logits, snapshot, train

import lowbit
from lowbit_lora import LoRABaseLayer, LoraConfig, LoraModel, QLoRAConfig, QLoRAModel

METHODS = ["pissa", "pissa_niter_8", "olora"]


def layers(wrapped):
    return {name: module for name, module in wrapped.model.named_modules() if isinstance(module, LoRABaseLayer)}


@pytest.mark.parametrize("method", METHODS)
def test_the_model_begins_as_it_was(method):
    """The first step would start from another model."""
    base = bert()
    expected = logits(base)
    wrapped = LoraModel(base, LoraConfig(rank=4, init_lora_weights=method))
    torch.testing.assert_close(logits(wrapped), expected, rtol=1e-4, atol=1e-5)
    assert all(layer.factors()[1].abs().sum() > 0 for layer in layers(wrapped).values())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_file_fits_the_base_as_it_was(tmp_path, method, rslora):
    """Loaded onto the base without its residual, the trained factors alone would be added to the whole weight."""
    peft = pytest.importorskip("peft")
    config = LoraConfig(
        rank=4,
        init_lora_weights=method,
        use_rslora=rslora,
        target_modules=["query", "dense"],
        rank_pattern={"query": 2},
    )
    wrapped = LoraModel(bert(), config)
    train(wrapped)
    wrapped.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(LoraModel.from_pretrained(bert(), tmp_path)), logits(wrapped), rtol=1e-4, atol=1e-5
    )
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(wrapped), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["pissa", "olora", "loftq"])
def test_on_a_quantized_base(tmp_path, method):
    """What is stored in 4 bits is what the factors leave; a reloaded adapter needs the same bytes."""
    config = QLoRAConfig(rank=8, init_lora_weights=method, loftq_iterations=2)
    wrapped = QLoRAModel(llama(), config)
    plain = QLoRAModel(llama(), QLoRAConfig(rank=8))
    model = llama()
    for name, layer in layers(wrapped).items():
        weight = model.get_submodule(name).weight
        assert isinstance(layer.base_layer.weight, lowbit.QuantizedTensor)
        error = (layer.merged_weight().float() - weight).norm()
        naive = (layers(plain)[name].merged_weight().float() - weight).norm()
        assert error < (1.05 if method == "olora" else 1.0) * naive
    train(wrapped)
    wrapped.save_pretrained(tmp_path)
    again = QLoRAModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(again), logits(wrapped), rtol=1e-5, atol=1e-5)


def test_unloading_gives_the_base_back():
    """The wrapper would hand back the residual as if it were the base."""
    base = bert()
    expected = logits(base)
    assert torch.allclose(
        logits(LoraModel(base, LoraConfig(rank=4, init_lora_weights="pissa")).unload()), expected, atol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoraConfig(init_lora_weights="loftq"), "QLoRAConfig"),
        (lambda: LoraConfig(init_lora_weights="pizza"), "pizza"),
        (
            lambda: LoraModel(lowbit.quantize_(bert()), LoraConfig(init_lora_weights="pissa", modules_to_save=[])),
            "dense",
        ),
        (lambda: LoraModel(bert(), LoraConfig(rank=64, init_lora_weights="pissa")), "rank"),
        (lambda: further(), "first"),
    ],
)
def test_what_cannot_be_decomposed_is_told(call, message):
    """Factors of something else would be trained."""
    with pytest.raises(ValueError, match=message):
        call()


def further():
    LoraModel(bert(), LoraConfig()).add_adapter("other", LoraConfig(init_lora_weights="olora"))


def test_a_failed_decomposition_leaves_the_model():
    """A base with half of its weights replaced is lost."""
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer.1.output.dense"):
        LoraModel(model, LoraConfig(init_lora_weights="pissa", target_modules=["query", "output.dense"]))
    assert_untouched(model, before)
