"""What a calibration did: per layer, and as a whole."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from lowbit.names import few

from . import inputs


@dataclass
class LayerReport:
    """One weight.

    ``absmax``, ``search`` and ``final`` are squared errors of the layer's output over the calibration tokens, as shares
    of the output's square: quantized by largest magnitudes, by weighted search, and as it is now. With "sequential"
    the output is that of the dense model, and the inputs are what the quantized layers before it make of the data.
    None: the layer's inputs were not seen. ``chosen``: how it is quantized. ``tokens``: that it saw.
    """

    name: str
    shape: tuple[int, ...]
    absmax: float | None
    search: float | None
    final: float | None
    chosen: str
    tokens: int


@dataclass
class CalibrationReport:
    """What :func:`lowbit_lora.calibrate` returns.

    Attributes:
        method: as given.
        batches, tokens, data: how much data there was, and its SHA-256.
        seconds: from the first batch to the end, of the runs that were resumed too.
        layers: one entry per weight.
        unplaced: the weights that are in no chain of blocks, and were searched with mean squares or with nothing.
        notes: what a user should know.
    """

    method: str
    batches: int
    tokens: int
    data: str
    seconds: float = 0.0
    layers: list[LayerReport] = field(default_factory=list)
    unplaced: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, method: str, data: list[inputs.Batch]) -> "CalibrationReport":
        """That of a calibration by these batches, which has not begun."""
        return cls(method, len(data), inputs.token_count(data), inputs.digest(data))

    def note_unplaced(self) -> None:
        """Add to the notes which weights are outside of blocks."""
        if self.unplaced:
            self.notes.append(f"outside of blocks, so that they were searched: {few(self.unplaced)}")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def metadata(self) -> str:
        """What a saved model keeps of it, in JSON: all but the layers."""
        return json.dumps({key: value for key, value in self.to_dict().items() if key != "layers"})

    def summary(self) -> str:
        """One line."""
        measured = [row for row in self.layers if row.final is not None and row.absmax]
        text = f"{self.method}: {len(self.layers)} weights on {self.tokens:,} tokens in {self.seconds:.0f} s"
        if measured:
            left = statistics.median(row.final / row.absmax for row in measured)
            text += f"; the error of a layer's output is {left:.0%} of absmax's (median)"
        return text + (f"; {len(self.unplaced)} weights outside of blocks were searched" if self.unplaced else "")

    def table(self):
        """A ``rich`` table with one row per layer, for ``rich.print``."""
        from rich.table import Table

        table = Table(title=self.summary())
        for column in ("layer", "shape", "absmax", "search", "final", "of search", "how", "tokens"):
            table.add_column(column, justify="left" if column in ("layer", "how") else "right")
        for row in self.layers:
            share = f"{row.final / row.search:.2f}" if row.final is not None and row.search else "-"
            losses = [f"{value:.2e}" if value is not None else "-" for value in (row.absmax, row.search, row.final)]
            shape = " x ".join(map(str, row.shape))
            table.add_row(row.name, shape, *losses, share, row.chosen, f"{row.tokens:,}")
        return table

    def plot(self, path: str) -> None:
        """Draw the error of each layer before and after, to a file of matplotlib's formats.

        Raises:
            ImportError: matplotlib is not installed.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows = [row for row in self.layers if row.final is not None]
        figure, axes = pyplot.subplots(figsize=(max(6.0, 0.06 * len(rows) + 3), 4.5), layout="constrained")
        for name, marker in (("absmax", "x"), ("search", "+"), ("final", ".")):
            axes.plot([getattr(row, name) for row in rows], marker, label=name if name != "final" else self.method)
        axes.set(yscale="log", xlabel="layer, in the order of the forward", ylabel="squared error of the output, share")
        axes.set_title(self.summary(), fontsize="small")
        axes.legend()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
