"""The command line, as users run it."""

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest_models import assert_as_precise
from forked import in_child
from hf_models import GPT2, IDS, SIZES, assert_same, assert_same_tensor, load, save_dense, stored
from safetensors.torch import load_file
from small_disk import small_files

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel  # noqa: E402
from lowbit_lora.cli import main, rows  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["<pad>", "</s>", "<user>", "<assistant>", "good", "bad", "yes", "no", "film", "a", "the", "was"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test waits for a hub that is not there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tokenizer(template: str | None = TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {word: number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(known, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer; its head is large enough to be sure of a word."""
    path = save_dense(tmp_path_factory.mktemp("dense"), **SIZES, initializer_range=0.2)
    tokenizer().save_pretrained(path)
    return path


def printed(capsys, *arguments) -> dict:
    """The report of a command that succeeds."""
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments) -> str:
    """The message of a command that cannot do it."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.err.count("lowbit: error: ") == 1
    return captured.err.partition("lowbit: error: ")[2]


def write_rows(path: Path, some: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


# ---- quantize and convert


def test_quantize_writes_a_whole_folder(folder, tmp_path, capsys):
    """The folder would not load, be dense, or lack its tokenizer."""
    about = printed(
        capsys, "quantize", folder, tmp_path / "q", "--format", "fp4", "--block-size", 32, "--skip", "k_proj"
    )
    model = load(tmp_path / "q")
    weights = stored(model)
    assert len(weights) == 12 and not any("k_proj" in name for name in weights)
    assert {w.spec.text for w in weights.values()} == {about["weights"]}
    assert about["stored_bytes"] < about["dense_bytes"]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "q").chat_template == TEMPLATE
    assert "quantized" in refused(capsys, "quantize", tmp_path / "q", tmp_path / "again")
    assert "OUT" in refused(capsys, "quantize", folder, folder)


def test_convert_both_ways_is_byte_for_byte(folder, tmp_path, capsys):
    """Another library's reader would find other weights, or none."""
    printed(capsys, "quantize", folder, tmp_path / "q")
    printed(capsys, "convert", tmp_path / "q", tmp_path / "b", "--to", "bitsandbytes")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    printed(capsys, "convert", tmp_path / "b", tmp_path / "l", "--to", "lowbit")
    assert_same(load(tmp_path / "q"), load(tmp_path / "l"))
    printed(capsys, "quantize", folder, tmp_path / "direct", "--as", "bitsandbytes")
    direct, through = (load_file(tmp_path / name / "model.safetensors") for name in ("direct", "b"))
    assert direct.keys() == through.keys()
    for name, tensor in direct.items():
        assert_same_tensor(tensor, through[name], name)
    assert "lowbit quantize --as bitsandbytes" in refused(
        capsys, "convert", folder, tmp_path / "x", "--to", "bitsandbytes"
    )


# ---- GGUF


def bpe_folder(path: Path, name: str) -> Path:
    """A tiny model with a byte-level tokenizer like that of SmolLM."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {text: number for number, text in enumerate([*alphabet, "he", "ll", "hell"])}
    inner = Tokenizer(models.BPE(known, [("h", "e"), ("l", "l"), ("he", "ll")]))
    digits, whole = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence([digits, whole]), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<end>", special=True)])
    save_dense(path, name, vocab_size=272, **{k: v for k, v in SIZES.items() if k != "vocab_size"})
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    made.chat_template = TEMPLATE
    made.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_gguf_is_loaded_back(tmp_path, capsys, name):
    """llama.cpp would run a model with turned heads, or another tokenizer."""
    folder = bpe_folder(tmp_path / "dense", name)
    about = printed(capsys, "convert", folder, tmp_path / "m.gguf", "--to", "gguf", "--stored-as", "f32")
    assert about["stored_bytes"] == os.path.getsize(tmp_path / "m.gguf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.bfloat16)
    dense = load(folder)
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, dense(IDS).logits)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "hello 42 <end> ünd"
    assert theirs(text).input_ids == ours(text).input_ids and theirs.chat_template == TEMPLATE


@pytest.mark.parametrize("stored_as", ["f16", "bf16", "q8_0", "q4_0"])
def test_gguf_stores_quantized_weights_anew(folder, tmp_path, capsys, stored_as):
    """The file would hold packed codes, or blocks of another size than it says."""
    import gguf

    printed(capsys, "quantize", folder, tmp_path / "q")
    file = tmp_path / "m.gguf"
    printed(capsys, "convert", tmp_path / "q", file, "--to", "gguf", "--stored-as", stored_as, "--no-tokenizer")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    model = load(tmp_path / "q")
    assert len(tensors) == len(list(model.parameters()))
    down = model.model.layers[1].mlp.down_proj.weight.dequantize(torch.float32)
    read = torch.from_numpy(gguf.quants.dequantize(tensors["blk.1.ffn_down.weight"].data, kind_of(gguf, stored_as)))
    # Half a unit of fp16 and bf16, half a step of Q8_0, and a step of Q4_0, which has 8 on one side and 7 on the other;
    # the scales are in fp16.
    steps = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 0.5 / 127 + 2**-11, "q4_0": 1 / 8 + 2**-11}[stored_as]
    limit = steps * down.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True).expand(-1, -1, 32).flatten(1)
    assert ((read - down).abs() <= limit).all()


def kind_of(gguf, stored_as: str):
    return gguf.GGMLQuantizationType[stored_as.upper()]


def test_gguf_refuses_what_it_has_no_names_for(tmp_path, capsys):
    """A file would be written that computes something else."""
    folder = save_dense(tmp_path / "gpt2", "GPT2LMHeadModel", **GPT2)
    target = ("--to", "gguf", "--no-tokenizer")
    assert "'gpt2'" in refused(capsys, "convert", folder, tmp_path / "m.gguf", *target)
    scaled = SIZES | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    llama = save_dense(tmp_path / "scaled", **scaled)
    assert "rope_type" in refused(capsys, "convert", llama, tmp_path / "m.gguf", *target)
    tokenizer().save_pretrained(llama)
    assert "byte-level" in refused(capsys, "convert", save_dense(llama), tmp_path / "m.gguf", "--to", "gguf")
    assert ".gguf" in refused(capsys, "convert", llama, tmp_path / "m", *target)
    assert not list(tmp_path.glob("*.gguf"))


# ---- train, merge and generate

CHATS = [
    {"messages": [{"role": "user", "content": f"the film was {a}"}, {"role": "assistant", "content": b}]}
    for a, b in [("good", "yes"), ("bad", "no")] * 4
]
QUICK = ("--cpu", "--batch-size", 4, "--learning-rate", 0.02, "--rank", 4, "--warmup-steps", 0)


def test_train_merge_and_generate_conversations(folder, tmp_path, capsys):
    """The adapter would not be saved, not be learnt, or merged into another model than was trained."""
    chats, out = write_rows(tmp_path / "chats.jsonl", CHATS), tmp_path / "adapter"
    metrics = printed(capsys, "train", folder, chats, out, *QUICK, "--epochs", 8, "--eval-data", chats)
    assert metrics["task"] == "chat" and metrics["steps"] == 16
    assert metrics["eval_loss"] < 0.5 < metrics["eval_loss_before"]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    about = printed(capsys, "generate", folder, "--prompt", "the film was bad", "--adapter", out, "--max-new-tokens", 1)
    assert about["text"].strip() == "no" and about["tokens"] == 1

    adapted = QLoRAModel.from_pretrained(load(folder, dtype=torch.float32), out)
    printed(capsys, "merge", folder, out, tmp_path / "merged")
    merged = load(tmp_path / "merged")  # as vLLM does: strictly, by transformers' names
    assert not stored(merged) and merged.dtype == torch.bfloat16
    printed(capsys, "merge", folder, out, tmp_path / "wide", "--dtype", "float32")
    with torch.no_grad():
        assert_as_precise(adapted(IDS).logits, load(tmp_path / "wide"), lambda model: model(IDS).logits)

    report = printed(capsys, "merge", folder, out, tmp_path / "small", "--into", "quantized")
    assert report["layers"] == 14 and 0 < report["least_kept"] <= 1
    assert len(stored(load(tmp_path / "small"))) == 14


def test_train_classifies_by_a_yaml_file(folder, tmp_path, capsys):
    """A run would ignore its file, or a flag beside it."""
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "label"), *[("the film was good", "up"), ("the film was bad", "down")] * 6])
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"model: {folder}\ndata: {tmp_path / 'rows.csv'}\nout: {tmp_path / 'out'}\nrank: 2\nepochs: 9\nmethod: lora\n"
        "learning_rate: 0.01\ncpu: true\neval-share: 0.25\n"
    )
    metrics = printed(capsys, "train", "--config", settings, "--epochs", 6)
    assert metrics["task"] == "classification" and metrics["steps"] == 12
    assert metrics["eval_rows"] == 3 and metrics["train_rows"] == 9 and metrics["eval_accuracy"] == 1
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["r"] == 2 and "score" in str(written["modules_to_save"])
    settings.write_text("ranks: 3\n")
    assert main(["train", "--config", str(settings)]) == 2
    assert "ranks" in capsys.readouterr().err


def test_train_goes_on_from_a_checkpoint(folder, tmp_path, capsys):
    """A run that was interrupted would begin again."""
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "the film was good </s> a film"}] * 8)
    quick = ("train", folder, texts, tmp_path / "out", *QUICK, "--save-steps", 1)
    assert printed(capsys, *quick, "--max-steps", 1)["task"] == "causal-lm"
    assert not list((tmp_path / "out" / "checkpoint-1").glob("model*"))
    assert printed(capsys, *quick, "--max-steps", 3, "--resume")["steps"] == 3


def test_only_what_the_assistant_says_is_learnt():
    """The model would learn to ask, or not to end its answers."""
    (row,) = rows.chats(CHATS[:1], tokenizer(), 64, True)
    kept = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != rows.IGNORED]
    assert tokenizer().decode(kept).split() == ["yes", "</s>"]
    said = (
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}"
    )
    marked = TEMPLATE.replace("{{ message['content'] }}", said + "{{ message['content'] }}{% endif %}")
    (row,) = rows.chats(CHATS[:1], tokenizer(marked), 64, True)
    assert [label for label in row["labels"] if label != rows.IGNORED] == [WORDS.index("yes")]
    (row,) = rows.chats(CHATS[:1], tokenizer(), 64, False)
    assert row["labels"] == row["input_ids"]
    forgets = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="row 1 begins differently"):
        rows.chats([{"messages": CHATS[0]["messages"] * 2}], tokenizer(forgets), 64, True)


def test_batches_are_padded():
    """The model would attend to padding, or learn it."""
    made = rows.padded(7)([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}])
    assert made["input_ids"].tolist() == [[1, 2], [3, 7]] and made["labels"].tolist() == [[1, 2], [3, rows.IGNORED]]
    assert made["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_data_is_read_by_the_library_datasets(tmp_path, monkeypatch):
    """Data sets of the hub and parquet files would be asked for by other names than were given."""
    calls = []

    class Datasets:
        def load_dataset(self, *args, **options):
            calls.append((args, options))
            return [{"text": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets())
    assert rows.read("owner/name:subset", "test") == [{"text": "a"}]
    rows.read("rows.parquet")
    assert calls[0] == (("owner/name", "subset"), {"split": "test"})
    assert calls[1] == (("parquet",), {"data_files": "rows.parquet", "split": "train"})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="lowbit\\[data\\]"):
        rows.read("owner/name")


def test_mistakes_in_data_are_named(folder, tmp_path, capsys):
    """A user would look for the row among thousands."""
    train = ("train", folder)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    assert "line 2" in refused(capsys, *train, broken, tmp_path / "out")
    gaps = write_rows(tmp_path / "gaps.jsonl", [{"text": "a"}, {"other": 1}])
    assert "row 2" in refused(capsys, *train, gaps, tmp_path / "out", "--task", "causal-lm")
    columns = write_rows(tmp_path / "columns.jsonl", [{"prompt": "a"}])
    assert "'messages'" in refused(capsys, *train, columns, tmp_path / "out")
    assert "No such file" in refused(capsys, *train, tmp_path / "none.jsonl", tmp_path / "out")
    (tmp_path / "rows.xls").write_text("")
    assert ".parquet" in refused(capsys, *train, tmp_path / "rows.xls", tmp_path / "out")
    one = write_rows(tmp_path / "one.jsonl", [{"text": "a", "label": 1}] * 3)
    assert "two labels" in refused(capsys, *train, one, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_of_a_peft_adapter_does_not_quantize(folder, tmp_path, capsys):
    """A base that was dense in training would lose precision by merging."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(load(folder, dtype=torch.float32), settings)
    adapted.save_pretrained(tmp_path / "peft")
    printed(capsys, "merge", folder, tmp_path / "peft", tmp_path / "merged", "--dtype", "float32")
    found, expected = load(tmp_path / "merged"), adapted.merge_and_unload()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, atol=2**-8, rtol=2**-8)


# ---- files that break, or cannot be written


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {"": folder.read_bytes()}


def test_a_full_disk_leaves_the_old_files(folder, tmp_path, capsys):
    """The only copy of a model would be lost to its own new version, or a user read a stack trace."""
    printed(capsys, "quantize", folder, tmp_path / "q")
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "the film was good </s> a film"}] * 4)
    for out, command in {
        "adapter": ("train", folder, texts, tmp_path / "adapter", *QUICK, "--max-steps", 1),
        "again": ("quantize", folder, tmp_path / "again"),
        "b": ("convert", tmp_path / "q", tmp_path / "b", "--to", "bitsandbytes"),
        "m.gguf": ("convert", tmp_path / "q", tmp_path / "m.gguf", "--to", "gguf", "--no-tokenizer"),
        "merged": ("merge", folder, tmp_path / "adapter", tmp_path / "merged"),
    }.items():
        printed(capsys, *command)
        before = files(tmp_path / out)
        with small_files(3000):
            error = refused(capsys, *command)
        assert str(tmp_path) in error and ("too large" in error or "could not be written" in error)
        assert files(tmp_path / out) == before
        assert not list(tmp_path.glob(".*"))


