"""bench_accuracy: its runs, its file of results, its table, and GLUE's metrics and rows."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot", "the", "a"]


@pytest.fixture
def bench_accuracy(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "examples"))
    import bench_accuracy

    return bench_accuracy


@pytest.fixture
def accuracy_tasks(bench_accuracy):
    import accuracy_tasks

    return accuracy_tasks


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random BERT of one layer with a vocabulary of a few words."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=32).save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.set_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


class Split(list):
    """What is used of a split of the package `datasets`: a list of rows that gives columns, too."""

    def __init__(self, rows, label):
        super().__init__(rows)
        self.features = {"label": label}

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    def select(self, numbers):
        return Split([self[number] for number in numbers], self.features["label"])

    def shuffle(self, seed):
        return Split(self[::-1], self.features["label"])


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`, with rows of good and bad films instead of GLUE's."""
    asked = []

    def load_dataset(source, part):
        asked.append((source, part))
        classes = types.SimpleNamespace(names=["no", "yes"])
        label = types.SimpleNamespace() if part == "stsb" else classes
        texts = [f"the {'good' if i % 2 else 'bad'} film {'a ' * (i % 3)}" for i in range(24)]
        rows = [
            {"sentence": t, "sentence1": t, "sentence2": "a plot", "label": 2.5 * (i % 2) if part == "stsb" else i % 2}
            for i, t in enumerate(texts)
        ]
        return {"train": Split(rows[:16], label), "validation": Split(rows[16:], label)}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def arguments(results, model, *more):
    small = ("--epochs", "1", "--batch-size", "8", "--max-length", "16", "--ranks", "2")
    return ["--results", str(results), "--model", model, *small, *more]


def test_a_stopped_program_goes_on_where_it_was(bench_accuracy, model_folder, hub, tmp_path, monkeypatch, capsys):
    """Runs take hours: none may be lost, done twice, or counted twice."""
    results = tmp_path / "r.jsonl"
    line = arguments(results, model_folder, "--tasks", "sst2", "stsb", "--seeds", "2")
    right, count = bench_accuracy.do, []

    def stopped(*rest):
        count.append(rest)
        if len(count) == 5:
            raise KeyboardInterrupt
        return right(*rest)

    monkeypatch.setattr(bench_accuracy, "do", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench_accuracy.main(line)
    with open(results, "a") as file:
        file.write('{"run": {"task": "ss')  # what a machine that is switched off leaves
    assert bench_accuracy.main(line) == 0
    assert len(count) == 1 + 2 * 2 * 3
    done = bench_accuracy.read_results(results)
    assert len(done) == 12 and len(results.read_text().splitlines()) == 13
    out = capsys.readouterr().out
    assert "sst2" in out and "Pearson, Spearman" in out and "of full fine-tuning" in out
    assert bench_accuracy.main([*line, "--table"]) == 0 and len(count) == 13
    assert {("nyu-mll/glue", "sst2"), ("nyu-mll/glue", "stsb")} == set(hub)


def test_the_table_compares_means_over_seeds(bench_accuracy):
    """The gap between QLoRA and full fine-tuning is what the page is read for."""

    def result(method, seed, score, lr=1e-4, task="text"):
        rank = None if method == "full" else 8
        run = {"task": task, "method": method, "rank": rank, "optimizer": "paged", "seed": seed, "lr": lr}
        run |= {"epochs": 1, "batch_size": 8}
        rest = {"base": "b", "trainable": 9, "train_rows": 5, "test_rows": 5, "metrics": {"accuracy": 0}}
        return {"run": run, "score": score} | rest

    rows = bench_accuracy.summary(
        [result("full", 0, 0.90), result("full", 1, 0.94), result("full", 0, 0.5, lr=1.0)]
        + [result("qlora", 0, 0.91), result("qlora", 1, 0.90), result("qlora", 0, 0.2, task="images")]
    )
    full, bad, qlora, other = rows
    assert (full["mean"], full["lowest"], full["highest"], full["seeds"]) == pytest.approx((92, 90, 94, 2))
    assert full["deviation"] == pytest.approx(8**0.5) and bad["deviation"] is None
    assert qlora["points"] == pytest.approx(-1.5) and other["points"] is None


def test_metrics_of_glue(accuracy_tasks):
    """A wrong metric makes a table that cannot be compared with anybody's."""
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
    predicted = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0])  # 2 true and 1 false positive, 1 false and 4 true negatives
    logits = torch.nn.functional.one_hot(predicted, 2).float()
    assert accuracy_tasks.accuracy(logits, labels) == 6 / 8
    assert accuracy_tasks.f1(logits, labels) == pytest.approx(2 / 3)
    assert accuracy_tasks.matthews(logits, labels) == pytest.approx((2 * 4 - 1 * 1) / (3 * 3 * 5 * 5) ** 0.5)
    assert accuracy_tasks.matthews(torch.tensor([[1.0, 0.0]] * 8), labels) == 0.0
    values, scores = torch.tensor([[1.0], [2.0], [3.0], [10.0]]), torch.tensor([0.0, 2.5, 2.5, 5.0])
    assert accuracy_tasks.pearson(values, scores) == pytest.approx(22.5 / (50 * 12.5) ** 0.5)
    # The ranks are 1 2 3 4 and 1 2.5 2.5 4.
    assert accuracy_tasks.spearman(values, scores) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)


def test_pairs_of_texts_tell_which_is_which(accuracy_tasks, model_folder, hub):
    """BERT reads a pair as one text unless its tokens are told apart."""
    task = accuracy_tasks.load("mrpc", model_folder, 4, 3, 16)
    assert (len(task.train), len(task.test), set(task.metrics)) == (4, 3, {"accuracy", "F1"})
    inputs, labels = task.train.batch([0, 1], "cpu")
    first = inputs["token_type_ids"][0].tolist()
    assert inputs["input_ids"].shape == inputs["token_type_ids"].shape and 0 in first and 1 in first
    assert labels.dtype == torch.int64 and task.train.labels.tolist() == [1, 0, 1, 0]
    scores = accuracy_tasks.load("stsb", model_folder, 4, None, 16)
    assert scores.train.labels.dtype == torch.float32 and scores.load_base(0).config.num_labels == 1
    assert scores.loss(torch.tensor([[2.0], [1.0]]), torch.tensor([1.0, 1.0])) == 0.5


def test_the_bundled_texts_are_a_task(bench_accuracy, accuracy_tasks, model_folder, tmp_path):
    """The default of the program, on a tiny model."""
    import text_data

    try:
        text_data.find_snippet_archive()
    except text_data.DataError:
        pytest.skip("the movie snippets are not here")
    sizes = ("--train-rows", "16", "--test-rows", "8", "--seeds", "1", "--methods", "qlora")
    line = arguments(tmp_path / "r.jsonl", model_folder, "--tasks", "text", *sizes)
    assert bench_accuracy.main(line) == 0
    (result,) = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (result["train_rows"], result["test_rows"], result["run"]["rank"]) == (16, 8, 2)


def test_what_is_missing_is_told(bench_accuracy, tmp_path, monkeypatch, capsys):
    """Without the package `datasets`, or with a wrong option, before any run."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert bench_accuracy.main(["--results", str(tmp_path / "r"), "--tasks", "rte"]) == 2
    assert "pip install datasets" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_accuracy.main(["--results", str(tmp_path / "r"), "--seeds", "0"])
    assert "--seeds: expected at least 1" in capsys.readouterr().err
