"""Data to calibrate on by the command line, and what is shown of a calibration."""

import contextlib
import enum
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from . import rows


class Method(str, enum.Enum):
    sequential = "sequential"
    static = "static"
    scale = "scale"


#: The options of the commands that calibrate.
ByMethod = Annotated[Method, typer.Option(help="With --calibrate; the slower, the better.")]
Calibrate = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="What to calibrate on: a file or a hub name, as of lowbit train."),
]
TextColumn = Annotated[str, typer.Option(help="Column of texts in DATA.")]
LabelColumn = Annotated[str, typer.Option(help="Column of labels in DATA, of a classification.")]
Length = Annotated[int, typer.Option(min=2, help="The most tokens of a row.")]
Samples = Annotated[int, typer.Option(min=2, help="The most rows of tokens taken of DATA.")]
Plot = Annotated[str | None, typer.Option(help="Draw the errors of layers before and after to this file.")]

#: Rows of a batch, and how many batches there are at the least: one of five is held out to measure a merge.
_ROWS, _BATCHES = 8, 5


def batches(
    model: str, config: Any, source: str, text_column: str, label_column: str, length: int, samples: int
) -> list[dict[str, Any]]:
    """Batches with labels out of a file or a data set, as ``lowbit train`` reads it.

    Texts are put together and cut into rows of ``length`` tokens, so that none is padded.

    Args:
        model: folder or hub name, for the tokenizer.
        config: of the model; the labels of a classifier are there.
        samples: the most rows; they are taken evenly from all.

    Raises:
        OSError, ValueError, ImportError: as for ``lowbit train``; too little text for two rows.
    """
    import transformers

    found = rows.read(source)
    task = rows.task_of(found, text_column, label_column)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
    if task == "classification" and not is_classifier:
        task = "causal-lm"  # of a language model the texts count
    labels = rows.labels(found, label_column) if task == "classification" else None
    encoded = rows.encoded(found, task, tokenizer, text_column, label_column, labels, length, True)
    if task == "causal-lm":
        encoded = _packed(encoded, length)
    if len(encoded) < 2:
        raise ValueError(f"--calibrate: expected text for two rows of {length} tokens, got too little in {source}")
    count = min(samples, len(encoded))
    chosen = [encoded[number * len(encoded) // count] for number in range(count)]
    collate, size = rows.padded(pad), max(1, min(_ROWS, count // _BATCHES))
    return [collate(chosen[first : first + size]) for first in range(0, count, size)]


def _packed(pieces: list[rows.Row], length: int) -> list[rows.Row]:
    ids = [token for piece in pieces for token in piece["input_ids"]]
    length = min(length, len(ids) // 2)  # of little text: two shorter rows
    whole = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)] if length > 1 else []
    return [{"input_ids": row, "labels": list(row)} for row in whole]


@contextlib.contextmanager
def printing_to_stderr() -> Iterator[None]:
    """Context in which what libraries print is no part of the report."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def show(report: Any, out: str, plot: str | None, as_json: bool) -> str | None:
    """Print the table of layers, and draw the plot: by default calibration.png in the folder ``out``.

    Args:
        report: a CalibrationReport.

    Returns:
        Where the plot is; None without matplotlib, unless one was asked for.

    Raises:
        ImportError: ``plot`` is given, and matplotlib is not installed.
    """
    if not as_json:
        import rich

        rich.print(report.table())
    if plot is None and importlib.util.find_spec("matplotlib") is None:
        return None
    path = plot or os.path.join(out, "calibration.png")
    report.plot(path)
    return path


def described(report: Any) -> dict[str, Any]:
    """What a command reports of a calibration."""
    measured = [row for row in report.layers if row.final is not None and row.absmax]
    ratios = sorted(row.final / row.absmax for row in measured)
    values = {"method": report.method, "calibration_tokens": report.tokens, "calibration_seconds": report.seconds}
    values["layers"] = len(report.layers)
    if ratios:
        values["median_error_of_absmax"] = ratios[len(ratios) // 2]
    return values | ({"notes": report.notes} if report.notes else {})
