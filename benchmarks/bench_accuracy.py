"""Accuracy of full fine-tuning, LoRA and QLoRA on the bundled tasks or on GLUE: mean and spread over seeds.

python benchmarks/bench_accuracy.py --results accuracy.jsonl
python benchmarks/bench_accuracy.py --results glue.jsonl --tasks cola sst2 mrpc stsb qnli rte --max-length 128 \
    --model FacebookAI/roberta-large --lr-full 1e-5 --lr-adapters 3e-4 --device cuda
python benchmarks/bench_accuracy.py --results accuracy.jsonl --table

Each finished run is a line of the results file. A run that is there already is not done again, so a stopped program
goes on where it was. The table is made from that file. The score is that of the last step: test rows choose nothing.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
from pathlib import Path

#: Rows to train on, rows to test on, epochs, rows per step and the peak learning rate of full fine-tuning, where the
#: options do not say: minutes on two cores. At 1e-4 the vision transformer's own weights are lost (77% of the digits).
SIZES = {"text": (2000, 2000, 2, 32, 1e-4), "images": (1000, 1000, 2, 16, 3e-5)}
GLUE_SIZES = (None, None, 3, 32, 2e-5)
#: The optimizers, as the table names them.
OPTIMIZERS = {"torch": "torch AdamW", "paged": "PagedAdamW", "8bit": "AdamW8bit"}
#: What QLoRA may lose against full fine-tuning, in points (hundredths of the score).
ALLOWED_LOSS = 0.5


def runs(options: argparse.Namespace) -> list[dict]:
    """Return the settings of every run. All methods of one seed come before the next seed: tables fill evenly."""
    found = []
    for seed in range(options.seeds):
        for task in options.tasks:
            train_rows, test_rows, epochs, batch_size, lr_full = SIZES.get(task, GLUE_SIZES)
            for method in options.methods:
                ranks = [None] if method == "full" else options.ranks
                for rank, optimizer in itertools.product(ranks, options.optimizers):
                    found.append(
                        {
                            "task": task,
                            "model": options.model,
                            "method": method,
                            "rank": rank,
                            "optimizer": optimizer,
                            "seed": seed,
                            "train_rows": train_rows if options.train_rows is None else options.train_rows or None,
                            "test_rows": test_rows if options.test_rows is None else options.test_rows or None,
                            "epochs": options.epochs or epochs,
                            "batch_size": options.batch_size or batch_size,
                            "lr": (options.lr_full or lr_full) if method == "full" else options.lr_adapters,
                            "max_length": options.max_length,
                        }
                    )
    return found


def key(run: dict) -> str:
    """Return what makes a run the same as another."""
    return json.dumps(run, sort_keys=True)


def read_results(path: Path) -> dict[str, dict]:
    """Return the finished runs by their keys. A line that a stopped program left unfinished is passed over."""
    done = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        done[key(result["run"])] = result
    return done


def append(path: Path, result: dict) -> None:
    """Write a line to the end of the file, and wait until the disk has it."""
    unfinished = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a") as file:
        file.write("\n" * unfinished + json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())


def make_optimizer(name: str, model, lr: float, weight_decay: float):
    """Return an optimizer of what trains of a model."""
    import torch

    from lowbit_lora import get_paged_optimizer

    if name == "torch":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    bits = 8 if name == "8bit" else 32
    return get_paged_optimizer(model, lr=lr, weight_decay=weight_decay, bits=bits, paged=name == "paged")


def do(run: dict, task, options: argparse.Namespace) -> dict:
    """Train once, and return the line of the results file."""
    import classifier_model
    import classifier_training
    import torch
    from machine import cpu_name

    how = argparse.Namespace(method=run["method"], rank=run["rank"], lora_alpha=16.0, lora_dropout=0.1)
    model = classifier_model.wrap(task.load_base(run["seed"]), how).to(options.device)
    history = classifier_training.train(
        model,
        task.train,
        task.test,
        epochs=run["epochs"],
        batch_size=run["batch_size"],
        lr=run["lr"],
        weight_decay=0.0,
        seed=run["seed"],
        device=options.device,
        progress=sys.stderr.isatty(),
        loss_of=task.loss,
        score=task.score,
        each_epoch=False,
        make_optimizer=functools.partial(make_optimizer, run["optimizer"]),
    )
    return {
        "run": run,
        "score": task.score(history.logits, task.test.labels),
        "metrics": {name: metric(history.logits, task.test.labels) for name, metric in task.metrics.items()},
        "base": task.model,
        "train_rows": len(task.train),
        "test_rows": len(task.test),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "last_loss": history.losses[-1],
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else cpu_name(),
        "torch": torch.__version__,
    }


def summary(results: list[dict]) -> list[dict]:
    """Return one row for each method of each task, with the mean and the spread of its scores in percent.

    ``points`` is the difference to the mean of full fine-tuning; of the best, where it has several learning rates.
    """
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(key(result["run"] | {"seed": None}), []).append(result)
    rows = []
    for group in groups.values():
        scores = [100 * result["score"] for result in group]
        rows.append(
            group[0]["run"]
            | {name: group[0][name] for name in ("base", "trainable", "train_rows", "test_rows")}
            | {
                "metrics": ", ".join(group[0]["metrics"]),
                "seeds": len(scores),
                "mean": statistics.mean(scores),
                "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
                "lowest": min(scores),
                "highest": max(scores),
            }
        )
    for row in rows:
        full = [other["mean"] for other in rows if title(other) == title(row) and other["method"] == "full"]
        row["points"] = row["mean"] - max(full) if full else None
    return rows


def title(row: dict) -> str:
    """Return what the rows of one table have in common."""
    return (
        f"{row['task']}: {row['base']}, {row['metrics']} in %; trained on {row['train_rows']:,} rows, "
        f"{row['epochs']} epochs in batches of {row['batch_size']}; tested on {row['test_rows']:,}"
    )


def print_tables(console, rows: list[dict]) -> None:
    """Print a table for each task, and by how much QLoRA is apart from full fine-tuning."""
    from rich.table import Table

    methods = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
    for heading in dict.fromkeys(map(title, rows)):
        columns = (
            "method",
            "optimizer",
            "r",
            "lr",
            "trainable",
            "seeds",
            "mean",
            "deviation",
            "lowest",
            "highest",
            "points",
        )
        table, verdicts = Table(*columns, title=heading), []
        for row in rows:
            if title(row) != heading:
                continue
            points = "" if row["points"] is None else f"{row['points']:+.2f}"
            table.add_row(
                methods[row["method"]],
                OPTIMIZERS[row["optimizer"]],
                str(row["rank"] or ""),
                f"{row['lr']:g}",
                f"{row['trainable']:,}",
                str(row["seeds"]),
                f"{row['mean']:.2f}",
                "" if row["deviation"] is None else f"{row['deviation']:.2f}",
                f"{row['lowest']:.2f}",
                f"{row['highest']:.2f}",
                points,
            )
            if row["method"] == "qlora" and points:
                verdict = "within" if row["points"] >= -ALLOWED_LOSS else "NOT within"
                verdicts.append(
                    f"QLoRA r = {row['rank']}: {points} points, {verdict} {ALLOWED_LOSS} of full fine-tuning"
                )
        console.print(table, *verdicts, sep="\n")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    from accuracy_tasks import BUNDLED, NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="JSON lines; made if not there")
    parser.add_argument("--tasks", nargs="+", default=[*BUNDLED], choices=NAMES)
    parser.add_argument("--model", help="for texts: a model folder or a hub name (default: the bundled one, BERT base)")
    parser.add_argument("--methods", nargs="+", default=["full", "lora", "qlora"], choices=["full", "lora", "qlora"])
    parser.add_argument("--optimizers", nargs="+", default=["paged"], choices=[*OPTIMIZERS])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--train-rows", type=int, help="0: all")
    parser.add_argument("--test-rows", type=int, help="0: all")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr-full", type=float, help="peak learning rate of full fine-tuning (default: the task's)")
    parser.add_argument("--lr-adapters", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=64, help="longest text, in tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--table", action="store_true", help="run nothing: print the table of the results file")
    options = parser.parse_args(argv)
    for name in ("seeds", "epochs", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if any(rank < 1 for rank in options.ranks):
        parser.error(f"--ranks: expected numbers of at least 1, got {options.ranks}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    import accuracy_tasks
    import torch
    from classifier_data import DataError
    from rich.console import Console
    from tqdm import tqdm

    if options.threads:
        torch.set_num_threads(options.threads)
    done, tasks = read_results(options.results), {}
    wanted = [] if options.table else [run for run in runs(options) if key(run) not in done]
    for run in tqdm(wanted, unit="run", disable=None):
        name = run["task"]
        if name not in tasks:
            try:
                sizes = run["train_rows"], run["test_rows"], run["max_length"]
                tasks[name] = accuracy_tasks.load(name, options.model, *sizes)
            except (DataError, OSError, ValueError) as error:
                print(f"error: {name}: {error}", file=sys.stderr)
                return 2
        result = do(run, tasks[name], options)
        append(options.results, result)
        done[key(run)] = result
    print_tables(Console(width=130), summary(list(done.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
