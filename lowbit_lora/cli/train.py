"""``lowbit train``: an adapter for a model, by transformers' Trainer."""

import contextlib
import enum
import math
import os
import sys
import time
from typing import Annotated, Any

import typer

from lowbit.files.folder import written_beside

from . import rows
from .merge import Dtype
from .models import DTYPES, load, read_config
from .output import Json, report, write
from .quantize import Format, Scale


class Task(str, enum.Enum):
    auto = "auto"
    classification = "classification"
    causal_lm = "causal-lm"
    chat = "chat"


class Method(str, enum.Enum):
    qlora = "qlora"
    lora = "lora"


class LossOn(str, enum.Enum):
    assistant = "assistant"
    all = "all"


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog="Examples: lowbit train ./my-model chats.jsonl ./adapter --epochs 2, or lowbit train --config run.yaml"
    )(train)


def _read_settings(context: typer.Context, path: str | None) -> str | None:
    """Take the defaults of the options from a YAML file."""
    if path is None:
        return None
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(str(error)) from error
    if not isinstance(settings, dict):
        raise typer.BadParameter(f"expected names and values in {path}")
    known = [parameter.name for parameter in context.command.params]
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    unknown = [name for name in settings if name not in known or name == "config"]
    if unknown:
        raise typer.BadParameter(f"expected options among {', '.join(known)}, got {', '.join(unknown)}")
    context.default_map = settings
    return path


