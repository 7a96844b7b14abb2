"""QLoRAModel.calibrated: adapters that begin with what calibrated quantization takes away."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest_calibrate import batches_of, killed_after, model_of, outputs
from conftest_models import assert_untouched, mlp, snapshot, train

import lowbit
from lowbit import QuantizedTensor
from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel, calibrate
from lowbit_lora.layers import LoRABaseLayer

transformers = pytest.importorskip("transformers", minversion="5")

RANK = 8


def calibrated(model, batches, method="sequential", config=None, **options):
    config = config or QLoRAConfig(rank=RANK)
    return QLoRAModel.calibrated(model, config, batches, method, progress=False, **options)


def divergence(model, dense: torch.Tensor, batches) -> float:
    """KL of the model's predictions from the dense model's, nats per token."""
    found = outputs(model, batches).log_softmax(-1)
    return F.kl_div(found, dense.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean().item()


def layers(wrapped) -> dict[str, LoRABaseLayer]:
    return {name: module for name, module in wrapped.model.named_modules() if isinstance(module, LoRABaseLayer)}


@pytest.mark.parametrize("method", ["scale", "static", "sequential"])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_the_model_begins_nearer_to_the_dense_one(family, method):
    """On data that was not calibrated on: nearer than the calibrated base can be, and than LoftQ's factors make it."""
    model, batches = model_of(family), batches_of(family, count=8, rows=8)
    held_out = batches_of(family, count=11, rows=8)[8:]
    dense, plain, loftq = outputs(model, held_out), copy.deepcopy(model), copy.deepcopy(model)
    calibrate(plain, batches, method, progress=False)
    loftq = QLoRAModel(loftq, QLoRAConfig(rank=RANK, init_lora_weights="loftq", loftq_iterations=2))
    wrapped = calibrated(model, batches, method)
    found = divergence(wrapped, dense, held_out)
    assert found < 0.8 * divergence(plain, dense, held_out)
    assert found < divergence(loftq, dense, held_out)
    assert all(isinstance(layer.stored_weight, QuantizedTensor) for layer in layers(wrapped).values())
    report = wrapped.calibration
    assert all(row.final <= row.search for row in report.layers)
    assert all(row.chosen.endswith(f", rank {RANK}") for row in report.layers)
    wrapped.train()
    losses = train_on(wrapped, batches[0]["input_ids"])
    assert losses[-1] < losses[0]


