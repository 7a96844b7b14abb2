"""The text-classification example, run as a user runs it, on a tiny model and a tiny data set."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLE = "train_qlora_text_classifier"
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / f"{EXAMPLE}.py"
GOOD = ["fine", "great", "lovely", "bright"]
BAD = ["poor", "dull", "awful", "bleak"]
OTHER = ["a", "the", "film", "plot", "cast", "was", "and", "very"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random BERT of two layers with a WordPiece vocabulary of the words used here."""
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=32).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    transformers.set_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A csv of 120 distinct texts, each with one telling word."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    lines = ["text,label"]
    for i in range(120):
        telling = (GOOD if i % 2 else BAD)[i // 2 % 4]
        rest = " ".join(OTHER[(i // 8 + k * (1 + i % 3)) % 8] for k in range(3 + i % 5))
        lines.append(f"{rest} {telling},{'positive' if i % 2 else 'negative'}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def arguments(model_folder, reviews, tmp_path):
    return [
        *("--model", str(model_folder), "--dataset", str(reviews), "--output", str(tmp_path / "out")),
        *("--epochs", "2", "--batch-size", "8", "--rank", "2", "--max-length", "16"),
    ]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_run_writes_everything(example, arguments, tmp_path, method, capsys):
    assert example.main([*arguments, "--method", method]) == 0
    out = tmp_path / "out"
    saved = out / ("model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors")
    assert saved.is_file()
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["labels"] == ["negative", "positive"]
    assert len(results["losses"]) == 2 * -(-results["train_rows"] // 8)
    assert [step for step, _ in results["accuracy_by_step"]][0] == 0
    assert 0 <= results["accuracy_before"] <= 1 and 0 <= results["accuracy_after"] <= 1
    assert results["reload"]["different_predictions"] == 0
    if method == "full":
        assert results["trainable_parameters"] == results["base_parameters"]
    else:
        assert 0 < results["trainable_parameters"] < results["base_parameters"]
        assert results["merge"]["max_logit_difference"] <= example.classifier_model.MERGE_TOLERANCE
    if method == "qlora":
        # 4 bits and a share of the scales instead of 32 bits.
        assert 7 < results["target_bytes_dense"] / results["target_bytes_stored"] < 8
        assert results["base_bytes_stored"] < results["base_bytes_dense"]
    else:
        assert results["base_bytes_stored"] == results["base_bytes_dense"]
    printed = capsys.readouterr().out
    for line in ("test accuracy before", "test accuracy after", "trainable parameters", "peak memory"):
        assert line in printed


def test_same_seed_same_losses(example, arguments, tmp_path):
    def losses(seed):
        assert example.main([*arguments, "--epochs", "1", "--seed", seed]) == 0
        return json.loads((tmp_path / "out" / "results.json").read_text())["losses"]

    first = losses("3")
    assert losses("3") == first
    assert losses("4") != first


def test_runs_as_a_script(arguments, tmp_path):
    command = [sys.executable, str(SCRIPT), *arguments, "--train-size", "16", "--test-size", "8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "test accuracy after" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert (results["train_rows"], results["test_rows"]) == (16, 8)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (["--rank", "0"], "--rank"),
        (["--epochs", "-1"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--train-size", "0"], "--train-size"),
        (["--max-length", "2"], "--max-length"),
        (["--lr", "nan"], "--lr"),
        (["--lora-dropout", "1"], "--lora-dropout"),
        (["--seed", "-1"], "--seed"),
        (["--method", "magic"], "--method"),
        (["--device", "nowhere"], "--device"),
        (["--model", "./no-such-model"], "no-such-model"),
        (["--dataset", "./no-such-file.csv"], "no-such-file.csv"),
        (["--dataset", str(SCRIPT)], ".jsonl"),
    ],
)
def test_bad_options_stop_before_any_work(assert_stops_at_once, arguments, bad, expected):
    """A typing error would cost a user minutes, or end in a traceback."""
    assert_stops_at_once([*arguments, *bad], expected)


def test_output_that_is_a_file(example, arguments, tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [("text,label\n", "no rows"), ("words,label\na,1\n", "'text'"), ("text,label\na,1\nb,1\n", "two labels")],
)
def test_bad_tables(example, arguments, tmp_path, text, expected, capsys):
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    assert example.main([*arguments, "--dataset", str(path)]) == 2
    assert expected in capsys.readouterr().err


def test_split_is_fixed_and_does_not_leak(example, tmp_path):
    text_data = sys.modules["text_data"]
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"Text {i % 80}" if i < 100 else f"text  {i - 100}", "label": i % 2} for i in range(180)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    data = text_data.load(str(path))
    train, test = ({text.lower() for text, _ in part} for part in (data.train, data.test))
    assert len(train | test) == 80 == len(data.train) + len(data.test)
    assert not {" ".join(t.split()) for t in train} & {" ".join(t.split()) for t in test}
    assert text_data.load(str(path)) == data


def test_folder_with_train_and_test(example, tmp_path):
    text_data = sys.modules["text_data"]
    (tmp_path / "train.tsv").write_text("text\tlabel\nseen\t0\nnew\t1\n", encoding="utf-8")
    (tmp_path / "test.tsv").write_text("text\tlabel\nSEEN\t0\n", encoding="utf-8")
    data = text_data.load(str(tmp_path))
    assert [text for text, _ in data.train] == ["new"]
    assert [text for text, _ in data.test] == ["SEEN"]


def test_every_row_is_in_one_batch(example):
    import random

    text_data = sys.modules["text_data"]
    lengths = [random.Random(0).randrange(1, 60) for _ in range(1000)]
    for shuffler in (None, random.Random(1)):
        found = [i for picked in text_data.batches(lengths, 7, shuffler) for i in picked]
        assert sorted(found) == list(range(1000))


def test_learning_rate_warms_up_and_decays(example):
    factor = sys.modules["classifier_training"].learning_rate_factor
    factors = [factor(step, 100) for step in range(100)]
    assert factors.index(max(factors)) in (5, 6) and max(factors) == 1
    assert 0 < factors[0] < 0.2 and 0 < factors[-1] < 0.02