def train(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the base, dense or quantized.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A .jsonl, .csv, .tsv or .parquet file, or a hub name.")],
    out: Annotated[str, typer.Argument(help="Folder of the adapter, and of metrics.json.")],
    config: Annotated[
        str | None,
        typer.Option(callback=_read_settings, is_eager=True, help="YAML file of these options (rank: 16)."),
    ] = None,
    task: Annotated[Task, typer.Option(help="By default what the columns say.")] = Task.auto,
    text_column: Annotated[str, typer.Option(help="Column of texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of labels, of a classification.")] = "label",
    loss_on: Annotated[LossOn, typer.Option(help="What of conversations is learnt.")] = LossOn.assistant,
    eval_data: Annotated[str | None, typer.Option(help="Data to evaluate with.")] = None,
    eval_share: Annotated[float, typer.Option(min=0, max=1, help="Or a share of DATA to hold out for it.")] = 0.0,
    split: Annotated[str, typer.Option(help="Split of a data set of the hub.")] = "train",
    max_length: Annotated[int, typer.Option(min=2, help="The most tokens of a row.")] = 512,
    method: Annotated[Method, typer.Option(help="On a 4-bit base, or on it as it is.")] = Method.qlora,
    format: Annotated[Format, typer.Option(help="How a 4-bit base is stored.")] = Format.nf4,
    block_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Store the scales in 8 bits.")] = True,
    scale: Annotated[Scale, typer.Option(help="How scales are found.")] = Scale.absmax,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="The adapter counts lora_alpha / rank.")] = 16.0,
    lora_dropout: Annotated[float, typer.Option(help="Of the adapter's inputs.")] = 0.0,
    target: Annotated[list[str] | None, typer.Option(help="Layers to adapt; by default all linear ones.")] = None,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Stop after so many steps; -1 does not.")] = -1,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step and device.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches of a step of the optimizer.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 2e-4,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 0.0,
    warmup_steps: Annotated[float, typer.Option(min=0, help="Steps, or below 1 a share of them.")] = 0.03,
    schedule: Annotated[str, typer.Option(help="transformers' name of the learning rate's course.")] = "linear",
    dtype: Annotated[Dtype | None, typer.Option(help="Of the base; by default its own.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations: less memory, more time.")] = False,
    save_steps: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0 makes none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no GPU.")] = False,
    json: Json = False,
) -> None:
    """Train an adapter on texts with labels, on texts, or on conversations ("messages": [{role, content}, ...]).

    Several GPUs: torchrun --nproc-per-node 8 -m lowbit_lora.cli train ...
    """
    import transformers

    started = time.perf_counter()
    training = rows.read(data, split)
    kind = rows.task_of(training, text_column, label_column) if task is Task.auto else task.value
    evaluation = rows.read(eval_data, split) if eval_data is not None else None
    if eval_data is None and eval_share:
        training, evaluation = rows.split(training, eval_share, seed)
    base_config = read_config(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    labels = rows.labels(training, label_column) if kind == "classification" else None

    how = (kind, tokenizer, text_column, label_column, labels, max_length, loss_on is LossOn.assistant)
    training = rows.encoded(training, *how)
    evaluation = None if evaluation is None else rows.encoded(evaluation, *how)
    transformers.set_seed(seed)
    stored = {"format": format.value, "block_size": block_size, "double_quant": double_quant, "scale": scale.value}
    lora = {"rank": rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    lora |= {"target_modules": target} if target else {}
    base = _load(model, base_config, labels, pad, stored if method is Method.qlora else None, dtype)
    adapted = _adapted(base, method, stored, lora | {"gradient_checkpointing": checkpointing})
    arguments = transformers.TrainingArguments(
        output_dir=out,
        num_train_epochs=epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        lr_scheduler_type=schedule,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        logging_steps=10,
        report_to=[],
        seed=seed,
        use_cpu=cpu,
        remove_unused_columns=False,  # every column is for the model
    )
    trainer = transformers.Trainer(
        model=adapted,
        args=arguments,
        train_dataset=training,
        eval_dataset=evaluation,
        data_collator=rows.padded(pad),
        compute_metrics=_accuracy if kind == "classification" else None,
    )
    trainable, parameters = adapted.count_parameters()
    metrics = {"task": kind, "trainable_parameters": trainable, "parameters": parameters, "train_rows": len(training)}
    with contextlib.redirect_stdout(sys.stderr):  # Trainer's logs are no part of the report
        metrics |= _run(trainer, kind, resume)
    adapted.save_pretrained(out, is_main_process=trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        metrics |= {"out": out, "seconds": time.perf_counter() - started}
        with written_beside(out) as beside:
            tokenizer.save_pretrained(beside)
            write(os.path.join(beside, "metrics.json"), metrics)
        report(metrics, json)


def _run(trainer: Any, task: str, resume: bool) -> dict[str, Any]:
    """Train, and evaluate before and after where there is something to evaluate with; returns what was measured."""
    measured: dict[str, Any] = {}
    evaluates = trainer.eval_dataset is not None
    if evaluates:
        measured["eval_rows"] = len(trainer.eval_dataset)
        measured |= {f"{name}_before": value for name, value in _evaluated(trainer, task).items()}
    result = trainer.train(resume_from_checkpoint=resume or None)
    measured |= {"steps": result.global_step, "train_loss": result.training_loss}
    return measured | (_evaluated(trainer, task) if evaluates else {})


def _load(model: str, config: Any, labels: list[str] | None, pad: int, stored: dict[str, Any] | None, dtype: Any):
    """The base: with a head for these labels, or as a language model; its weights are quantized as they are read."""
    from ..hf.config import LowbitConfig

    options: dict[str, Any] = {"dtype": "auto" if dtype is None else DTYPES[dtype.value]}
    if stored is not None and getattr(config, "quantization_config", None) is None:
        options["quantization_config"] = LowbitConfig(**stored)
    if labels is None:
        return load(model, "AutoModelForCausalLM", **options)
    config.num_labels = len(labels)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    config.pad_token_id = pad
    return load(model, "AutoModelForSequenceClassification", config=config, **options)


def _adapted(base, method: Method, stored: dict[str, Any], lora: dict[str, Any]):
    from .. import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel

    if method is Method.lora:
        return LoraModel(base, LoraConfig(**lora))
    stored = {"quantization" if name == "format" else name: value for name, value in stored.items()}
    return QLoRAModel(base, QLoRAConfig(**lora, **stored))


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def _evaluated(trainer: Any, task: str) -> dict[str, float]:
    found = trainer.evaluate()
    kept = {name: found[name] for name in ("eval_loss", "eval_accuracy") if name in found}
    if task != "classification":
        kept["eval_perplexity"] = math.exp(min(found["eval_loss"], 700))
    return kept
