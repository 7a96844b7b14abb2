"""The tasks of bench_accuracy: labelled rows, a base model, and how answers are scored.

"text" and "images" are the bundled tasks of examples/, which need no network. The others are GLUE (Wang et al., 2019,
arXiv 1804.07461), read from the Hugging Face hub with the package `datasets`, and scored on its validation rows with
the metrics of GLUE's own leaderboard.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import classifier_data  # noqa: E402  (the examples' modules import each other by these names)
import classifier_model  # noqa: E402
import text_data  # noqa: E402
import train_qlora_text_classifier as text_example  # noqa: E402
import train_vit_image_classifier as image_example  # noqa: E402
import vision_bundled  # noqa: E402
import vision_data  # noqa: E402
from classifier_training import Rows  # noqa: E402

#: Side of the digits in pixels. The example's 112 take twice the time.
IMAGE_SIZE = 84
Metric = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass(frozen=True)
class Task:
    """A task, ready to train on.

    ``load_base`` takes a seed and returns the pretrained model with a new head. ``loss`` takes logits (fp32, rows x
    labels) and labels. ``metrics`` take the same, and the score is their mean, as GLUE's is.
    """

    model: str
    train: Rows
    test: Rows
    load_base: Callable[[int], torch.nn.Module]
    metrics: dict[str, Metric]
    loss: Metric = F.cross_entropy

    def score(self, logits: torch.Tensor, labels: torch.Tensor) -> float:
        """The mean of the metrics."""
        return sum(metric(logits, labels) for metric in self.metrics.values()) / len(self.metrics)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of rows whose largest logit is the label's."""
    return (logits.argmax(1) == labels).double().mean().item()


def f1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The harmonic mean of precision and recall of label 1; 0 if there are neither true nor predicted ones."""
    predicted = logits.argmax(1)
    both = ((predicted == 1) & (labels == 1)).sum().item()
    return 2 * both / max(1, (predicted == 1).sum().item() + (labels == 1).sum().item())


def matthews(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Matthews' correlation of two labels; 0 if all rows have, or are given, the same one."""
    return pearson(logits.argmax(1, keepdim=True), labels)


def pearson(values: torch.Tensor, labels: torch.Tensor) -> float:
    """Pearson's correlation of values [rows, 1] with labels; 0 if either is constant."""
    a, b = values.squeeze(1).double(), labels.double()
    a, b = a - a.mean(), b - b.mean()
    size = (a.square().sum() * b.square().sum()).sqrt()
    return (a @ b / size).item() if size > 0 else 0.0


def spearman(values: torch.Tensor, labels: torch.Tensor) -> float:
    """Spearman's correlation: Pearson's of the ranks, where equal values share the mean of theirs."""
    return pearson(_ranks(values.squeeze(1))[:, None], _ranks(labels))


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2.0)[which]


#: GLUE's tasks: the columns with the texts, the split that is scored, and the metrics.
GLUE: dict[str, tuple[tuple[str, ...], str, dict[str, Metric]]] = {
    "cola": (("sentence",), "validation", {"Matthews' correlation": matthews}),
    "sst2": (("sentence",), "validation", {"accuracy": accuracy}),
    "mrpc": (("sentence1", "sentence2"), "validation", {"accuracy": accuracy, "F1": f1}),
    "stsb": (("sentence1", "sentence2"), "validation", {"Pearson": pearson, "Spearman": spearman}),
    "qqp": (("question1", "question2"), "validation", {"accuracy": accuracy, "F1": f1}),
    "mnli": (("premise", "hypothesis"), "validation_matched", {"accuracy, matched": accuracy}),
    "qnli": (("question", "sentence"), "validation", {"accuracy": accuracy}),
    "rte": (("sentence1", "sentence2"), "validation", {"accuracy": accuracy}),
    "wnli": (("sentence1", "sentence2"), "validation", {"accuracy": accuracy}),
}
BUNDLED = ("text", "images")
NAMES = (*BUNDLED, *GLUE)


