"""Merging a trained adapter back into 4 bits, by what the layers see of data."""

import json

import pytest
import torch
from conftest_merge import batches, fit, held_out, trained
from conftest_models import assert_untouched, bert, mlp, randomize, snapshot

import lowbit
from lowbit import QuantizedTensor
from lowbit_lora import LoraConfig, LoRALinear, LoraModel, QLoRAConfig, QLoRALinear, QLoRAModel
from lowbit_lora.calibrate import walk
from lowbit_lora.calibrate.watch import working_copy
from lowbit_lora.recovery import Losses, held_out_of

transformers = pytest.importorskip("transformers", minversion="5")


def merge(model, **options):
    """The merged model and the report."""
    plain = model.merge_and_unload(into="quantized", progress=False, **options)
    return plain, model.merge_report


def by_hand(model, data) -> float:
    """The mean loss over batches of the same size."""
    with torch.no_grad():
        return sum(model(**batch, labels=batch["input_ids"]).loss.item() for batch in data) / len(data)


def stored(model) -> dict[str, QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def test_data_keeps_what_a_naive_merge_loses():
    """Users would ship a model without its tune, or with more bytes; the three numbers are those of a count by hand."""
    model, data = trained(), held_out()
    adapter = by_hand(model, data)
    with model.disable_adapter():
        base = by_hand(model, data)
    before = stored(model)
    shares = {}
    for how, options in (
        ("naive", {"minimum_cosine": -1.0}),
        ("static", {"batches": batches(), "method": "static"}),
        ("sequential", {"batches": batches()}),
    ):
        plain, report = merge(trained(), held_out=data, **options)
        losses = report.losses
        assert losses.base == pytest.approx(base, abs=1e-6) and losses.adapter == pytest.approx(adapter, abs=1e-6)
        assert losses.merged == pytest.approx(by_hand(plain, data), abs=1e-6)
        shares[how] = report.recovery
        assert shares[how] == pytest.approx((base - by_hand(plain, data)) / (base - adapter), abs=1e-6)
        assert {w.spec for w in stored(plain).values()} == {w.spec for w in before.values()}
        assert sum(p.nbytes for p in stored(plain).values()) == sum(p.nbytes for p in before.values())
        assert not any(isinstance(module, LoRALinear) for module in plain.modules())
    lost = {how: abs(1 - share) for how, share in shares.items()}
    assert lost["static"] < 0.5 * lost["naive"] and lost["sequential"] < 0.5 * lost["naive"]


def test_the_report_names_each_layer_and_how_it_was_measured(capsys):
    """A user would trust a number measured on the data of the merge, or not find the layer that suffers."""
    model = trained()
    expected = {
        name: layer.merged_values(layer.active)
        for name, layer in model.model.named_modules()
        if isinstance(layer, LoRALinear)
    }
    plain = model.merge_and_unload(into="quantized", batches=batches(5), method="scale")
    report = model.merge_report
    printed = capsys.readouterr().out
    assert f"{report.recovery:.1%}" in printed and "last 1 of 5 batches were held out" in " ".join(printed.split())
    assert report.losses.batches == 1 and report.losses.labels == 8 * 24 and report.calibration.batches == 4
    assert {layer.name for layer in report.layers} == expected.keys()
    for layer in report.layers:
        got = plain.get_submodule(layer.name).weight.dequantize(torch.float32)
        cosine = torch.cosine_similarity(got.flatten(), expected[layer.name].flatten(), 0)
        assert layer.weight_cosine == pytest.approx(float(cosine), abs=1e-5) and cosine > 0.97
    assert json.loads(json.dumps(report.to_dict()))["recovery"] == report.recovery
    console = pytest.importorskip("rich.console").Console(record=True, width=200)
    console.print(report.table())
    text = console.export_text()
    assert all(name in text for name in expected) and "weighted search" in text


def test_losses_without_a_gain_have_no_recovery():
    """A share of nothing would be a huge number of either sign."""
    assert Losses(2.0, 1.0, 1.25, 3, 30).recovery == 0.75
    assert Losses(2.0, 2.0, 1.25, 3, 30).recovery is None
    assert held_out_of([*range(10)]) == ([*range(8)], [8, 9])
    assert held_out_of([0, 1]) == ([0], [1]) and held_out_of([0]) == ([0], [])


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_the_dense_copy_of_a_block_computes_what_its_adapters_do(options):
    """Weights would be calibrated towards another model than the one that was trained."""
    wrapped = randomize(QLoRAModel(bert(), QLoRAConfig(rank=4, **options)))
    wrapped.add_adapter("second", LoraConfig(rank=2, target_modules=["query", "output.dense"], modules_to_save=[]))
    wrapped.set_adapter(["default", "second"])
    randomize(wrapped, seed=1)
    block = wrapped.model.bert.encoder.layer[1]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        copied = working_copy(block)
        expected, got = block(x), copied(x)
    assert not any(isinstance(p, QuantizedTensor) for p in copied.parameters())
    assert {type(module) for module in copied.modules()} == {type(m) for m in bert().bert.encoder.layer[1].modules()}
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)


