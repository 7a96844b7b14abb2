"""lowbit_lora/calibrate: whole models, quantized by what their layers see of data."""

import copy
import json
import sys
import warnings

import pytest
import torch
from conftest_calibrate import batches_of, error, killed_after, model_of, outputs
from conftest_models import assert_untouched, mlp, snapshot
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit_lora import calibrate
from lowbit_lora.calibrate import blocks, room, stages
from lowbit_lora.calibrate.state import State

transformers = pytest.importorskip("transformers", minversion="5")

FAMILIES = ["Llama", "Mistral", "Qwen3", "Gemma2", "Phi", "Phi3", "GPT2", "Bert", "ViT", "Mixtral"]
#: By family, the weights that are in no block.
UNPLACED = {"Bert": ["pooler.dense.weight"], "ViT": ["pooler.dense.weight"]}


def run(model, batches, method="sequential", **options):
    return calibrate(model, batches, method, progress=False, **options)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.dequantize() for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.filterwarnings("ignore:.*experts had fewer tokens")
@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_loses_less_than_quantizing_without_data(family):
    """Whatever the architecture, its blocks are found, and what a user pays in time comes back as quality."""
    model, batches = model_of(family), batches_of(family)
    dense = outputs(model, batches)
    without = {how: lowbit.quantize_(copy.deepcopy(model), scale=how) for how in ("absmax", "search")}
    report = run(model, batches)
    assert weights(model).keys() == weights(without["absmax"]).keys()
    assert {row.name for row in report.layers} == weights(model).keys()
    assert report.unplaced == UNPLACED.get(family, [])
    assert all(row.final <= row.search for row in report.layers if row.final is not None)
    found = error(model, dense, batches)
    assert found < min(error(other, dense, batches) for other in without.values())


def test_each_method_is_better_than_the_one_before():
    """The slower methods are worth their time where inputs are correlated, as those of real models are."""
    model, batches = model_of("Llama", num_hidden_layers=3), batches_of("Llama", count=8, rows=8)
    mixing = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(0, -2, 64)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ mixing)
    dense, losses = outputs(model, batches), {}
    for how in ("absmax", "scale", "static", "sequential"):
        other = copy.deepcopy(model)
        lowbit.quantize_(other) if how == "absmax" else run(other, batches, how)
        losses[how] = error(other, dense, batches)
    assert losses["sequential"] < 0.8 * losses["static"]
    assert losses["static"] < 0.8 * losses["scale"]
    assert losses["scale"] < losses["absmax"]


def test_stages_of_a_llama():
    """Layers that share an input share a Gram matrix, and the output and down projections know their residual stream:
    without it "sequential" repeats the error of all layers before.
    """
    model, batches = model_of("Llama"), batches_of("Llama")
    (chain,), really = blocks.trace(model, batches[0], blocks.candidates(model, set(model.modules())))
    assert chain.name == "model.layers" and not really
    block = chain.blocks["model.layers.1"]
    names = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        qkv, out, up, down = stages.find(block, chain.probes[1], names, set())
    assert qkv.layers == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert qkv.attended == {"self_attn.k_proj", "self_attn.v_proj"} and not qkv.residuals
    assert up.layers == ["mlp.gate_proj", "mlp.up_proj"] and not up.residuals and not up.attended
    assert out.residuals == {"self_attn.o_proj": stages.Place("", False)}
    assert down.residuals == {"mlp.down_proj": stages.Place("post_attention_layernorm", False)}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_tokens_count_by_the_attention_they_receive(implementation):
    """Keys and values that nobody attends to need no precision; both ways to compute attention say who does."""
    from lowbit_lora.calibrate.watch import Worker

    model, batches = model_of("Mistral", attn_implementation=implementation), batches_of("Mistral")
    (chain,), _ = blocks.trace(model, batches[0], blocks.candidates(model, set(model.modules())))
    with torch.no_grad():
        list(blocks.record(model, batches, [chain], really=False))
        block = chain.blocks["model.layers.0"]
        names = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        worker = Worker(block, stages.find(block, chain.probes[0], names, set()), attention=True)
        seen = worker.run(chain.calls[0][0], chain.hidden[0])
        model.set_attn_implementation("eager")
        attention = model(**batches[0], output_attentions=True).attentions[0]
    expected = attention.mean(1).sum(1).reshape(-1)
    assert seen.received.keys() == {0}
    torch.testing.assert_close(seen.received[0], expected)
    assert seen.received[0].mean() == pytest.approx(1)


