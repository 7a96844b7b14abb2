"""The options that every classification example has, and their checks.

The checks end the program with status 2 before any work is done.
"""

import argparse
from pathlib import Path

import torch

# Full fine-tuning moves every weight and needs smaller steps than the adapters, which start at zero.
DEFAULT_LR = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}


def add_training_options(
    parser: argparse.ArgumentParser, *, methods: tuple[str, ...], method: str, epochs: int, batch_size: int, output: str
) -> None:
    """Add the options of training and output; the arguments are the defaults of this example."""
    add = parser.add_argument
    add("--method", choices=methods, default=method, help="which weights train")
    add("--rank", type=int, default=8, help="rank of the LoRA matrices")
    add("--lora-alpha", type=float, default=16.0, help="LoRA scaling is lora-alpha / rank")
    add("--lora-dropout", type=float, default=0.1, help="dropout before the LoRA matrices")
    add("--epochs", type=int, default=epochs, help="passes over the training rows")
    add("--batch-size", type=int, default=batch_size, help="rows per step")
    rates = ", ".join(f"{DEFAULT_LR[name]:g} for {name}" for name in methods)
    add("--lr", type=float, default=None, help=f"peak learning rate (default: {rates})")
    add("--weight-decay", type=float, default=0.0, help="AdamW's weight decay")
    add("--seed", type=int, default=0, help="seed of initialisation, order and dropout (not of the split)")
    add("--train-size", type=int, default=None, help="use only the first rows of the training part")
    add("--test-size", type=int, default=None, help="use only the first rows of the test part")
    add("--device", default="cpu", help="cpu or cuda")
    add("--output", type=Path, default=Path(output), help="folder for what the run writes")


def check_training_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check what `add_training_options` added, and fill in the learning rate."""
    for name in ("rank", "epochs", "batch_size", "train_size", "test_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected a whole number of at least 1, got {value}")
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


def local_or_hub_model(name: str, files: tuple[str, ...] = ("config.json",)) -> str:
    """Return the name of a model folder that has these files; any other name is left to the hub client."""
    if Path(name).is_dir():
        for file in files:
            if not (Path(name) / file).is_file():
                raise ValueError(f"--model: the folder {name} has no {file}; expected a transformers model")
        return name
    if name.startswith((".", "/", "~")) or Path(name).exists():
        raise ValueError(f"--model: {name} is not a model folder")
    return name
