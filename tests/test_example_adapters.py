"""The example that serves several adapters, run as a user runs it, on a tiny random BERT and tiny tables."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLE = "serve_many_adapters"
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / f"{EXAMPLE}.py"
WORDS = [f"{first}{second}" for first in "bdfgkl" for second in "aeiou"]
NAMES = ["first", "second"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random BERT of two layers with a vocabulary of WORDS."""
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=32).save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    transformers.set_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Two tables of 60 texts each: first.csv with two labels, second.csv with three."""
    folder = tmp_path_factory.mktemp("tables")
    pick = random.Random(0)
    for name, labels in (("first", ["no", "yes"]), ("second", ["left", "middle", "right"])):
        rows = [(" ".join(pick.choices(WORDS, k=4 + i % 5)), labels[i % len(labels)]) for i in range(60)]
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return [str(folder / f"{name}.csv") for name in NAMES]


@pytest.fixture
def arguments(model_folder, tables, tmp_path):
    return [
        *("--model", str(model_folder), "--tasks", *tables, "--output", str(tmp_path / "out"), "--max-length", "16"),
        *("--batch-size", "8", "--rank", "2", "--requests", "1", "5", "--rounds", "1"),
    ]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_run_writes_everything(example, arguments, tmp_path, method, capsys):
    """A user would miss an adapter or a figure, or get other answers from a mixed batch than from one request."""
    assert example.main([*arguments, "--method", method]) == 0
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [results["tasks"][name]["labels"] for name in NAMES] == [["no", "yes"], ["left", "middle", "right"]]
    assert all((out / "adapters" / name / "adapter_model.safetensors").is_file() for name in NAMES)
    assert list(results["combined"]) == ["sum of all", "mean of all", "sum of all, cut to rank 2"]
    assert all(list(accuracy) == NAMES for accuracy in results["combined"].values())
    assert results["reload"] == {"max_logit_difference": 0, "different_predictions": 0}
    assert results["serving"]["compared"]["max_logit_difference"] < 1e-5
    assert list(results["serving"]["milliseconds"]) == ["1", "5"]
    assert (results["base_bytes_stored"] < results["base_bytes_dense"]) == (method == "qlora")
    printed = capsys.readouterr().out
    for line in ("Test accuracy of each adapter", "one mixed batch", "loaded again", "switching", "middle"):
        assert line in printed


def test_runs_as_a_script_with_three_tasks(arguments, tables, tmp_path):
    """The command in the README would fail, or a third adapter would be forgotten."""
    third = tmp_path / "third table.csv"
    third.write_bytes(Path(tables[0]).read_bytes())
    command = [sys.executable, str(SCRIPT), *arguments, "--tasks", *tables, str(third), "--train-size", "8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert {name: task["train_rows"] for name, task in results["tasks"].items()} == {
        "first": 8,
        "second": 8,
        "third-table": 8,
    }


@pytest.mark.parametrize(("field", "message"), [("reload", "loaded again"), ("serving", "the mixed batch")])
def test_other_answers_fail_the_run(example, arguments, monkeypatch, field, message, capsys):
    """A broken adapter file, or rows that get another one's adapter, would pass for a success."""
    if field == "serving":
        right = example.adapter_serving.together
        monkeypatch.setattr(example.adapter_serving, "together", lambda *args: right(*args) + 1)
    else:
        load = example.load_again

        def wrong(*args):
            model = load(*args)
            with torch.no_grad():
                model.adapter_state_dict("second")["base_model.model.classifier.bias"].add_(1)
            return model

        monkeypatch.setattr(example, "load_again", wrong)
    assert example.main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (["--requests", "4", "0"], "--requests: expected whole numbers of at least 1, got 0"),
        (["--rounds", "0"], "--rounds: expected a whole number of at least 1, got 0"),
        (["--max-length", "2"], "--max-length: expected at least 4 tokens, got 2"),
        (["--rank", "0"], "--rank: expected a whole number of at least 1, got 0"),
        (["--method", "full"], "--method"),
        (["--tasks", "./no-such-file.csv", "./b.csv"], "no-such-file.csv: no such file or folder"),
        (["--tasks", str(SCRIPT)], "--tasks: expected two data sets or more"),
        (["--tasks", "a/rows.csv", "b/rows.tsv"], "with different names, got rows, rows"),
        (["--model", "./no-such-model"], "no-such-model is not a model folder"),
    ],
)
def test_bad_options_stop_before_any_work(assert_stops_at_once, arguments, bad, expected):
    """A typing error would cost a user minutes, or end in a traceback."""
    assert_stops_at_once([*arguments, *bad], expected)


def test_more_requests_than_texts(example, arguments, capsys):
    """A user would wait for the training and then see an IndexError."""
    assert example.main([*arguments, "--requests", "99"]) == 2
    assert "--requests: expected at most 48 for these test texts, got 99" in capsys.readouterr().err


def test_names_of_adapters(example):
    """A path would be refused as the name of an adapter after minutes, or taken for the base."""
    names = ["movie-snippets", "some/folder.of/my rows.v2.csv", "owner/data", "default.csv", "__base__"]
    expected = ["sentiment", "my-rows-v2", "data", "default-task", "__base__-task"]
    assert [example.adapter_name(name) for name in names] == expected
