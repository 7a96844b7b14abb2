"""Labelled texts for the examples on texts: finding, splitting and batching them.

Three sources give the same `Dataset`: the texts that travel inside the vaderSentiment source archive, a local
csv/tsv/jsonl file with the columns `text` and `label`, and a Hugging Face hub data set. Nothing here knows
about models or training.
"""

import csv
import html
import io
import json
import os
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from classifier_data import SPLIT_SEED, DataError, check_columns, import_datasets, load_hub_splits, sorted_labels

BUNDLED = "movie-snippets"
SOURCES = "text-sources"
SUFFIXES = (".csv", ".tsv", ".jsonl")
TEST_ROWS = 2000

_INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
_TEXTS = "hutto_ICWSM_2014/{}_GroundTruth.txt"
_SNIPPETS = "movieReviewSnippets"
# Label -> the archive's name of the texts from there.
_SOURCES = {
    "editorial": "nytEditorialSnippets",
    "film": _SNIPPETS,
    "product": "amazonReviewSnippets",
    "tweet": "tweets",
}
# Snippets that people rated near zero have no clear sentiment; they are left out.
_MIN_RATING = 0.5

Row = tuple[str, int]


@dataclass(frozen=True)
class Dataset:
    """Rows of (text, label id), split once, with the names of the labels in the order of their ids."""

    name: str
    labels: tuple[str, ...]
    train: list[Row]
    test: list[Row]

    def limited(self, train_size: int | None, test_size: int | None) -> "Dataset":
        """Return the split cut to its first rows. The split is shuffled, so these are a fair sample."""
        return Dataset(self.name, self.labels, self.train[:train_size], self.test[:test_size])


def load(source: str, text_column: str = "text", label_column: str = "label") -> Dataset:
    """Return a data set: a bundled one, a path (file, or folder with train and test files) or a hub name.

    Bundled are `movie-snippets` (negative or positive) and `text-sources` (where a text is from).
    """
    if source in _BUNDLED:
        return _from_tables(source, _BUNDLED[source](find_snippet_archive()), None)
    path = Path(source)
    if path.is_file():
        return _from_tables(source, _read_table(path, text_column, label_column), None)
    if path.is_dir():
        train, test = (_find_part(path, part) for part in ("train", "test"))
        return _from_tables(
            source,
            _read_table(train, text_column, label_column),
            _read_table(test, text_column, label_column),
        )
    return _from_hub(source, text_column, label_column)


def check_source(source: str) -> None:
    """Raise `DataError` if `load` is bound to fail, without reading the data."""
    if source in _BUNDLED:
        find_snippet_archive()
        return
    path = Path(source)
    if path.is_dir():
        for part in ("train", "test"):
            _find_part(path, part)
    elif path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"dataset {source}: expected a {', '.join(SUFFIXES)} file, got '{path.suffix}'")
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise DataError(f"dataset {source}: no such file or folder")
    else:
        import_datasets(source)


def find_snippet_archive() -> Path:
    """Return the path of the vaderSentiment source archive, in $LOWBIT_DATA or `data/` here or in the repository."""
    folders = [Path("data"), Path(__file__).resolve().parent.parent / "data"]
    if os.environ.get("LOWBIT_DATA"):
        folders.insert(0, Path(os.environ["LOWBIT_DATA"]))
    for folder in folders:
        # Older packages are named vaderSentiment-*, today's build tools write vadersentiment-*.
        found = sorted(folder.glob("vader[Ss]entiment-*.tar.gz"))
        if found:
            return found[-1]
    raise DataError(
        "the bundled texts are not here. Get the archive that holds them with\n"
        "    pip download --no-deps --no-binary :all: --dest data vaderSentiment==3.3.2\n"
        "or run `make demo`. Looked in: " + ", ".join(str(folder) for folder in folders)
    )


def batches(lengths: Sequence[int], batch_size: int, generator: random.Random | None = None) -> Iterator[list[int]]:
    """Return row numbers in batches of similar length, so that little time goes into padding.

    With a generator the order is random: rows are shuffled, sorted by length only within stretches of 50
    batches, and the batches are shuffled again. Without one, all rows are sorted by length.
    """
    order = list(range(len(lengths)))
    if generator is not None:
        generator.shuffle(order)
    stretch = 50 * batch_size if generator is not None else max(1, len(order))
    found = []
    for start in range(0, len(order), stretch):
        part = sorted(order[start : start + stretch], key=lengths.__getitem__)
        found += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    if generator is not None:
        generator.shuffle(found)
    yield from found


