"""The base model, its adapter, and what must hold at the end of a run."""

import argparse
import sys
from pathlib import Path

import torch

# Logits of the merged model may differ from the adapter's by rounding (the sums run in another order).
MERGE_TOLERANCE = 1e-3


def load_base(auto_class: str, path: str, labels: tuple[str, ...], seed: int):
    """Return the pretrained model in float32 with a new classification head, initialised from `seed`."""
    import transformers
    from transformers.utils import logging

    # The loader would report that the head is new, as intended, and draw bars of its own.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    return getattr(transformers, auto_class).from_pretrained(
        path,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        ignore_mismatched_sizes=True,  # a head for other labels is replaced
        dtype=torch.float32,
    )


def wrap(
    base,
    options: argparse.Namespace,
    target_modules: str | list[str] = "all-linear",
    adapter_name: str = "default",
):
    """Return the base with its trainable part: nothing (full), LoRA, or LoRA on an NF4 base (QLoRA)."""
    if options.method == "full":
        return base
    from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel

    config_type, model_type = {"lora": (LoraConfig, LoraModel), "qlora": (QLoRAConfig, QLoRAModel)}[options.method]
    # QLoRAConfig's own defaults: NF4, double-quantized scales, blocks of 64. The classification head is
    # found by the wrapper (modules_to_save) and trains in full precision.
    config = config_type(
        rank=options.rank,
        target_modules=target_modules,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
    )
    return model_type(base, config, adapter_name)


def load_adapter(base, folder: Path, method: str, adapter_name: str = "default"):
    """Return a fresh base with the saved adapter on it, as a user would make it in a new process."""
    from lowbit_lora import LoraModel, QLoRAModel

    model_type = QLoRAModel if method == "qlora" else LoraModel
    return model_type.from_pretrained(base, str(folder), adapter_name=adapter_name)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def same_answers(compared: dict) -> bool:
    """Return whether two sets of logits choose the same labels, and differ by rounding only."""
    return not compared["different_predictions"] and compared["max_logit_difference"] <= MERGE_TOLERANCE


def reload_status(is_same: bool) -> int:
    """Return 0, or 1, and say why, if the reloaded model is another one than was trained."""
    if not is_same:
        print("error: the reloaded model and the trained one predict differently", file=sys.stderr)
    return int(not is_same)


def exit_status(results: dict) -> int:
    """Return 1, and say why, if the reloaded or the merged model is another one than was trained; else 0."""
    if reload_status(same_answers(results["reload"])):
        return 1
    if "merge" in results and results["merge"]["max_logit_difference"] > MERGE_TOLERANCE:
        print("error: the merged model's logits differ by more than rounding", file=sys.stderr)
        return 1
    return 0