def test_broken_files_are_named(folder, tmp_path, capsys):
    """A user would not know which of a model's many files to fetch again."""
    model = save_dense(tmp_path / "model", **SIZES, shards="60KB")
    tokenizer().save_pretrained(model)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "a film"}] * 4)
    shard = sorted(model.glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    commands = (
        ("quantize", model, tmp_path / "out"),
        ("train", model, texts, tmp_path / "out", "--method", "lora", *QUICK),
        ("generate", model, "--prompt", "a"),
    )
    for command in commands:
        shard.write_bytes(whole[:-10])
        assert f"{shard}: expected a whole file, but it is truncated or corrupt" in refused(capsys, *command)
        shard.unlink()
        assert shard.name in refused(capsys, *command)
    assert not (tmp_path / "out").exists()


# ---- calibration


def test_quantize_and_merge_by_data(folder, tmp_path, capsys):
    """Both would quantize without the data, not say what is kept, or write what nothing loads."""
    chats, out = write_rows(tmp_path / "chats.jsonl", CHATS), tmp_path / "adapter"
    printed(capsys, "train", folder, chats, out, *QUICK, "--epochs", 2)
    data = ("--calibrate", chats, "--method", "static")
    about = printed(capsys, "merge", folder, out, tmp_path / "merged", "--into", "nf4", *data, "--as", "bitsandbytes")
    assert about["layers"] == 14 and about["least_cosine"] > 0.97 and about["calibration_tokens"] > 0
    assert about["recovery"] is None or about["recovery"] <= 2
    assert about["loss_merged"] == pytest.approx(about["loss_with_adapter"], abs=0.2)
    assert any("held out" in note for note in about["notes"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    assert (tmp_path / "merged" / "calibration.png").stat().st_size > 1000

    (tmp_path / "text.txt").write_text("the film was good a bad film was no film yes " * 20)
    options = ("--calibrate", tmp_path / "text.txt", "--max-length", 20, "--plot", tmp_path / "errors.png")
    about = printed(capsys, "quantize", folder, tmp_path / "small", *options, "--method", "scale")
    assert about["method"] == "scale" and about["layers"] == 14 and about["calibration_tokens"] == 11 * 20
    assert 0 < about["median_error_of_absmax"] <= 1
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert len(stored(load(tmp_path / "small"))) == 14
    assert main(["quantize", str(folder), str(tmp_path / "table"), *map(str, options), "--method", "scale"]) == 0
    assert "scale: 14 weights on 220 tokens" in " ".join(capsys.readouterr().out.split())

    (tmp_path / "little.txt").write_text("good")
    calibrate = ("--calibrate", tmp_path / "little.txt")
    assert "too little" in refused(capsys, "quantize", folder, tmp_path / "no", *calibrate)
    assert "--head" in refused(capsys, "quantize", folder, tmp_path / "no", *calibrate, "--head")
    assert "No such file" in refused(capsys, "quantize", folder, tmp_path / "no", "--calibrate", tmp_path / "none.txt")
    assert "--into" in refused(capsys, "merge", folder, out, tmp_path / "no", *calibrate)
    small = ("merge", tmp_path / "small", out, tmp_path / "no")
    assert "base with nf4" in refused(capsys, *small, "--into", "fp4")
    assert not (tmp_path / "no").exists()


# ---- memory, doctor, and the command itself


def test_memory_of_a_step_is_what_it_allocates():
    """A user would buy the wrong GPU: the bytes on a model small enough to run are counted as it runs."""
    from lowbit_lora.memory import Setting, estimate
    from lowbit_lora.memory.simulate import LiveBytes

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 5}, use_cache=False)
    for method, wrap in (
        ("full", lambda model: model),
        ("lora", lambda model: LoraModel(model, LoraConfig())),
        ("qlora", lambda model: QLoRAModel(model, QLoRAConfig())),
    ):
        model = wrap(transformers.LlamaForCausalLM(config)).train()
        live = LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        ids = torch.zeros(2, 32, dtype=torch.long)
        with live:
            model(input_ids=ids, labels=ids.clone()).loss.backward()
        guessed = estimate(config.to_dict(), Setting(method, 2, 32, False, "float32"))
        measured = live.highest.whole + 2 * guessed.gradients
        assert abs(guessed.peak - measured) < 0.001 * measured, (method, guessed.peak, measured)


def test_memory_by_the_command(folder, capsys):
    """The report would miss a method, or say that more is needed for less."""
    about = printed(capsys, "memory", folder, "--length", 64, "--dtype", "float32")
    found = {(row["method"], row["checkpointing"]): row for row in about["estimates"]}
    assert len(found) == 6
    for method in ("full", "lora", "qlora"):
        assert found[method, True]["peak"] < found[method, False]["peak"]
    assert found["qlora", True]["peak"] < found["lora", True]["peak"] < found["full", True]["peak"]
    dense = load(folder, dtype=torch.float32)
    assert found["lora", False]["weights"] == sum(t.nbytes for t in (*dense.parameters(), *dense.buffers()))
    assert found["qlora", True]["fits_on"].startswith("12 GB")
    assert main(["memory"]) == 2


def test_the_page_on_scaling_is_what_the_command_prints():
    """Its numbers would be of another version."""
    from lowbit_lora.cli import memory
    from lowbit_lora.memory import SHAPES, Setting, estimate, per_gpu

    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    for row in memory._known("qlora", Setting(batch=32, length=128), SHAPES["BERT 110M"]):
        assert ["BERT 110M", "32 x 128", *memory._shown(row)[:-1]] in lines
    many = Setting("qlora", 1, 2048, True)
    config = SHAPES["LLaMA 7B"]
    alone = estimate(config, many)
    cells = [f"{per_gpu(config, many, 'fsdp2', n, alone) / 1e9:,.1f}" for n in memory._COUNTS]
    assert ["LLaMA 7B", "fsdp2", *cells] in lines


def test_doctor_names_what_is_missing(capsys):
    """A user who asks for help could not say what runs there."""
    from lowbit_lora.cli import doctor

    about = printed(capsys, "doctor")
    assert about["passed"] and about["packages"]["transformers"] == transformers.__version__
    assert any("self-test" in line for line in about["lowbit"])
    assert doctor._version("no-such-package") is None


def test_exit_codes_of_the_process(folder, tmp_path):
    """A script would go on after a failure; a user would read a stack trace."""
    options = {"capture_output": True, "text": True, "cwd": Path(__file__).parents[1]}
    command = [sys.executable, "-m", "lowbit_lora.cli", "--traceback", "convert", folder, tmp_path / "x"]
    mistake = subprocess.run([*map(str, command), "--to", "lowbit"], **options, check=False)
    assert mistake.returncode == 1 and "Traceback" in mistake.stderr

    def usage() -> int:  # in a fork, which has imported all that a process of its own would
        os.dup2(os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        sys.argv = ["lowbit", "quantize", str(folder)]
        try:
            runpy.run_module("lowbit_lora.cli", run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    assert in_child(usage) == 2 and "out" in (tmp_path / "stderr").read_text()


def test_help_has_examples(capsys):
    """Nobody would know how to begin."""
    for name in ("quantize", "train", "merge", "convert", "generate", "memory", "doctor"):
        assert main([name, "--help"]) == 0
        assert f"lowbit {name}" in capsys.readouterr().out