def train_on(wrapped, ids, steps: int = 3) -> list[float]:
    optimizer, losses = torch.optim.AdamW(wrapped.trainable_parameters(), lr=1e-2), []
    for _ in range(steps):
        loss = wrapped(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_second_round_leaves_less():
    """Otherwise its time is spent for nothing."""
    from lowbit.quantizers import Curvature
    from lowbit_lora.calibrate import layers as steps

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    x = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    curvature = Curvature(x.T @ x)

    def store(target):
        return lowbit.quantize(target, codes="descent", hessian=curvature)

    def loss(decoded):
        return float(curvature.loss(weight - decoded).sum())

    first = store(weight)
    alone = steps.Result(first, 1.0, 1.0, loss(first.dequantize()), "descent")
    seen = []

    def noted(decoded):
        seen.append(loss(decoded))
        return seen[-1]

    result = steps.with_start(alone, weight, 8, curvature, store, noted)
    assert seen[1] < seen[0] < alone.final
    assert result.final == seen[1] and not torch.equal(result.quantized.dequantize(), first.dequantize())
    worse = steps.with_start(alone, weight, 8, curvature, store, lambda decoded: 2 * alone.final)
    assert worse is alone and worse.start is None


def test_base_and_adapter_are_saved_and_loaded(tmp_path):
    """The two folders together are the model, and PEFT reads the adapter's; it goes on training."""
    peft = pytest.importorskip("peft")
    batches = batches_of("Llama")
    wrapped = calibrated(model_of("Llama"), batches, config=QLoRAConfig(rank=RANK, lora_alpha=8, use_rslora=True))
    wrapped.save_base(tmp_path / "base")
    before = {name: layer.stored_weight.dequantize() for name, layer in layers(wrapped).items()}
    train_on(wrapped, batches[0]["input_ids"])
    wrapped.save_pretrained(tmp_path / "adapter")
    assert layers(wrapped).keys() == before.keys()

    load = transformers.AutoModelForCausalLM.from_pretrained
    again = QLoRAModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(outputs(again, batches), outputs(wrapped, batches))
    assert again.lora_config.init_lora_weights == "calibrated"
    train_on(again, batches[0]["input_ids"])
    again.save_pretrained(tmp_path / "again")
    again = QLoRAModel.from_pretrained(load(tmp_path / "base"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["init_lora_weights"] is True
    dense = load(tmp_path / "base")
    lowbit.dequantize_(dense)
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter")
    torch.testing.assert_close(outputs(theirs, batches), outputs(wrapped, batches), rtol=1e-4, atol=1e-5)


def test_the_base_without_its_adapter_is_not_given_away(tmp_path):
    """Half of the model would look like all of it: the base that quantization left, or an adapter on another base."""
    batches = batches_of("Llama")
    wrapped = calibrated(model_of("Llama"), batches)
    with pytest.raises(ValueError, match="unload: .*'calibrated'.*merge_and_unload"):
        wrapped.unload()
    with pytest.raises(ValueError, match="'calibrated' changes the base"):
        wrapped.add_adapter("other", wrapped.lora_config)
    wrapped.save_pretrained(tmp_path)
    model = model_of("Llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model: expected the calibrated base.*save_base\(\).*dense"):
        QLoRAModel.from_pretrained(model, tmp_path)
    assert_untouched(model, before)
    expected = outputs(wrapped, batches)
    torch.testing.assert_close(outputs(wrapped.merge_and_unload(), batches), expected, rtol=1e-4, atol=1e-5)


def test_saving_the_base_leaves_the_model_alone(tmp_path):
    """Also where the disk is full: training goes on with its adapters."""
    batches = batches_of("Llama")
    wrapped = calibrated(model_of("Llama"), batches, "scale")
    expected = outputs(wrapped, batches)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        wrapped.save_base(tmp_path / "file" / "base")
    wrapped.save_base(tmp_path / "theirs", format="bitsandbytes")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    assert torch.equal(outputs(wrapped, batches), expected)
    dense = LoraModel(model_of("Llama"), LoraConfig())
    dense.save_base(tmp_path / "dense")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(outputs(loaded, batches), outputs(model_of("Llama"), batches))
    with pytest.raises(ValueError, match="save_base: expected a base that is dense, calibrated"):
        QLoRAModel(model_of("Llama"), QLoRAConfig()).save_base(tmp_path / "other")
    with pytest.raises(TypeError, match=r"save_base: .*Mlp; take base_state_dict\(\)"):
        LoraModel(mlp(), LoraConfig()).save_base(tmp_path / "other")


def test_ranks_patterns_and_layers_without_adapters():
    """Each layer begins with its own rank and alpha; those without an adapter are calibrated alone, or stay dense."""
    model, batches = model_of("Llama"), batches_of("Llama")
    dense = copy.deepcopy(model)
    config = QLoRAConfig(
        rank=RANK,
        target_modules=["q_proj", "o_proj", "down_proj"],
        rank_pattern={"down_proj": 200},
        alpha_pattern={"o_proj": 1.0},
        use_dora=True,
        lora_dtype="bfloat16",
    )
    wrapped = calibrated(model, batches, config=config)
    rows = {row.name: row for row in wrapped.calibration.layers}
    assert rows["model.layers.0.self_attn.k_proj.weight"].chosen == "descent"
    assert rows["model.layers.0.mlp.down_proj.weight"].chosen == "descent, rank 200"
    assert not isinstance(model.lm_head.weight, QuantizedTensor)
    for name, layer in layers(wrapped).items():
        lora_a, lora_b = layer.factors()
        assert lora_a.dtype == torch.bfloat16 and lora_a.isfinite().all() and lora_b.ne(0).any()
        lost = layer.merged_weight() - dense.get_submodule(name).weight
        assert lost.norm() < (layer.base_weight() - dense.get_submodule(name).weight).norm()
    whole = layers(wrapped)["model.layers.0.mlp.down_proj"]
    assert len(whole.factors()[0]) == 200 and whole.factors()[1][:, 64:].eq(0).all()


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """The factors of finished blocks are kept beside their weights; another rank is another run."""
    batches = batches_of("Llama")
    whole = calibrated(model_of("Llama"), batches)
    model = model_of("Llama")
    before = snapshot(model)
    with killed_after(1):
        calibrated(model, batches, resume=tmp_path)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="resume: .*ranks"):
        calibrated(model, batches, config=QLoRAConfig(rank=2), resume=tmp_path)
    resumed = calibrated(model, batches, resume=tmp_path)
    assert torch.equal(outputs(resumed, batches), outputs(whole, batches))


def test_dead_channels_and_rows_that_cut_blocks():
    """What real models have: no NaN comes of it, and the model that begins is still nearer to the dense one."""
    model = model_of("Llama", intermediate_size=96, hidden_size=80, head_dim=40)
    batches = batches_of("Llama", count=1, rows=1, length=9)  # fewer tokens than channels
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 0
        model.model.layers[0].input_layernorm.weight[5:9] = 0
        model.model.layers[1].mlp.down_proj.weight[:40] = 0
    plain, dense = copy.deepcopy(model), outputs(model, batches)
    calibrate(plain, batches, progress=False)
    wrapped = calibrated(model, batches)
    assert all(factor.isfinite().all() for layer in layers(wrapped).values() for factor in layer.factors())
    assert divergence(wrapped, dense, batches) < divergence(plain, dense, batches)


def test_heads_to_save_and_layers_outside_of_blocks_begin_as_ever():
    """A classifier trains whole and dense; a pooler, whose inputs no block has, gets factors that change nothing."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=50)).eval()
    wrapped = calibrated(model, batches_of("Bert"))
    assert wrapped.calibration.unplaced == ["bert.pooler.dense.weight"]
    pooler = layers(wrapped)["bert.pooler.dense"]
    assert isinstance(pooler.stored_weight, QuantizedTensor) and pooler.factors()[1].eq(0).all()
    assert wrapped.classifier.weight.requires_grad
    assert train(wrapped)[-1] > 0


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (QLoRAConfig(init_lora_weights="pissa"), {}, "init_lora_weights: expected 'default', got 'pissa'"),
        (QLoRAConfig(quantization="int8"), {}, "spec: expected a format in 4 bits"),
        (QLoRAConfig(target_modules=["nothing"]), {}, "target_modules"),
        (QLoRAConfig(), {"method": "best"}, "method"),
        (QLoRAConfig(), {"damping": -1.0}, "damping"),
        (QLoRAConfig(), {"batches": []}, "at least one batch"),
        (QLoRAConfig(), {"adapter_name": ""}, "adapter"),
    ],
)
def test_wrong_arguments(config, options, message):
    """Each is named, and the model is as it was."""
    model = model_of("Llama")
    before = snapshot(model)
    arguments = {"batches": batches_of("Llama")} | options
    with pytest.raises(ValueError, match=message):
        QLoRAModel.calibrated(model, config, progress=False, **arguments)
    assert_untouched(model, before)


def test_only_data_makes_such_factors():
    """The constructor would begin with random factors under the name of calibrated ones."""
    with pytest.raises(ValueError, match="QLoRAModel.calibrated"):
        QLoRAModel(model_of("Llama"), QLoRAConfig(init_lora_weights="calibrated"))
    with pytest.raises(ValueError, match="expects a QLoRAConfig"):
        LoraConfig(init_lora_weights="calibrated")
    with pytest.raises(TypeError, match="config: expected a QLoRAConfig"):
        QLoRAModel.calibrated(model_of("Llama"), LoraConfig(), batches_of("Llama"))
