"""LoraModel and QLoRAModel on Hugging Face and plain models: targets, training, merging, failed conversions."""

import copy

import pytest
import torch
from models import IDS, LABELS, bert, llama, logits, train
from torch import nn

from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRALinear, QLoRAModel, QuantizedLinear


def adapted(model):
    return sorted(name for name, module in model.model.named_modules() if isinstance(module, QLoRALinear))


@pytest.mark.parametrize("make", [bert, llama])
def test_initial_output_is_the_quantized_bases(make):
    """Wrapping must not change the model: B is zero, so LoRA's rank cannot matter, and the merge is the base."""
    first = QLoRAModel(make(), QLoRAConfig(rank=2))
    second = QLoRAModel(make(), QLoRAConfig(rank=7, lora_alpha=100))
    assert torch.equal(logits(first), logits(second))
    torch.testing.assert_close(logits(copy.deepcopy(first).merge_and_unload()), logits(first), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss_and_repeats(make, checkpointing):
    """The main job; one seed gives the same losses to the last bit, with checkpointing or without."""
    runs = []
    for _ in range(2):
        model = QLoRAModel(make(), QLoRAConfig(lora_dropout=0.1, gradient_checkpointing=checkpointing))
        runs.append(train(model))
    assert runs[0] == runs[1]
    assert runs[0][0] > runs[0][1] > runs[0][2]


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("wrapper", [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)])
def test_merge_keeps_the_outputs(make, bias, wrapper):
    """What was trained must be in the merged plain model, with no adapter layer left."""
    model = wrapper[0](make(), wrapper[1](bias=bias))
    train(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert not any(hasattr(module, "lora_A") or isinstance(module, QuantizedLinear) for module in merged.modules())
    assert {name: type(m) for name, m in merged.named_modules()} == {name: type(m) for name, m in make().named_modules()}


def test_targets():
    """Names, dotted suffixes, a regular expression and all-linear choose what users of PEFT expect."""
    base = "bert.encoder.layer."
    expected = [f"{base}{i}.attention.self.query" for i in (0, 1)]
    for targets in (["query"], ["self.query"], r".*\.query", expected):
        assert adapted(QLoRAModel(bert(), QLoRAConfig(target_modules=targets))) == expected
    everything = adapted(QLoRAModel(bert(), QLoRAConfig()))
    assert len(everything) == 13 and "classifier" not in everything and "bert.pooler.dense" in everything
    assert "lm_head" not in adapted(QLoRAModel(llama(), QLoRAConfig()))


def test_all_linear_layers_are_stored_in_4_bits():
    """Memory: layers without LoRA are quantized too, the head is not."""
    model = QLoRAModel(bert(), QLoRAConfig(target_modules=["query"]))
    kinds = {name: type(module) for name, module in model.model.named_modules()}
    assert kinds["bert.encoder.layer.0.attention.self.key"] is QuantizedLinear
    assert kinds["classifier"] is nn.Linear
    assert type(QLoRAModel(llama(), QLoRAConfig()).model.lm_head) is nn.Linear
    assert model.memory_footprint() < LoraModel(bert(), LoraConfig(target_modules=["query"])).memory_footprint()


@pytest.mark.parametrize("targets", ["nothing", ["query", "nope"], ["attention"], r".*layer\.9.*"])
def test_targets_that_match_nothing(targets):
    """A typo must not silently train nothing; the error lists what there is."""
    with pytest.raises(ValueError, match="target_modules: .*matches no nn.Linear.*attention.self.query"):
        QLoRAModel(bert(), QLoRAConfig(target_modules=targets))


def test_head_trains_in_full_precision():
    """A fresh classification head has to train, in fp32 even in a bf16 model."""
    model = QLoRAModel(bert().bfloat16(), QLoRAConfig())
    assert model.classifier.weight.dtype == torch.float32 and model.classifier.weight.requires_grad
    before = model.classifier.weight.detach().clone()
    train(model)
    assert not torch.equal(model.classifier.weight, before)
    merged = model.merge_and_unload()
    assert merged.classifier.weight.dtype == torch.bfloat16
    assert logits(merged).dtype == torch.bfloat16


@pytest.mark.parametrize(("bias", "expected"), [("none", 1), ("all", 22), ("lora_only", 3)])
def test_bias_modes(bias, expected):
    """The biases that train are those asked for (the head's always does)."""
    model = QLoRAModel(bert(), QLoRAConfig(target_modules=["query"], bias=bias))
    names = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    assert len(names) == expected


def test_print_trainable_parameters(capsys):
    """The count users quote: 4-bit weights count as the weights they hold."""
    base = bert()
    total = sum(p.numel() for p in base.parameters())
    QLoRAModel(base, QLoRAConfig(rank=2, target_modules=["query"])).print_trainable_parameters()
    lora = 2 * 2 * (32 + 32)
    head = 2 * 32 + 2
    assert f"trainable params: {lora + head:,d} || all params: {total + lora:,d} ||" in capsys.readouterr().out


def test_plain_module_and_shared_layer():
    """Any nn.Module works, and a layer used twice stays one layer."""
    shared = nn.Linear(16, 16)
    model = QLoRAModel(nn.Sequential(shared, nn.ReLU(), shared), QLoRAConfig())
    assert model.model[0] is model.model[2] and isinstance(model.model[0], QLoRALinear)
    merged = model.merge_and_unload()
    assert merged[0] is merged[2]


@pytest.mark.parametrize("make", [bert, llama])
def test_failed_conversion_leaves_the_model(make):
    """After an error the user still has the model that was loaded, to the last flag."""
    model = make()
    broken = [m for m in model.modules() if type(m) is nn.Linear and m is not model.get_output_embeddings()][-2]
    broken.weight.data[3, 3] = float("nan")
    modules = dict(model.named_modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="weight: expected finite values, got 1 NaN"):
        QLoRAModel(model, QLoRAConfig())
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(state[n].nan_to_num(), t.nan_to_num()) for n, t in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_wrong_models_and_configs():
    """Wrapping twice, or with the wrong kind of config, is named."""
    model = QLoRAModel(bert(), QLoRAConfig())
    for wrapped in (model, model.model):
        with pytest.raises(ValueError, match="model: expected one without adapters"):
            QLoRAModel(wrapped, QLoRAConfig())
    with pytest.raises(TypeError, match="config: expected a QLoRAConfig, got LoraConfig"):
        QLoRAModel(bert(), LoraConfig())
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        QLoRAModel("bert", QLoRAConfig())
    with pytest.raises(ValueError, match="gradient_checkpointing: Linear does not support it"):
        QLoRAModel(nn.Linear(4, 4), QLoRAConfig(gradient_checkpointing=True))
    with pytest.raises(ValueError, match="modules_to_save: 'nope' matches no module"):
        QLoRAModel(bert(), QLoRAConfig(modules_to_save=["nope"]))


def test_wrapper_passes_through():
    """Hugging Face code that asks the model for config, device or generate must find them."""
    model = QLoRAModel(llama(), QLoRAConfig())
    assert model.config.hidden_size == 32 and model.device.type == "cpu"
    assert model.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 9)
    with pytest.raises(AttributeError):
        _ = model.no_such_attribute
    assert QLoRAModel(bert(), QLoRAConfig())(input_ids=IDS, labels=LABELS).loss.requires_grad