class TokenizedRows:
    """Texts that are tokenized once. `batch` pads the rows that it returns to their own longest."""

    def __init__(self, tokenizer, rows: Sequence[Row], max_length: int):
        texts = [text for text, _ in rows]
        self.ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        self.lengths = [len(ids) for ids in self.ids]
        self.labels = torch.tensor([label for _, label in rows])
        self.pad = tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, batch_size: int, generator: random.Random | None = None) -> Iterator[list[int]]:
        return batches(self.lengths, batch_size, generator)

    def batch(self, rows: Sequence[int], device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return model inputs (int64, rows x longest) and labels (int64, rows) for these row numbers."""
        longest = max(self.lengths[i] for i in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for place, i in enumerate(rows):
            ids[place, : self.lengths[i]] = torch.tensor(self.ids[i])
            mask[place, : self.lengths[i]] = 1
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        return inputs, self.labels[list(rows)].to(device)


def _movie_snippets(archive: Path) -> list[tuple[str, str]]:
    """Return (text, "negative" or "positive") for every movie-review snippet with a clear rating."""
    rated = _rated_texts(archive, _SNIPPETS)
    return [(text, "positive" if rating > 0 else "negative") for text, rating in rated if abs(rating) >= _MIN_RATING]


def _text_sources(archive: Path) -> list[tuple[str, str]]:
    """Return (text, where it is from) for equally many film reviews, product reviews, editorials and tweets."""
    texts = {label: [text for text, _ in _rated_texts(archive, name)] for label, name in _SOURCES.items()}
    fewest = min(map(len, texts.values()))
    pick = random.Random(SPLIT_SEED).sample
    return [(html.unescape(text), label) for label, found in texts.items() for text in pick(found, fewest)]


_BUNDLED = {BUNDLED: _movie_snippets, SOURCES: _text_sources}


def _rated_texts(archive: Path, name: str) -> list[tuple[str, float]]:
    """Return (text, mean human rating in -4..4) for the texts of one of the archive's files.

    Source: Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
    Text", ICWSM 2014 (MIT licence). Each line holds an id, the rating and the text.
    """
    member = _TEXTS.format(name)
    try:
        with tarfile.open(archive) as outer:
            inner_name = next(name for name in outer.getnames() if name.endswith(_INNER_ARCHIVE))
            inner = outer.extractfile(inner_name).read()
        with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
            raw = tar.extractfile(member).read()
    except (OSError, tarfile.TarError, StopIteration, KeyError, AttributeError) as error:
        raise DataError(f"{archive} does not hold {_INNER_ARCHIVE} with {member}: {error}") from error
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        lines = raw.decode("cp1252").splitlines()
    fields = [line.split("\t", 2) for line in lines if line.strip()]
    return [(text.strip(), float(rating)) for _, rating, text in (row for row in fields if len(row) == 3)]


def _read_table(path: Path, text_column: str, label_column: str) -> list[tuple[str, str]]:
    """Return (text, label) of every row of a csv, tsv or jsonl file."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            try:
                records = [json.loads(line) for line in file if line.strip()]
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: every line must be a JSON object: {error}") from error
        else:
            records = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    if not records:
        raise DataError(f"{path} holds no rows")
    for number, record in enumerate(records, start=1):
        for column in (text_column, label_column):
            if not isinstance(record, dict) or record.get(column) in (None, ""):
                names = sorted(str(key) for key in record) if isinstance(record, dict) else record
                raise DataError(f"{path}, row {number}: no value for column '{column}' (row has {names})")
    return [(str(record[text_column]), str(record[label_column])) for record in records]


def _find_part(folder: Path, part: str) -> Path:
    for suffix in SUFFIXES:
        if (folder / (part + suffix)).is_file():
            return folder / (part + suffix)
    raise DataError(f"dataset folder {folder} has no {part}{{{','.join(SUFFIXES)}}}")


def _from_hub(source: str, text_column: str, label_column: str) -> Dataset:
    """Return a hub data set: its `train` split, tested on `test` or `validation`, whichever has labels."""
    splits = load_hub_splits(source)

    def table(split: str) -> list[tuple[str, str]]:
        check_columns(source, splits[split], {"--text-column": text_column, "--label-column": label_column})
        rows = zip(splits[split][text_column], splits[split][label_column], strict=True)
        names = getattr(splits[split].features[label_column], "names", None)
        # Hub test splits without public labels mark them -1.
        return [(str(t), names[y] if names else str(y)) for t, y in rows if y is not None and y != -1]

    for name in ("test", "validation"):
        if name in splits and (rows := table(name)):
            return _from_tables(source, table("train"), rows)
    return _from_tables(source, table("train"), None)


def _from_tables(name: str, train: list[tuple[str, str]], test: list[tuple[str, str]] | None) -> Dataset:
    """Number the labels, drop repeated texts, and split if no test rows were given; return the data set."""
    labels = sorted_labels(name, (label for _, label in train + (test or [])))
    ids = {label: number for number, label in enumerate(labels)}
    train, test = _distinct(train), _distinct(test or [])
    if not test:
        random.Random(SPLIT_SEED).shuffle(train)
        cut = min(TEST_ROWS, max(1, len(train) // 5))
        test, train = train[:cut], train[cut:]
    else:
        random.Random(SPLIT_SEED).shuffle(train)
        random.Random(SPLIT_SEED).shuffle(test)
        seen = {_normal(text) for text, _ in test}
        train = [row for row in train if _normal(row[0]) not in seen]
    if not train:
        raise DataError(f"{name}: no training rows are left after splitting off {len(test)} test rows")
    return Dataset(name, labels, [(t, ids[y]) for t, y in train], [(t, ids[y]) for t, y in test])


def _distinct(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the first row of each text, in order. A text in both train and test would be a leak."""
    first: dict[str, tuple[str, str]] = {}
    for row in rows:
        first.setdefault(_normal(row[0]), row)
    return list(first.values())


def _normal(text: str) -> str:
    return " ".join(text.lower().split())