def load(name: str, model: str | None, train_rows: int | None, test_rows: int | None, max_length: int) -> Task:
    """Return a task with its first ``train_rows`` and ``test_rows`` (None: all); ``model`` is for texts.

    Raises:
        classifier_data.DataError, ValueError: data or a model that is not there; the message says how to get it.
    """
    if name == "images":
        return _images(train_rows, test_rows)
    if name == "text":
        return _snippets(model or text_example.BUNDLED_MODEL, train_rows, test_rows, max_length)
    return _glue(name, model or "google-bert/bert-base-uncased", train_rows, test_rows, max_length)


def _snippets(model: str, train_rows: int | None, test_rows: int | None, max_length: int) -> Task:
    data = text_data.load(text_data.BUNDLED).limited(train_rows, test_rows)
    path = text_example.find_model(model)
    tokenizer = text_example.load_tokenizer(path)
    train, test = (text_data.TokenizedRows(tokenizer, rows, max_length) for rows in (data.train, data.test))
    return Task(
        model=model,
        train=train,
        test=test,
        load_base=lambda seed: text_example.load_base(path, data.labels, tokenizer.pad_token_id, seed),
        metrics={"accuracy": accuracy},
    )


def _images(train_rows: int | None, test_rows: int | None) -> Task:
    """The digits. The example tests on 500 rows; here rows that are not trained on make up for the rest."""
    data = vision_data.load(vision_bundled.DIGITS)
    train = data.train[:train_rows]
    test = (data.test + data.train[len(train) :])[:test_rows]
    data = dataclasses.replace(data, train=train, test=test)
    vision_bundled.check_encoder()
    path = str(vision_bundled.convert_encoder())
    told = image_example.load_preprocessing(
        path, argparse.Namespace(image_size=IMAGE_SIZE, model=vision_bundled.ENCODER)
    )

    def load_base(seed: int):
        return classifier_model.load_base("AutoModelForImageClassification", path, data.labels, seed)

    extra = image_example.forward_options(load_base(0), told.size)
    return Task(
        model=vision_bundled.ENCODER,
        train=vision_data.ImageRows(data.train, told, extra),
        test=vision_data.ImageRows(data.test, told, extra),
        load_base=load_base,
        metrics={"accuracy": accuracy},
    )


class PairRows(text_data.TokenizedRows):
    """Texts or pairs of texts; the batches tell BERT which token is of which text."""

    def __init__(self, tokenizer, texts: list[list[str]], labels: torch.Tensor, max_length: int):
        told = tokenizer(*texts, truncation=True, max_length=max_length)
        self.ids, self.types = told["input_ids"], told.get("token_type_ids")
        self.lengths = [len(ids) for ids in self.ids]
        self.labels, self.pad = labels, tokenizer.pad_token_id

    def batch(self, rows, device: str):
        """Return model inputs (int64, rows x longest) and labels for these row numbers."""
        inputs, labels = super().batch(rows, device)
        if self.types is not None:
            types = torch.zeros_like(inputs["input_ids"])
            for place, i in enumerate(rows):
                types[place, : self.lengths[i]] = torch.tensor(self.types[i])
            inputs["token_type_ids"] = types
        return inputs, labels


def _glue(name: str, model: str, train_rows: int | None, test_rows: int | None, max_length: int) -> Task:
    columns, scored, metrics = GLUE[name]
    splits = classifier_data.load_hub_splits("nyu-mll/glue", name)
    names = getattr(splits["train"].features["label"], "names", None)  # STS-B has scores from 0 to 5 instead
    path = text_example.find_model(model)
    tokenizer = text_example.load_tokenizer(path)

    def rows(split, most: int | None, shuffle: bool) -> PairRows:
        split = split.shuffle(seed=classifier_data.SPLIT_SEED) if shuffle else split
        split = split.select(range(min(most or len(split), len(split))))
        labels = torch.tensor(list(split["label"]), dtype=torch.int64 if names else torch.float32)
        return PairRows(tokenizer, [list(split[column]) for column in columns], labels, max_length)

    return Task(
        model=model,
        train=rows(splits["train"], train_rows, shuffle=True),
        test=rows(splits[scored], test_rows, shuffle=False),
        load_base=lambda seed: text_example.load_base(path, tuple(names or ["score"]), tokenizer.pad_token_id, seed),
        metrics=metrics,
        loss=F.cross_entropy if names else lambda logits, labels: F.mse_loss(logits.squeeze(1), labels),
    )
