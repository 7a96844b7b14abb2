"""What the example on language models shows at its end: a table, replies, and a picture of the loss."""

import math
from pathlib import Path

import classifier_plots  # chooses a backend of matplotlib that needs no display
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_results(results: dict, output: Path) -> None:
    """Print the fields of results.json as tables: what was measured, and replies before and after training."""
    table = Table(title=f"{results['method']}: {results['model']} on {results['dataset']}, seed {results['seed']}")
    table.add_column("measured")
    table.add_column("value", justify="right")
    for name, value in _rows(results):
        table.add_row(name, value)
    replies = Table(title="Replies to held-out dialogues, the likeliest token each time", show_lines=True)
    for name in ("prompt", "before training", "after training", "the person's"):
        replies.add_column(name, ratio=1)
    for sample in results["samples"]:
        replies.add_row(*(Text(sample[key]) for key in ("prompt", "before", "after", "human")))
    console = Console()
    # rich assumes 80 columns in a pipe or a log, and would cut long lines.
    console.width = max(console.width, 120)
    console.print(table)
    console.print(replies)
    console.print(f"Written: {', '.join(sorted(p.name for p in output.iterdir()))} in {output}", highlight=False)


def _rows(results: dict):
    yield "perplexity of held-out replies before training", f"{results['perplexity_before']:.2f}"
    yield "perplexity of held-out replies after training", f"{results['perplexity_after']:.2f}"
    yield (
        "held-out dialogues, tokens of replies in them",
        f"{results['test_dialogues']:,}, {results['test_reply_tokens']:,}",
    )
    yield "dialogues trained on, tokens in them", f"{results['train_dialogues']:,}, {results['train_tokens']:,}"
    share = results["trainable_parameters"] / results["base_parameters"]
    yield "trainable parameters", f"{results['trainable_parameters']:,} ({share:.2%} of the base)"
    yield "base as loaded", _megabytes(results["base_bytes"])
    if results["quantized_bytes"]:
        dense, stored = _megabytes(results["quantized_bytes_dense"]), _megabytes(results["quantized_bytes"])
        yield "  of it the quantized linear layers (before in fp32)", f"{dense} -> {stored}"
    yield "time to load and quantize", f"{results['load_seconds']:.2f} s"
    yield "saved adapter", _megabytes(results["saved_bytes"])
    if results["peak_memory_bytes"] is not None:
        yield "peak memory of the process (RSS)", _megabytes(results["peak_memory_bytes"])
    yield "training time", f"{results['train_seconds']:.0f} s for {len(results['losses'])} steps"
    yield "reloaded onto a fresh base", f"logits within {results['reload_max_logit_difference']:.1e}"
    yield "total time", f"{results['total_seconds']:.0f} s"
    yield "CPU time of all threads", f"{results['cpu_seconds']:.0f} s"


def plot_loss(path: Path, results: dict, title: str) -> None:
    """Write a PNG: the loss of every step with its running mean, and that of the held-out replies before and after."""
    losses = results["losses"]
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    steps, window = range(1, len(losses) + 1), max(1, len(losses) // 10)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
    means = classifier_plots.running_mean(losses, window)
    axes.plot(steps, means, color="tab:blue", label=f"training, mean of {window} steps")
    held_out = [(0, results["perplexity_before"]), (len(losses), results["perplexity_after"])]
    heights = [math.log(perplexity) for _, perplexity in held_out]
    axes.plot([step for step, _ in held_out], heights, "o", color="tab:green", label="held-out replies")
    for (step, perplexity), height, side in zip(held_out, heights, ("left", "right"), strict=True):
        text = f"perplexity {perplexity:.1f}"
        axes.annotate(text, (step, height), textcoords="offset points", xytext=(0, 9), ha=side)
    axes.set(xlabel="step", ylabel="loss (nats per token of a reply)", title=title)
    axes.margins(0.04, 0.15)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
