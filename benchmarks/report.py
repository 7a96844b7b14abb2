"""Tables, JSON and the pictures of a run."""

import json
import math
import os
from pathlib import Path

from contenders import BITSANDBYTES, BITSANDBYTES_EVAL, COPY, READ, Case
from machine import Machine
from rich.console import Console
from rich.table import Table
from timing import Sample

DENSE = {"float32": "dense fp32", "bfloat16": "dense bf16", "float16": "dense fp16"}


def rows_of(case: Case, results: dict[str, Sample | Exception], machine: Machine) -> list[dict]:
    """One dict per contender, with what the table shows and the JSON holds."""
    dense = [s.median for name, s in results.items() if name == DENSE[case.dtype] and isinstance(s, Sample)]
    all_dense = [s.median for name, s in results.items() if name.startswith("dense") and isinstance(s, Sample)]
    theirs = [
        results[name].median for name in (BITSANDBYTES, BITSANDBYTES_EVAL) if isinstance(results.get(name), Sample)
    ]
    bandwidth = machine.read_bandwidth
    for memory in (READ, COPY):
        if isinstance(results.get(memory), Sample):
            bandwidth = case.bytes[memory] / results[memory].median / 1e6
    rows = []
    for name in [*results, *case.missing]:
        row = {"operation": case.operation, "dtype": case.dtype, "n": case.n, "k": case.k, "m": case.m, "name": name}
        rows.append(row)
        sample = results.get(name)
        if not isinstance(sample, Sample):
            reason = case.missing.get(name) or f"{type(sample).__name__}: {sample}"
            row["failed"] = reason.splitlines()[0][:120]
            continue
        median = sample.median / case.calls_per_sample
        row |= {"median_ms": median}
        row |= {f"p{p}_ms": sample.percentile(p / 100) / case.calls_per_sample for p in (20, 80)}
        if case.bytes.get(name):
            row["gb_per_s"] = case.bytes[name] / median / 1e6
            row["bandwidth_share"] = row["gb_per_s"] / bandwidth
            row["intensity"] = case.flops / case.bytes[name]
        if case.flops and case.calls_per_sample == 1:
            row["gflop_per_s"] = case.flops / median / 1e6
            row["peak_share"] = row["gflop_per_s"] / machine.peak
        if dense:
            row["vs_dense"] = dense[0] / median
        if all_dense:
            row["vs_best_dense"] = min(all_dense) / median
        if theirs:
            row["vs_bitsandbytes"] = min(theirs) / median
        if name in case.error:
            row["error"] = case.error[name]
            row["wrong"] = not case.error[name] <= case.limit[name]
    return rows


def print_tables(console: Console, rows: list[dict]) -> None:
    columns = (
        ("median ms", "median_ms", "{:.3f}"), ("p20", "p20_ms", "{:.3f}"), ("p80", "p80_ms", "{:.3f}"),
        ("GB/s", "gb_per_s", "{:.1f}"), ("of bandw.", "bandwidth_share", "{:.0%}"),
        ("GFLOP/s", "gflop_per_s", "{:.0f}"), ("of peak", "peak_share", "{:.0%}"),
        ("x dense", "vs_dense", "{:.2f}"), ("x best dense", "vs_best_dense", "{:.2f}"),
        ("x bnb", "vs_bitsandbytes", "{:.2f}"), ("error", "error", "{:.1e}"),
    )  # fmt: skip
    for operation, dtype in dict.fromkeys((row["operation"], row["dtype"]) for row in rows):
        table = Table(
            "out x in", "rows", "contender", *(title for title, _, _ in columns), title=f"{operation}, {dtype}"
        )
        for row in rows:
            if (row["operation"], row["dtype"]) != (operation, dtype):
                continue
            if "failed" in row:
                continue
            cells = [form.format(row[key]) if key in row else "" for _, key, form in columns]
            if row.get("wrong"):
                cells[-1] += " WRONG"
            table.add_row(f"{row['n']} x {row['k']}", str(row["m"] or ""), row["name"], *cells)
        console.print(table)
    for name, reason in dict.fromkeys((row["name"], row["failed"]) for row in rows if "failed" in row):
        console.print(f"not timed: {name}: {reason}")


