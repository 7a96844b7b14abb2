"""Tables and a picture of predictions. Each says that it is a prediction."""

import re

from codegen.cuda_counts import BITSANDBYTES, CUDA, LOOPS
from codegen.instruction_costs import Counted
from predict_triton import TRITON
from rich.box import HEAVY_HEAD, MARKDOWN
from rich.console import Console
from rich.table import Table
from roofline import TITLE, Gpu

LIBRARIES = (CUDA, TRITON, BITSANDBYTES)


def _table(title: str, columns: tuple[str, ...], markdown: bool) -> Table:
    return Table(*columns, title=title, box=MARKDOWN if markdown else HEAVY_HEAD)


def print_counts(console: Console, counts: dict[str, list[Counted]], markdown: bool = False) -> None:
    """Print the counts that the predictions rest on, by architecture."""
    columns = ("arch", "operation", "library", "rows", "instructions", "L1/shared cycles x 32", "kernel")
    table = _table("Counted in the machine code, per weight", columns, markdown)
    for arch, entries in counts.items():
        for e in entries:
            name = re.sub(r"^_Z.*\d(?=[a-zA-Z_]*(?:gem|grad|dequant|kDequant))", "", e.kernel)[:64]
            costs = (f"{e.instructions:.2f}", f"{32 * e.cycles:.2f}")
            table.add_row(arch, e.operation, e.library, str(e.rows or ""), *costs, name)
    console.print(table)


def print_missing(console: Console, counts: dict[str, list[Counted]], operations: list[str]) -> None:
    """Print the kernels whose loops this build, or this version of bitsandbytes, lacks."""
    for loop in (loop for loop in LOOPS if loop.operation in operations):
        for arch, entries in counts.items():
            if not any(re.search(loop.kernel, entry.kernel) for entry in entries):
                console.print(f"not found for {arch}: {loop.library} {loop.source} {loop.kernel}", markup=False)


def print_comparison(console: Console, rows: list, markdown: bool = False) -> None:
    """Print published times beside predicted ones."""
    columns = ("kernel", "GPU", "rows", "out x in", "published us", "predicted us", "ratio", "source")
    table = _table("Published times and their predictions", columns, markdown)
    for published, prediction, ratio in rows:
        sizes = (str(published.m), f"{published.n} x {published.k}")
        times = (f"{published.microseconds:.1f}", f"{prediction.microseconds:.1f}", f"{ratio:.2f}")
        table.add_row(published.kernel, published.gpu, *sizes, *times, published.source)
    console.print(table)


def print_predictions(console: Console, gpu: Gpu, rows: list[dict], markdown: bool = False) -> None:
    sides = (f"{library}: us, bound by (path)" for library in LIBRARIES)
    columns = ("layer", "out x in", "operation", "rows", *sides, "times faster")
    table = _table(f"{gpu.name}: {TITLE}", columns, markdown)
    for row in rows:
        cells = [row["layer"], f"{row['n']} x {row['k']}", row["operation"], str(row["m"] or "")]
        for library in LIBRARIES:
            found = row.get(library)
            cells.append(f"{found['microseconds']:.1f} {found['bound']} ({found['path']})" if found else "")
        table.add_row(*cells, f"{row['ratio']:.2f}" if "ratio" in row else "")
    console.print(table)


def plot(path: str, rows: list[dict]) -> None:
    """Draw time over rows of x for the first layer that has a product, one panel per product and GPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    products = [row for row in rows if row["m"]]
    shown = [row for row in products if row["layer"] == products[0]["layer"]]
    gpus = list(dict.fromkeys(row["gpu"] for row in shown))
    operations = list(dict.fromkeys(row["operation"] for row in shown))
    size = (max(7.5, 3.2 * len(gpus)), 1 + 2.7 * len(operations))
    figure, grid = pyplot.subplots(
        len(operations), len(gpus), figsize=size, squeeze=False, sharex=True, layout="constrained"
    )
    for line, operation in zip(grid, operations, strict=True):
        for axes, gpu in zip(line, gpus, strict=True):
            of_axes = [row for row in shown if (row["gpu"], row["operation"]) == (gpu, operation)]
            for library, style in ((CUDA, "C0o-"), (TRITON, "C2^:"), (BITSANDBYTES, "C1s--")):
                points = [(row["m"], row[library]["microseconds"]) for row in of_axes if library in row]
                axes.plot([m for m, _ in points], [time for _, time in points], style, label=library, markersize=4)
            axes.set_title(f"{operation}\n{gpu}, predicted", fontsize=9)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
    for axes in grid[-1]:
        axes.set_xlabel("rows")
    for line in grid:
        line[0].set_ylabel("microseconds, predicted")
    grid[0][0].legend(fontsize=8)
    layer = f"{shown[0]['layer']} ({shown[0]['n']} x {shown[0]['k']})"
    figure.suptitle(f"{layer}, bf16, NF4 unless int8, double quantization\n{TITLE}", fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