@pytest.mark.parametrize("method", ["static", "sequential"])
def test_batches_may_be_joined_or_apart_and_wait_on_a_disk(method, tmp_path):
    """A user who has little memory gets the same model, later."""
    model, batches = model_of("Llama"), batches_of("Llama")
    apart, disk = copy.deepcopy(model), copy.deepcopy(model)
    report = run(model, batches, method)
    run(apart, batches, method, tokens_at_once=48)
    run(disk, batches, method, tokens_at_once=48, activations=tmp_path / "activations")
    assert_same_weights(apart, disk)
    assert not list((tmp_path / "activations").iterdir())
    dense = outputs(model_of("Llama"), batches)
    # Sums in another order: other roundings, and now and then another code.
    assert error(apart, dense, batches) == pytest.approx(error(model, dense, batches), rel=0.1)
    assert report.tokens == 3 * 4 * 12 and report.batches == 3


def test_hidden_tokens_do_not_count():
    """Padding is no data: a padded batch calibrates as the rows without it would."""
    model = model_of("Llama")
    padded, (batch,) = copy.deepcopy(model), batches_of("Llama", count=1)
    ids = torch.cat([batch["input_ids"], torch.zeros(4, 5, dtype=torch.long)], 1)
    mask = (torch.arange(17) < 12).long().expand(4, -1)
    run(model, [batch], "static")
    report = run(padded, [{"input_ids": ids, "attention_mask": mask}], "static")
    assert report.tokens == 48 and all(row.tokens == 48 for row in report.layers)
    dense = outputs(model_of("Llama"), [batch])
    assert error(padded, dense, [batch]) == pytest.approx(error(model, dense, [batch]), rel=0.1)


@pytest.mark.parametrize("method", ["scale", "sequential"])
def test_a_killed_run_goes_on_where_it_was(method, tmp_path, monkeypatch):
    """Hours of work outlive a kill, and the result is that of a run in one piece."""
    model, batches = model_of("Llama", num_hidden_layers=3), batches_of("Llama")
    whole, before = copy.deepcopy(model), snapshot(model)
    expected = run(whole, batches, method)
    with killed_after(2):
        run(model, batches, method, resume=tmp_path)
    assert_untouched(model, before)
    saved = []
    monkeypatch.setattr(State, "save", lambda self, chain, number, *a, **k: saved.append(number))
    report = run(model, batches, method, resume=str(tmp_path))
    assert saved == [2]
    assert_same_weights(model, whole)
    assert report.layers == expected.layers