def write_json(path: str, content: dict) -> None:
    """Write a file beside ``path`` and rename it, so that a failed write leaves an old file whole."""
    beside = Path(f"{path}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1))
    beside.rename(path)


def append_json_lines(path: str | None, rows: list[dict]) -> None:
    """Append a line for each row, at once: what follows may be cut off."""
    if path:
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def plot_roofline(path: str, machine: Machine, rows: list[dict]) -> None:
    """Draw speed over arithmetic intensity, with the measured bandwidth and peak as the roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [row for row in rows if row.get("gflop_per_s") and row.get("intensity")]
    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    intensities = [row["intensity"] for row in points] or [1.0]
    low, high = min(intensities) / 2, max(intensities) * 2
    ridge = machine.peak / machine.read_bandwidth
    axes.plot(
        sorted({low, min(max(low, ridge), high), high}),
        [min(machine.read_bandwidth * i, machine.peak) for i in sorted({low, min(max(low, ridge), high), high})],
        color="black",
        label=f"roof: {machine.read_bandwidth:.0f} GB/s, {machine.peak:.0f} GFLOP/s (fp32), measured",
    )
    markers = dict(zip(sorted({row["name"] for row in points}), "osD^vPX*<>", strict=False))
    colors = {"float32": "tab:blue", "bfloat16": "tab:orange", "float16": "tab:green"}
    seen = set()
    for row in points:
        label = f"{row['name']}, {row['dtype']}"
        axes.scatter(
            row["intensity"],
            row["gflop_per_s"],
            marker=markers[row["name"]],
            color=colors[row["dtype"]],
            alpha=0.75,
            label=None if label in seen else label,
        )
        seen.add(label)
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP per byte moved)", ylabel="GFLOP/s")
    axes.set_title(f"{machine.name}, {machine.threads} threads, lowbit {machine.lowbit_isa}")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


#: In the picture of times: contender -> its name there and its colour. DENSE stands for the operand's own dtype.
_SHOWN = {
    "lowbit": ("lowbit", "#1b6ca8"),
    "dense": ("dense torch", "#b0b7bf"),
    "bitsandbytes": ("bitsandbytes", "#e08a3c"),
}


def _short(milliseconds: float) -> str:
    """Two digits, and no exponent."""
    return f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.2g}"


def plot_times(path: str, machine: Machine, rows: list[dict]) -> None:
    """Draw milliseconds of lowbit, dense torch and bitsandbytes by operation for the first shape, a panel per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    n, k = rows[0]["n"], rows[0]["k"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, panels = pyplot.subplots(1, len(dtypes), figsize=(5.5 * len(dtypes), 4.2), squeeze=False, sharey=True)
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        names = {"lowbit": "lowbit", DENSE[dtype]: "dense", BITSANDBYTES: "bitsandbytes"}
        names[BITSANDBYTES_EVAL] = names[BITSANDBYTES]  # the faster of the two
        times: dict[str, dict[str, float]] = {}
        for row in rows:
            if (row["dtype"], row["n"], row["k"]) == (dtype, n, k) and row["name"] in names and "median_ms" in row:
                operation = row["operation"].replace(" into", "\ninto") + (
                    f"\n{row['m']} row{'s' * (row['m'] > 1)}" if row["m"] else ""
                )
                shown = times.setdefault(operation, {})
                shown[names[row["name"]]] = min(row["median_ms"], shown.get(names[row["name"]], math.inf))
        for at, by_name in enumerate(times.values()):
            for place, name in enumerate(_SHOWN):
                if name in by_name:
                    x, (label, color) = at + (place - 1) * 0.27, _SHOWN[name]
                    axes.bar(x, by_name[name], 0.25, color=color, label=label if at == 0 else None)
                    axes.annotate(_short(by_name[name]), (x, by_name[name]), ha="center", va="bottom", fontsize=7)
        axes.set(yscale="log", title=dtype, xticks=range(len(times)))
        axes.set_xticklabels(times, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    panels[0][0].set_ylabel("milliseconds (log scale)")
    panels[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{n} x {k}, NF4, {machine.name}, {machine.threads} threads", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
