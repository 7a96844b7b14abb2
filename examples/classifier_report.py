"""The table that ends a run."""

from pathlib import Path

from rich.console import Console
from rich.table import Table


def print_results(results: dict, output: Path) -> None:
    """Print the results of one run (the fields of results.json) as a table."""
    table = Table(title=f"{results['method']}: {results['model']} on {results['dataset']}, seed {results['seed']}")
    table.add_column("measured")
    table.add_column("value", justify="right")
    for name, value in _rows(results):
        table.add_row(name, value)
    console = Console()
    # rich assumes 80 columns in a pipe or a log, and would cut long lines.
    console.width = max(console.width, 100)
    console.print(table)
    console.print(f"Written: {', '.join(sorted(p.name for p in output.iterdir()))} in {output}", highlight=False)


def _rows(results: dict):
    yield "test accuracy before training", f"{results['accuracy_before']:.4f}"
    yield "test accuracy after training", f"{results['accuracy_after']:.4f}"
    yield "test texts", f"{results['test_rows']:,}"
    share = results["trainable_parameters"] / results["base_parameters"]
    yield "trainable parameters", f"{results['trainable_parameters']:,} ({share:.2%} of the base)"
    yield "base before quantization", _megabytes(results["base_bytes_dense"])
    if results["target_bytes_stored"]:
        yield "base after quantization", _megabytes(results["base_bytes_stored"])
        yield (
            "  of it the quantized linear layers",
            (f"{_megabytes(results['target_bytes_dense'])} -> {_megabytes(results['target_bytes_stored'])}"),
        )
        yield "time to quantize and wrap", f"{results['wrap_seconds']:.2f} s"
    yield (
        "saved " + ("model" if results["method"] == "full" else "adapter"),
        _megabytes(results["saved_bytes"]),
    )
    if results["peak_memory_bytes"] is not None:
        # This is the whole process: Python, torch, the loading of the float32 checkpoint, activations.
        yield "peak memory of the process (RSS)", _megabytes(results["peak_memory_bytes"])
    yield "time per training step (median)", f"{1000 * results['median_step_seconds']:.0f} ms"
    yield "training time", f"{results['train_seconds']:.0f} s"
    yield "reloaded onto a fresh base", _difference(results["reload"], results["test_rows"])
    if "merge" in results:
        yield "merged into the base", _difference(results["merge"], results["test_rows"])
    yield "total time", f"{results['total_seconds']:.0f} s"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _difference(compared: dict, rows: int) -> str:
    predictions = compared["different_predictions"]
    same = "same predictions" if predictions == 0 else f"{predictions:,} of {rows:,} predictions differ"
    largest = compared["max_logit_difference"]
    return f"{same}, logits {'equal' if largest == 0 else f'within {largest:.1e}'}"