def test_the_folder_of_another_run_is_refused(tmp_path):
    """Blocks of other data, another model or another method must not end up in one model."""
    batches = batches_of("Llama")
    run(model_of("Llama"), batches, "static", resume=tmp_path)
    for model, data, method in (
        (model_of("Llama"), batches[:2], "static"),
        (model_of("Llama"), batches, "scale"),
        (model_of("Llama", seed=1), batches, "static"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"resume: expected the folder of this run.*(data|method|other values)"):
            run(model, data, method, resume=tmp_path)
        assert_untouched(model, before)


@pytest.mark.parametrize(
    ("batches", "error_type", "message"),
    [
        ([], ValueError, "at least one batch"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long)}, TypeError, "put it into a list"),
        ([{"input_ids": torch.zeros(0, 4, dtype=torch.long)}], ValueError, r"batches\[0\].*empty"),
        ([{}], ValueError, r"batches\[0\].*'input_ids'"),
        ([{"input_ids": torch.tensor([[3, 50]])}], ValueError, "from 0 to 49.*got 50"),
        ([{"input_ids": torch.tensor([[3, -1]])}], ValueError, "from 0 to 49.*got -1"),
        ([{"input_ids": torch.rand(1, 4)}], TypeError, "integers"),
        ([{"attention_mask": torch.ones(1, 4)}], ValueError, "expected the key 'input_ids'.*attention_mask"),
        ([{"pixel_values": torch.ones(1, 3, 8, 8)}], ValueError, "'pixel_values'.*another model"),
        (["text"], TypeError, r"batches\[0\].*str"),
    ],
)
def test_data_of_another_model_is_refused(batches, error_type, message):
    """Before any work a user hears which batch is wrong, and how."""
    model = model_of("Llama")
    before = snapshot(model)
    with pytest.raises(error_type, match=message):
        run(model, batches)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method: expected one of sequential, static, scale"),
        ({"damping": 0.0}, "damping"),
        ({"shift": 1.5}, "shift: expected a number from 0 to 1"),
        ({"ridge": -1.0}, "ridge"),
        ({"spec": lowbit.WeightSpec("int8")}, "spec: expected a format in 4 bits"),
        ({"skip": ["nothing"]}, "skip"),
    ],
)
def test_wrong_arguments(options, message):
    """Each is named before any work."""
    with pytest.raises(ValueError, match=message):
        run(model_of("Llama"), batches_of("Llama"), **options)


def test_quantized_and_absent_weights_are_refused():
    """Quantizing twice would lose twice."""
    with pytest.raises(ValueError, match="quantized already"):
        run(lowbit.quantize_(model_of("Llama")), batches_of("Llama"))
    with torch.device("meta"):
        absent = model_of("Llama")
    with pytest.raises(ValueError, match="meta device"):
        run(absent, batches_of("Llama"))


@pytest.mark.parametrize("method", ["static", "sequential"])
def test_activations_that_overflow_name_their_layer(method):
    """A model whose activations are NaN cannot be calibrated; which layer makes them is what its owner needs."""
    model = model_of("Llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e25)
        model.model.layers[1].mlp.up_proj.weight.mul_(1e25)
    model.train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1.*NaN or inf"):
        run(model, batches_of("Llama"), method)
    assert_untouched(model, before)
    assert all(module.training for module in model.modules())


def test_too_little_memory_or_disk_is_said_before_the_first_layer(tmp_path, monkeypatch):
    """Not after an hour."""
    model = model_of("Llama")
    before = snapshot(model)
    monkeypatch.setattr(room, "host_memory", lambda: 1000)
    with pytest.raises(MemoryError, match="expected about .* of free memory"):
        run(model, batches_of("Llama"))
    monkeypatch.undo()
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="resume: expected about .* of free disk"):
        run(model, batches_of("Llama"), resume=tmp_path)
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["scale", "static", "sequential"])
def test_dead_channels_zero_groups_and_massive_tokens(method):
    """What real models have: no NaN comes of it, and nothing is worse than the search."""
    model = model_of("Llama", intermediate_size=96, hidden_size=80, head_dim=40)  # rows cut blocks
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 0
        model.model.embed_tokens.weight[7] *= 1e4
        model.model.layers[0].input_layernorm.weight[5:9] = 0
        model.model.layers[1].mlp.down_proj.weight[:40] = 0
    report = run(model, batches_of("Llama", count=1, rows=1, length=9), method)  # fewer tokens than channels
    assert all(torch.isfinite(weight).all() for weight in weights(model).values())
    assert all(row.final <= row.search for row in report.layers)


def test_experts_without_tokens_are_searched_with_one_warning():
    """A mixture's rare experts keep their quality, and the user learns that more data would help."""
    model = model_of("Mixtral", num_local_experts=8)
    with torch.no_grad():  # none of the tokens goes to the last experts
        for layer in model.model.layers:
            layer.mlp.gate.weight[4:] = layer.mlp.gate.weight[:1] * 0
            layer.mlp.gate.weight[:4] *= 50
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = run(model, batches_of("Mixtral", count=1), "static")
    said = [str(entry.message) for entry in caught if "experts" in str(entry.message)]
    assert len(said) == 1 and "searched" in said[0]
    assert all(row.final <= row.search for row in report.layers if "experts" in row.name)
    assert torch.isfinite(outputs(model, batches_of("Mixtral"))).all()


