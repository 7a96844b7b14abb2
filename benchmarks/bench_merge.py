"""What merging a trained adapter into 4 bits keeps of it, by how the weights are quantized again.

python benchmarks/bench_merge.py dialogues --adapter ./adapter --json merge.json --markdown merge.md --plot merge.png
python benchmarks/bench_merge.py reviews --markdown reviews.md

dialogues: the bundled language model (or the one in --model) is stored in NF4, an adapter of rank 16 is trained for 120
steps on the bundled dialogues (once: --adapter keeps it), and is merged in each way. Losses are means over 96 held-out
windows of 128 tokens. reviews: the same with the bundled encoder, which learns in two epochs to tell good reviews from
bad ones; its base has the trained head too. Recovery is the share of the adapter's gain in loss that is left. Weights
are calibrated on other rows, which the training may have seen.
"""

import argparse
import contextlib
import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import calibration_text
import torch
from torch import nn

CONTENDERS = ("16 bits", "naive", "search", "scale", "static", "sequential")
NAMES = {
    "16 bits": "merged into 16 bits",
    "naive": "merged into NF4: absmax",
    "search": "merged into NF4: search",
    "scale": "merged into NF4: search weighted by inputs",
    "static": "merged into NF4: calibrated, static",
    "sequential": "merged into NF4: calibrated, sequential",
}
LENGTH, HELD_OUT, TRAIN_FROM, DIALOGUES, ROWS = 128, 96, 200, 3000, 16
REVIEWS = 2000  # to train on, and as many to judge by


@dataclass(frozen=True)
class Case:
    """A model in NF4 with a trained adapter; ``judge`` returns the ``loss`` of a model and what else is measured."""

    model: nn.Module
    judge: Callable[[nn.Module], dict[str, float]]
    calibration: list[dict]


def windows(tokenizer, file: str | None) -> torch.Tensor:
    """[windows, LENGTH]: token ids of the first dialogues."""
    texts = calibration_text.dialogues(file).split("\n\n")[:DIALOGUES]
    ids = torch.tensor(tokenizer("\n\n".join(texts), verbose=False)["input_ids"])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def batches(ids: torch.Tensor) -> list[dict]:
    """Batches of windows, with labels."""
    return [{"input_ids": some, "labels": some} for some in ids.split(ROWS)]


def dialogues(options: argparse.Namespace) -> Case:
    """The language model, and an adapter trained on dialogues."""
    from transformers import AutoTokenizer

    from lowbit_lora.recovery import mean_loss

    ids = windows(AutoTokenizer.from_pretrained(options.model), options.dialogues)
    held_out, training = batches(ids[:HELD_OUT]), ids[TRAIN_FROM:]
    model = adapted(options.model, options.adapter, training, options.steps)
    return Case(
        model, lambda judged: {"loss": mean_loss(judged.eval(), held_out)[0]}, batches(training[: options.windows])
    )


def reviews(options: argparse.Namespace) -> Case:
    """The encoder, and an adapter trained on reviews; --windows counts reviews."""
    import accuracy_tasks
    import classifier_model
    import classifier_training
    import torch.nn.functional as F

    task = accuracy_tasks.load("text", None, REVIEWS, REVIEWS, LENGTH)
    how = argparse.Namespace(method="qlora", rank=16, lora_alpha=16.0, lora_dropout=0.1)
    model = classifier_model.wrap(task.load_base(0), how)
    settings = {"epochs": 2, "batch_size": 32, "lr": 1e-3, "weight_decay": 0.0, "seed": 0, "device": "cpu"}
    classifier_training.train(model, task.train, task.test, progress=not options.quiet, **settings)

    def judge(judged: nn.Module) -> dict[str, float]:
        logits = classifier_training.predict(judged, task.test, 64, "cpu")
        labels = task.test.labels
        return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy_tasks.accuracy(logits, labels)}

    calibration = []
    for begin in range(0, options.windows, ROWS):
        inputs, labels = task.train.batch(range(begin, min(begin + ROWS, options.windows)), "cpu")
        calibration.append(inputs | {"labels": labels})
    return Case(model.eval(), judge, calibration)


@contextlib.contextmanager
def without_factors(model: nn.Module):
    """Context in which the adapter adds nothing to the layers; what else was trained stays."""
    factors = [p for name, p in model.named_parameters() if ".lora_b." in name.lower()]
    kept = [factor.detach().clone() for factor in factors]
    try:
        for factor in factors:
            factor.data.zero_()
        yield
    finally:
        for factor, before in zip(factors, kept, strict=True):
            factor.data.copy_(before)


