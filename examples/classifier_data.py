"""What the data of every classification example has in common: its error, the hub, the order of labels, the split."""

import sys
from collections.abc import Callable
from typing import TypeVar

Results = TypeVar("Results")

# The split does not depend on the training seed: every run is tested on the same rows.
SPLIT_SEED = 0


class DataError(Exception):
    """The data set cannot be found or used; the message says what was expected."""


def program_status(run: Callable[[], Results], finish: Callable[[Results], int]) -> int:
    """Return an example's exit status: what `finish` says of what `run` found; 2, and say why, for files of no use."""
    try:
        results = run()
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return finish(results)


def import_datasets(source: str):
    """Return the package `datasets`. It is optional: only hub data needs it."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"dataset '{source}' is not a local file or folder; to fetch it from the Hugging Face hub, "
            "first `pip install datasets`"
        ) from error
    return datasets


def load_hub_splits(source: str, part: str | None = None):
    """Return the splits of a hub data set, or of the part of it with this name; it has a split named `train`."""
    datasets = import_datasets(source)
    try:
        splits = datasets.load_dataset(source, part)
    except Exception as error:  # the hub client raises many types; all mean the same to the user
        raise DataError(f"could not load '{source}' from the Hugging Face hub: {error}") from error
    if "train" not in splits:
        raise DataError(f"{source} has no 'train' split, only {sorted(splits)}")
    return splits


def check_columns(source: str, split, options: dict[str, str]) -> None:
    """Raise `DataError` unless a hub split has the columns, given as {option: column}."""
    for option, column in options.items():
        if column not in split.features:
            raise DataError(f"{source} has no column '{column}', only {sorted(split.features)}; see {option}")


def sorted_labels(name: str, labels) -> tuple[str, ...]:
    """Return the distinct labels in the order of their ids: whole numbers by value, then all others by name."""
    distinct = tuple(sorted(set(labels), key=_numbers_first))
    if len(distinct) < 2:
        raise DataError(f"{name}: a classifier needs two labels or more, the data has {list(distinct)}")
    return distinct


def _numbers_first(label: str):
    return (0, int(label), "") if label.lstrip("-").isdigit() else (1, 0, label)