def test_all_active_adapters_are_merged_and_other_weights_keep_their_bytes():
    """A second adapter would be lost, or a layer without one would be changed for nothing."""
    model = trained()
    model.add_adapter("second", LoraConfig(rank=2, target_modules=["q_proj"]))
    model.set_adapter(["default", "second"])
    randomize(model)
    layer = model.model.model.layers[0].self_attn.q_proj
    both = layer.base_weight() + layer.delta("default") + layer.delta("second")
    with torch.no_grad():  # what nothing changes
        model.model.model.layers[1].mlp.up_proj.factors("default")[1].zero_()
    kept = model.model.model.layers[1].mlp.up_proj.base_layer.weight
    plain, report = merge(model, batches=batches(2), held_out=[])
    got = plain.model.layers[0].self_attn.q_proj.weight.dequantize()
    assert torch.cosine_similarity(got.flatten(), both.flatten(), 0) > 0.97
    assert torch.equal(plain.model.layers[1].mlp.up_proj.weight.packed, kept.packed)
    assert report.losses is None and len(report.calibration.layers) == 13

    one = trained()
    one.add_adapter("second", LoraConfig(rank=2, target_modules=["q_proj"]))
    randomize(one)
    layer = one.model.model.layers[0].self_attn.q_proj
    second = layer.base_weight() + layer.delta("second")
    plain, report = merge(one, names=["second"], batches=batches(2), held_out=held_out(1), method="static")
    got = plain.model.layers[0].self_attn.q_proj.weight.dequantize()
    assert torch.cosine_similarity(got.flatten(), second.flatten(), 0) > 0.97
    assert [layer.name.rpartition(".")[2] for layer in report.layers] == ["q_proj", "q_proj"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches: expected at least one batch"),
        ({"batches": [{"pixel_values": torch.ones(1)}]}, ValueError, "another model"),
        ({"batches": [torch.tensor([[3, 50]])]}, ValueError, "from 0 to 49"),
        ({"batches": batches(1), "held_out": [{"input_ids": torch.ones(1, 0, dtype=torch.long)}]}, ValueError, "empty"),
        ({"batches": batches(1), "method": "best"}, ValueError, "method: expected one of sequential"),
        ({"batches": batches(1), "tokens_at_once": 0}, ValueError, "tokens_at_once: expected at least 1"),
        ({"batches": batches(1), "dampening": 1.0}, TypeError, "dampening"),
        ({"damping": 0.2}, TypeError, "expected batches"),
        ({"batches": batches(1), "quantizer": lambda values, old: old}, ValueError, "quantizer: expected None"),
        ({"batches": batches(1), "names": ["other"]}, ValueError, "'other'"),
        ({"batches": batches(1), "names": []}, ValueError, "expected active adapters"),
    ],
)
def test_what_is_refused_leaves_the_model(options, error, message):
    """A typing mistake must not cost the adapter."""
    model = trained().train()
    before, active = snapshot(model.model), model.active_adapters
    with pytest.raises(error, match=message):
        merge(model, **options)
    assert_untouched(model.model, before)
    assert model.active_adapters == active and all(module.training for module in model.modules())
    assert by_hand(model.eval(), held_out(1)) < 5


def test_a_model_that_is_not_in_4_bits_is_refused():
    """It would be returned dense, though the user asked for 4 bits."""
    for model in (
        LoraModel(mlp(), LoraConfig(target_modules=["first"])),
        QLoRAModel(mlp(), QLoRAConfig(target_modules=["first"], quantization="int8")),
    ):
        randomize(model)
        with pytest.raises(ValueError, match="4 bits"):
            merge(model, batches=[{"x": torch.randn(4, 40)}])
    with pytest.raises(ValueError, match="into='quantized'"):
        trained().merge_and_unload(batches=batches(1))