def train(model, ids: torch.Tensor, steps: int) -> None:
    """AdamW with a linearly falling rate, 4 windows a step."""
    parameters, generator = model.trainable_parameters(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(parameters, lr=4e-4)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-4 * (1 - step / steps)
        some = ids[torch.randint(0, len(ids), (4,), generator=generator)]
        found = model(input_ids=some, labels=some).loss
        found.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {found.item():.3f}", flush=True)
    model.eval()


def adapted(folder: str, adapter: str | None, ids: torch.Tensor, steps: int):
    """The model in NF4 with a trained adapter, which is read from ``adapter`` or, if it is not there, written to it."""
    from transformers import AutoModelForCausalLM

    from lowbit_lora import QLoRAConfig, QLoRAModel

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None and os.path.exists(os.path.join(adapter, "adapter_config.json")):
        return QLoRAModel.from_pretrained(base, adapter).eval()
    model = QLoRAModel(base, QLoRAConfig(rank=16, lora_alpha=32))
    train(model, ids, steps)
    if adapter is not None:
        model.save_pretrained(adapter)
    return model


def merged(model, how: str, calibration: list[dict], options: dict) -> nn.Module:
    """The plain model, merged as a contender's name says."""
    from lowbit.quantizers.quantize import quantize_to

    if how == "16 bits":
        return model.merge_and_unload(dtype=torch.bfloat16)
    if how in ("naive", "search"):
        quantizer = None if how == "search" else lambda values, old: quantize_to(values.to(old.dtype), old.spec)
        return model.merge_and_unload(into="quantized", minimum_cosine=-1.0, quantizer=quantizer)
    return model.merge_and_unload(into="quantized", batches=calibration, held_out=[], method=how, **options)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, of dense ones in 16 bits."""
    from lowbit import QuantizedTensor

    return sum(p.nbytes if isinstance(p, QuantizedTensor) else 2 * p.numel() for p in model.parameters())


def rows(options: argparse.Namespace) -> list[dict]:
    """One row per contender, the base and the adapter first."""
    case = {"dialogues": dialogues, "reviews": reviews}[options.task](options)
    model = case.model
    with without_factors(model):
        found = [{"name": "NF4 base"} | case.judge(model)]
    found[0]["bytes"] = stored_bytes(model) - 2 * sum(
        p.numel() for name, p in model.named_parameters() if "lora_" in name
    )
    found.append({"name": "adapter, unmerged"} | case.judge(model) | {"bytes": stored_bytes(model)})
    base, adapter = (row["loss"] for row in found)
    for row in found:
        show(row | {"recovery": (base - row["loss"]) / (base - adapter)})
    settings = {"sweeps": options.sweeps, "progress": False} | {
        name: value for name in ("damping", "shift", "ridge") if (value := getattr(options, name)) is not None
    }
    for how in options.contenders:
        twin = copy.deepcopy(model)
        cpu, wall = time.process_time(), time.perf_counter()
        plain = merged(twin, how, case.calibration, settings)
        row = {"name": NAMES[how], "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        row |= {"bytes": stored_bytes(plain)} | case.judge(plain.float() if how == "16 bits" else plain)
        if twin.merge_report.layers:
            row["cosine"] = min(layer.weight_cosine for layer in twin.merge_report.layers)
        found.append(row)
        show(row | {"recovery": (base - row["loss"]) / (base - adapter)})
        del twin, plain
    for row in found:
        row["recovery"] = (base - row["loss"]) / (base - adapter)
    return found


def show(row: dict) -> None:
    """Print a row."""
    cost = f"   {row['cpu_seconds']:.0f} CPU s, {row['seconds']:.0f} s" if "seconds" in row else ""
    right = f" accuracy {row['accuracy']:.2%}" if "accuracy" in row else ""
    print(
        f"{row['name']:42} loss {row['loss']:.4f}{right} recovery {row['recovery']:7.1%} "
        f"{row['bytes'] / 1e6:6.1f} MB{cost}",
        flush=True,
    )


def markdown(found: list[dict]) -> str:
    """The rows as a table."""
    from lowbit_lora.cli.output import table

    cells = [
        [
            row["name"],
            f"{row['loss']:.3f}",
            *([f"{row['accuracy']:.2%}"] if "accuracy" in row else []),
            f"{row['recovery']:.1%}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
            f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else "",
        ]
        for row in found
    ]
    columns = ["", "loss", *(["accuracy"] if "accuracy" in found[0] else []), "recovery", "MB", "s", "CPU s"]
    return table(columns, cells)


def plot(found: list[dict], path: str) -> None:
    """Recovery by contender, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = found[1:]
    figure, axes = pyplot.subplots(figsize=(7.5, 0.45 * len(shown) + 1), layout="constrained")
    bars = axes.barh([row["name"] for row in shown], [100 * row["recovery"] for row in shown])
    axes.bar_label(bars, [f"{row['recovery']:.1%}, {row['bytes'] / 1e6:.0f} MB" for row in shown], padding=3)
    axes.set(xlabel="share of the adapter's gain in held-out loss that is kept, %", xlim=(0, 150))
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("dialogues", "reviews"))
    calibration_text.add_options(parser)
    parser.add_argument("--adapter", help="folder of the trained adapter: read, or written if it is not there")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--windows", type=int, default=96, help="of 128 tokens, or reviews, to calibrate on")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sweeps", type=int, default=3)
    for name in ("damping", "shift", "ridge"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--markdown", help="file to write")
    parser.add_argument("--plot", help="file to write")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    from lowbit_lora.cli import output

    torch.set_num_threads(options.threads)
    if options.task == "dialogues":
        options.model = calibration_text.model_folder(options.model)
    found = rows(options)
    if options.json:
        output.write(options.json, {"windows": options.windows, "rows": found})
    if options.markdown:
        Path(options.markdown).write_text(markdown(found) + "\n", encoding="utf-8")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
