"""The tables that `serve_many_adapters.py` ends with."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

_WAYS = {"together": "one mixed batch", "by_adapter": "a batch for each adapter", "one_at_a_time": "one at a time"}


def print_results(results: dict, answers: list[dict], output: Path) -> None:
    """Print the results of one run (the fields of results.json) and a few answers as tables."""
    console = Console()
    # rich assumes 80 columns in a pipe or a log, and would cut long lines.
    console.width = max(console.width, 100)
    for table in (_accuracy(results), _answers(answers), _times(results), _facts(results)):
        console.print(table)
    console.print(f"Written: {', '.join(sorted(p.name for p in output.iterdir()))} in {output}", highlight=False)


def _accuracy(results: dict) -> Table:
    tasks = results["tasks"]
    table = Table(title="Test accuracy of each adapter, and of combinations with the head of the task")
    table.add_column("adapter")
    for name, task in tasks.items():
        table.add_column(f"{name}\n({len(task['labels'])} labels, {task['test_rows']:,} texts)", justify="right")
    table.add_row("always the commonest label", *(f"{task['commonest']:.4f}" for task in tasks.values()))
    for name in tasks:
        table.add_row(name, *(f"{task['accuracy']:.4f}" if other == name else "-" for other, task in tasks.items()))
    for number, (name, accuracy) in enumerate(results["combined"].items()):
        table.add_row(name, *(f"{accuracy[task]:.4f}" for task in tasks))
        if not number:
            table.rows[-2].end_section = True
    return table


def _answers(answers: list[dict]) -> Table:
    table = Table(title="Answers from one batch")
    table.add_column("text")
    table.add_column("adapter")
    table.add_column("answer")
    table.add_column("probability", justify="right")
    before = None
    for answer in answers:
        text = answer["text"] if answer["text"] != before else ""
        before = answer["text"]
        table.add_row(text, answer["adapter"], answer["answer"], f"{answer['probability']:.2f}")
    return table


def _times(results: dict) -> Table:
    table = Table(title=f"Milliseconds to answer requests for {len(results['tasks'])} adapters (median)")
    table.add_column("requests", justify="right")
    for name in _WAYS.values():
        table.add_column(name, justify="right")
    for count, times in results["serving"]["milliseconds"].items():
        table.add_row(str(count), *(f"{times[way]:.1f}" for way in _WAYS))
    return table


def _facts(results: dict) -> Table:
    table = Table(title=f"{results['method']}: {results['model']}, seed {results['seed']}")
    table.add_column("measured")
    table.add_column("value", justify="right")
    for name, value in _rows(results):
        table.add_row(name, value)
    return table


def _rows(results: dict):
    tasks, serving = results["tasks"], results["serving"]
    yield "base in float32", _megabytes(results["base_bytes_dense"])
    yield "base as it is stored", _megabytes(results["base_bytes_stored"])
    for name, task in tasks.items():
        yield f"adapter {name}: saved", _megabytes(task["saved_bytes"])
        yield f"adapter {name}: training, {task['train_rows']:,} texts", f"{task['train_seconds']:.0f} s"
    yield "loaded again onto a fresh base", _difference(results["reload"])
    yield "mixed batch against one at a time", _difference(serving["compared"])
    yield "switching to another adapter", f"{serving['switch_milliseconds']:.2f} ms"
    yield "total time", f"{results['total_seconds']:.0f} s"
    yield "CPU time of all threads", f"{results['cpu_seconds']:.0f} s"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _difference(compared: dict) -> str:
    different, largest = compared["different_predictions"], compared["max_logit_difference"]
    same = "same predictions" if different == 0 else f"{different:,} predictions differ"
    return f"{same}, logits {'equal' if largest == 0 else f'within {largest:.1e}'}"