def test_a_model_without_blocks_is_searched_by_its_mean_squares():
    """Any module can be calibrated; where no chain of blocks is found the report says so by name."""
    model = mlp()
    batches = [{"x": torch.randn(8, 40)} for _ in range(2)]
    report = run(model, batches)
    assert sorted(report.unplaced) == ["first.weight", "head.weight", "second.weight"]
    assert {row.chosen for row in report.layers} == {"weighted search"}
    assert any("first.weight" in note for note in report.notes)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_calibrated_model_is_saved_and_loaded(family, tmp_path):
    """The files are those of any other 4-bit model, and say how it was calibrated; bitsandbytes' folder too."""
    from safetensors import safe_open

    model_of(family).save_pretrained(tmp_path / "dense")
    batches = batches_of(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).eval()
    report = run(model, batches)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    expected = outputs(model, batches)
    model.save_pretrained(tmp_path / "own")
    loaded = type(model).from_pretrained(tmp_path / "own").eval()
    assert_same_weights(model, loaded)
    assert torch.equal(outputs(loaded, batches), expected)
    with safe_open(tmp_path / "own" / "model.safetensors", "pt") as file:
        said = json.loads(file.metadata()["lowbit_calibration"])
    assert said["method"] == "sequential" and said["tokens"] == report.tokens and said["data"] == report.data
    model.save_pretrained(tmp_path / "theirs", format="bitsandbytes")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]["load_in_4bit"]


def test_the_report_can_be_read_drawn_and_stored(tmp_path):
    """What a user looks at before trusting the model."""
    rich = pytest.importorskip("rich.console")
    report = run(model_of("Llama"), batches_of("Llama"), "static")
    console = rich.Console(record=True, width=160)
    console.print(report.table())
    text = console.export_text()
    assert all(row.name in text for row in report.layers) and "144 tokens" in text
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["chosen"] == "descent"
    report.plot(str(tmp_path / "errors.png"))
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_shared_weights_stay_shared_and_skipped_ones_dense():
    """As with lowbit.quantize_: the head and what a user names keep their precision."""
    model = model_of("Llama", tie_word_embeddings=True)
    run(model, batches_of("Llama"), "scale", skip=["layers.1"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not isinstance(model.lm_head.weight, QuantizedTensor)
    assert {name.split(".")[2] for name in weights(model)} == {"0"}


def test_bitsandbytes_decodes_what_was_calibrated(monkeypatch):
    """Every other reader of the format gets the better model too; the benchmark's check is this one."""
    theirs = pytest.importorskip("bitsandbytes.functional")
    import bench_calibrate

    model = model_of("Llama")
    run(model, batches_of("Llama"))
    assert bench_calibrate.check_against_bitsandbytes(model) == 14
    decode = theirs.dequantize_4bit
    monkeypatch.setattr(theirs, "dequantize_4bit", lambda *args: decode(*args) * 1.001)
    with pytest.raises(AssertionError, match="decodes other values"):
        bench_calibrate.check_against_bitsandbytes(model)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stay_in_their_file(tmp_path, monkeypatch):
    """A model larger than memory is calibrated from its shards: from_pretrained maps them, and nothing reads a model
    into memory as a whole.
    """

    def anonymous() -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

    run(model_of("Llama"), batches_of("Llama"), "scale")  # what libraries allocate once
    model_of("Llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=12).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    size = sum(parameter.nbytes for parameter in model.parameters()) // 1024
    before, held = anonymous(), []
    monkeypatch.setattr(State, "save", lambda *args, **kwargs: held.append(anonymous() - before))
    run(model, batches_of("Llama"), "scale")
    assert len(held) == 12 and max(held) < size / 2, (held, size)
