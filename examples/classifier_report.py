"""What a run measured: the fields of results.json, and the table that ends a run."""

import argparse
import platform
from pathlib import Path

import torch
from classifier_training import History
from model_memory import BaseBytes, base_bytes
from rich.console import Console
from rich.table import Table


def run_facts(options: argparse.Namespace, dense: BaseBytes, model: torch.nn.Module, history: History) -> dict:
    """Return the options of a run, the sizes of its model (`dense` before, `model` after wrapping), and its history."""
    stored = base_bytes(model)
    return {
        "method": options.method,
        "model": options.model,
        "dataset": options.dataset,
        "rank": None if options.method == "full" else options.rank,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "seed": options.seed,
        "accuracy_by_step": history.accuracy,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "base_parameters": dense.parameters,
        "base_bytes_dense": dense.total,
        "base_bytes_stored": stored.total,
        "target_bytes_dense": stored.quantized_dense,
        "target_bytes_stored": stored.quantized,
        "median_step_seconds": history.median_step_seconds,
        "train_seconds": history.train_seconds,
        "losses": history.losses,
        "machine": machine_facts(options.device),
    }


def machine_facts(device: str) -> dict:
    """Return what the times of a run depend on."""
    return {
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def print_results(results: dict, output: Path, rows_are: str) -> None:
    """Print the results of one run (the fields of results.json) as a table; `rows_are` "texts" or "images"."""
    table = Table(title=f"{results['method']}: {results['model']} on {results['dataset']}, seed {results['seed']}")
    table.add_column("measured")
    table.add_column("value", justify="right")
    for name, value in _rows(results, rows_are):
        table.add_row(name, value)
    console = Console()
    # rich assumes 80 columns in a pipe or a log, and would cut long lines.
    console.width = max(console.width, 100)
    console.print(table)
    console.print(f"Written: {', '.join(sorted(p.name for p in output.iterdir()))} in {output}", highlight=False)


def _rows(results: dict, rows_are: str):
    if "accuracy_before" in results:
        yield "test accuracy before training", f"{results['accuracy_before']:.4f}"
    if "linear_probe_accuracy" in results:
        yield "test accuracy of a linear probe, frozen base", f"{results['linear_probe_accuracy']:.4f}"
    yield "test accuracy after training", f"{results['accuracy_after']:.4f}"
    yield f"test {rows_are}", f"{results['test_rows']:,}"
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
    if "cpu_seconds" in results:
        yield "CPU time of all threads", f"{results['cpu_seconds']:.0f} s"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _difference(compared: dict, rows: int) -> str:
    predictions = compared["different_predictions"]
    same = "same predictions" if predictions == 0 else f"{predictions:,} of {rows:,} predictions differ"
    largest = compared["max_logit_difference"]
    return f"{same}, logits {'equal' if largest == 0 else f'within {largest:.1e}'}"
