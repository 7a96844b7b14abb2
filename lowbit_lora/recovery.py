"""What a merge into quantized weights keeps of the training: losses on data that it did not see, and per layer."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.quantizers.requantize import Survival

from .calibrate import CalibrationReport
from .calibrate.inputs import Batch, arguments

#: What transformers takes no loss of.
_IGNORED = -100
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Losses:
    """Mean losses over held-out batches, each weighted by its number of labels.

    Attributes:
        base: of the model with its adapters disabled.
        adapter: of the model with its adapters, before the merge.
        merged: of the model whose quantized weights hold them.
        batches, labels: how much data they were measured on.
    """

    base: float
    adapter: float
    merged: float
    batches: int
    labels: int

    @property
    def recovery(self) -> float | None:
        """The share of the adapter's gain in loss that the merged model keeps; None where it gains nothing."""
        gain = self.base - self.adapter
        return (self.base - self.merged) / gain if gain > 0 else None


@dataclass
class MergeReport:
    """What a merge did, per layer and as a whole.

    Attributes:
        layers: of each weight that was quantized again, how much of it and of its change is left.
        losses: on held-out batches; None where there are none with labels.
        calibration: how the weights were chosen; None without batches.
        notes: what a user should know.
    """

    layers: list[Survival] = field(default_factory=list)
    losses: Losses | None = None
    calibration: CalibrationReport | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def recovery(self) -> float | None:
        """See :class:`Losses`; None where it was not measured."""
        return None if self.losses is None else self.losses.recovery

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"recovery": self.recovery}

    def summary(self) -> str:
        """One line."""
        parts = []
        if self.losses is not None:
            kept = "not defined" if self.recovery is None else f"{self.recovery:.1%}"
            parts.append(
                f"recovery {kept} of the adapter's gain: loss {self.losses.base:.4f} without it, "
                f"{self.losses.adapter:.4f} with it, {self.losses.merged:.4f} merged, on {self.losses.labels:,} "
                "held-out labels"
            )
        if self.layers:
            cosines = [layer.weight_cosine for layer in self.layers]
            parts.append(
                f"{len(cosines)} weights quantized again, cosine to the merged ones {min(cosines):.4f} at the least, "
                f"{statistics.median(cosines):.4f} in the median"
            )
        return "; ".join([*parts, *self.notes])

    def table(self):
        """A ``rich`` table with one row per layer, for ``rich.print``."""
        from rich.table import Table

        measured = {row.name: row for row in (self.calibration.layers if self.calibration else [])}
        table = Table(title=self.summary())
        for column in ("layer", "cosine", "of change", "absmax", "search", "final", "how"):
            table.add_column(column, justify="left" if column in ("layer", "how") else "right")
        for layer in self.layers:
            row = next((row for name, row in measured.items() if name.rpartition(".")[0] == layer.name), None)
            errors = [None] * 3 if row is None else [row.absmax, row.search, row.final]
            texts = ["-" if value is None else f"{value:.2e}" for value in errors]
            how = "search" if row is None else row.chosen
            table.add_row(layer.name, f"{layer.weight_cosine:.4f}", f"{layer.cosine:.3f}", *texts, how)
        return table


def show(report: MergeReport) -> None:
    """Print what a merge keeps."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if report.losses is not None:
        table = Table("model", "held-out loss", "of the gain", title="Merged into quantized weights")
        kept = "-" if report.recovery is None else f"{report.recovery:.1%}"
        losses = report.losses
        for name, loss, share in (
            ("base, without the adapter", losses.base, "0.0%"),
            ("with the adapter", losses.adapter, "100.0%"),
            ("merged", losses.merged, kept),
        ):
            table.add_row(name, f"{loss:.4f}", share)
        console.print(table)
    console.print(f"lowbit: {report.summary()}", markup=False, highlight=False)


def held_out_of(batches: list, share: float = 0.2) -> tuple[list, list]:
    """The batches to calibrate on, and the last ``share`` of them to measure on: at least one, none of a single one."""
    count = max(1, math.floor(share * len(batches))) if len(batches) > 1 else 0
    return batches[: len(batches) - count], batches[len(batches) - count :]


def has_loss(model: nn.Module, batch: Batch) -> bool:
    """Whether the model computes a loss of such a batch: it has labels, or is one of text for a language model."""
    if "labels" not in arguments(model):
        return False
    return "labels" in batch or ("input_ids" in batch and type(model).__name__.endswith(_LANGUAGE_MODELS))


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[Batch]) -> tuple[float, int]:
    """``(mean loss, labels)`` of a model in eval mode; batches count by their labels.

    Raises:
        ValueError: no label in any of them.
    """
    total, count = 0.0, 0
    for batch in _labelled(batches):
        labels = batch["labels"]
        number = int((labels != _IGNORED).sum()) if not labels.is_floating_point() else labels.shape[0]
        if number:
            total += number * model(**batch).loss.item()
            count += number
    if not count:
        raise ValueError("held_out: expected batches with labels to measure the loss on, got none")
    return total / count, count


def _labelled(batches: list[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if "labels" in batch:
            yield batch
            continue
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        yield batch | {"labels": ids if mask is None else ids.masked_fill(mask == 0, _IGNORED)}