def test_a_failure_in_the_middle_changes_nothing(monkeypatch):
    """Hours into a merge the memory runs out: the adapter has to be there still, and the losses too."""
    model = trained()
    before, loss, calls = snapshot(model.model), by_hand(model, held_out(1)), []
    real = walk.quantize_layers

    def failing(*args):
        calls.append(args)
        if len(calls) == 6:
            raise MemoryError("no more")
        return real(*args)

    monkeypatch.setattr(walk, "quantize_layers", failing)
    with pytest.raises(MemoryError):
        merge(model, batches=batches(2), method="static")
    assert_untouched(model.model, before)
    assert by_hand(model, held_out(1)) == loss


def test_a_classifier_is_measured_by_its_own_labels():
    """An encoder's head trains whole: it is merged as it is, and the layers below by the data."""
    wrapped = randomize(QLoRAModel(bert(), QLoRAConfig(rank=4)))
    with torch.no_grad():
        wrapped.model.classifier.modules_to_save["default"].weight.mul_(3)
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(4):
        ids = torch.randint(3, 50, (6, 8), generator=generator)
        with torch.no_grad():
            data.append({"input_ids": ids, "labels": wrapped(input_ids=ids).logits.argmax(-1)})
    plain, report = merge(wrapped, batches=data)
    assert report.recovery > 0.5 and report.losses.labels == 6
    assert report.losses.merged == pytest.approx(plain(**data[-1]).loss.item(), abs=1e-6)
    without = QLoRAModel(bert(), QLoRAConfig(rank=4))
    _, report = merge(randomize(without), batches=[{"input_ids": batch["input_ids"]} for batch in data], method="scale")
    assert report.losses is None and report.calibration.batches == 4 and "no labels" in report.notes[0]


def test_what_layers_see_in_training_is_kept_by_option():
    """Without data a merge can at least weight its search; nobody pays for that who does not ask."""
    torch.manual_seed(0)
    model = QLoRAModel(mlp(), QLoRAConfig(target_modules=["first"], rank=4))
    layer = model.model.first
    x = [torch.randn(rows, 40) * torch.logspace(-1, 1, 40) for rows in (2, 5)]
    model.train()
    layer(x[0])
    assert "input_squares" not in dict(layer.named_buffers())
    model.track_input_squares()
    for rows in x:
        layer(rows)
    model.eval()
    layer(x[0] * 100)
    torch.testing.assert_close(layer.input_squares, torch.cat(x).square().mean(0))
    assert not any("squares" in key for key in model.state_dict())
    randomize(model)
    wanted = layer.merged_values(layer.active)
    expected = lowbit.quantize(wanted, scale="search", importance=layer.input_squares).dequantize()
    plain, _ = merge(model, minimum_cosine=-1.0)
    assert torch.equal(plain.first.weight.dequantize(), expected)
    again = QLoRAModel(mlp(), QLoRAConfig(target_modules=["first"], rank=4))
    again.track_input_squares()
    again.track_input_squares(False)
    assert not [name for name, _ in again.named_buffers() if "squares" in name or "seen" in name]


def test_a_single_layer_merges_by_its_own_inputs():
    """A layer that is used alone has no model that could do it."""
    torch.manual_seed(0)
    layer = QLoRALinear(128, 32, bias=False, rank=4)
    with torch.no_grad():
        layer.factors()[1].normal_(std=0.02)
    x = torch.randn(400, 128) @ torch.randn(128, 128) * 0.1
    expected, errors = layer(x).detach(), {}
    for how, quantizer in (("search", None), ("inputs", layer.calibrated_quantizer(x))):
        layer.merge(into="quantized", minimum_cosine=-1.0, quantizer=quantizer)
        errors[how] = (layer(x) - expected).square().mean().item()
        layer.unmerge()
    assert errors["inputs"] < 0.7 * errors["search"]


def test_the_result_trains_on_and_bitsandbytes_loads_it(tmp_path):
    """The shipped folder would be for one library alone, or the end of the model's training."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    plain, report = merge(trained(), batches=batches(4), held_out=held_out())
    plain.save_pretrained(tmp_path / "own")
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own").eval()
    assert by_hand(own, held_out()) == by_hand(plain, held_out())
    plain.save_pretrained(tmp_path / "theirs", format="bitsandbytes")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    theirs.train()  # for inference it rounds to bfloat16 on some CPUs; there is no dropout
    assert "bitsandbytes" in type(theirs.model.layers[0].mlp.up_proj).__module__
    assert by_hand(theirs, held_out()) == pytest.approx(report.losses.merged, abs=1e-3)
    again = QLoRAModel(own, QLoRAConfig(rank=4))
    before = by_hand(again, held_out())
    fit(again, 10, 1e-3)
    assert by_hand(again, held_out()) < before
