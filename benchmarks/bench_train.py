"""A QLoRA training step: lowbit against PEFT + bitsandbytes, and against LoRA on the dense model.

python benchmarks/bench_train.py --dtype float32 bfloat16 --json train.json --plot train.png

The model has the shape of a 135M-parameter Llama with random weights. Every linear layer but the head is adapted. Each
contender has a process of its own. The processes take turns, so that each step runs alone and the machine's drift falls
on all alike. Peak memory is that of the process during the timed steps, above what Python and the libraries take; on a
GPU what torch has allocated there.
"""

import argparse
import os
import sys
from pathlib import Path

from bench_matmul import AVX2_ONLY
from llama_shapes import LLAMAS
from machine import place_of
from timing import Laps, cuda_of
from turns import Contender, memory_kb, take_turns

CONTENDERS = ("lowbit", "PEFT + bitsandbytes", "dense LoRA (PEFT)")


def build(contender: str, options: argparse.Namespace, dtype):
    """Return the model with its adapters, made from the same random base for every contender."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**LLAMAS[options.model], tie_word_embeddings=True)
    with torch.device(place_of(options.device)):
        model = LlamaForCausalLM(config).to(dtype)
    model.config.use_cache = False
    if contender == "lowbit":
        from lowbit_lora import QLoRAConfig, QLoRAModel

        return QLoRAModel(model, QLoRAConfig(rank=options.rank, lora_alpha=16, target_modules="all-linear"))
    from peft import LoraConfig, get_peft_model

    if contender == "PEFT + bitsandbytes":
        import bitsandbytes as bnb

        for name, linear in list(model.named_modules()):
            if isinstance(linear, torch.nn.Linear) and name != "lm_head":
                quantized = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                )
                quantized.weight = bnb.nn.Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                model.set_submodule(name, quantized.to(place_of(options.device)))
        model.is_loaded_in_4bit = True
    return get_peft_model(
        model, LoraConfig(r=options.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )


class PeakMemory:
    """The most memory in use since the last :meth:`restart`, in MB: of this process, or of its part of a GPU."""

    def __init__(self, device: str):
        self.cuda = None if device == "cpu" else cuda_of(device)
        self.base_kb = memory_kb("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far."""
        peak = Path("/proc/self/clear_refs")
        if self.cuda is not None:
            self.cuda.reset_peak_memory_stats()
        elif peak.exists():
            peak.write_text("5")

    def megabytes(self) -> float:
        """On a CPU, above what the process took when this was made."""
        if self.cuda is not None:
            return self.cuda.max_memory_allocated() / 2**20
        return (memory_kb("VmHWM") - self.base_kb) / 1024


def steps(contender: str, options: argparse.Namespace, dtype_name: str):
    """Build the model, then yield the times and the memory of one training step after the other."""
    import torch

    if options.isa:
        import lowbit  # noqa: F401  (loads the ops)

        torch.ops.lowbit.set_cpu_isa(options.isa)
    if options.threads:
        torch.set_num_threads(options.threads)
    import transformers  # noqa: F401  (part of the base, not of the model)

    peak = PeakMemory(options.device)
    model = build(contender, options, getattr(torch, dtype_name))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    vocabulary = LLAMAS[options.model]["vocab_size"]
    ids = torch.randint(vocabulary, (options.batch, options.length), generator=torch.Generator().manual_seed(1))
    ids = ids.to(place_of(options.device))
    yield {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    while True:
        peak.restart()
        laps = Laps(options.device)
        laps.mark()
        loss = model(input_ids=ids, labels=ids).loss
        laps.mark()
        loss.backward()
        laps.mark()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        laps.mark()
        times = dict(zip(("forward", "backward", "optimizer"), laps.times(), strict=True))
        yield {"loss": loss.item(), **times, "peak_mb": peak.megabytes()}


def run(options: argparse.Namespace, dtype: str) -> list[dict]:
    """Time the contenders in one dtype; return the rows of the table."""
    from timing import Sample

    contenders = [Contender(name, options.timeout, steps, name, options, dtype) for name in options.contenders]
    take_turns(contenders, options.steps, dtype)
    rows = []
    for contender in contenders:
        row = {"dtype": dtype, "name": contender.name}
        rows.append(row)
        if contender.failed:
            row["failed"] = contender.failed
            continue
        timed = contender.timed
        row["trainable"] = contender.about["trainable"]
        row["first_loss"] = contender.turns[0]["loss"]
        for phase in ("forward", "backward", "optimizer"):
            row[f"{phase}_ms"] = Sample([step[phase] for step in timed]).median
        total = Sample([step["forward"] + step["backward"] + step["optimizer"] for step in timed])
        row |= {"step_ms": total.median, "p20_ms": total.percentile(0.2), "p80_ms": total.percentile(0.8)}
        row["tokens_per_s"] = options.batch * options.length / total.median * 1e3
        row["peak_mb"] = max(step["peak_mb"] for step in timed)
    theirs = next((row for row in rows if row["name"] == "PEFT + bitsandbytes" and "step_ms" in row), None)
    for row in rows:
        if theirs and "step_ms" in row:
            row["vs_bitsandbytes"] = theirs["step_ms"] / row["step_ms"]
            row["memory_vs_bitsandbytes"] = row["peak_mb"] / theirs["peak_mb"] if theirs["peak_mb"] else 0.0
    return rows


def wrong_losses(rows: list[dict]) -> list[str]:
    """Return one line per contender whose first loss is wrong.

    lowbit and bitsandbytes hold the same decoded weights, and adapters begin at zero, so their first losses must agree.
    The loss is a mean over tokens. In bf16 it carries roundings of 2^-8 per layer that differ between the two.
    """
    ours = next((row for row in rows if row["name"] == "lowbit"), None)
    if ours is None or "failed" in ours:
        return [f"lowbit failed: {ours['failed']}"] if ours else []
    limit = 1e-4 if ours["dtype"] == "float32" else 2e-2
    theirs = [row for row in rows if row["name"] == "PEFT + bitsandbytes" and "first_loss" in row]
    return [
        f"{ours['dtype']}: first loss {ours['first_loss']} of lowbit, {row['first_loss']} of {row['name']}"
        for row in theirs
        if not abs(ours["first_loss"] - row["first_loss"]) <= limit * abs(row["first_loss"])
    ]


def print_table(console, rows: list[dict], options: argparse.Namespace) -> None:
    from rich.table import Table

    columns = (
        ("step ms", "step_ms", "{:.0f}"), ("p20", "p20_ms", "{:.0f}"), ("p80", "p80_ms", "{:.0f}"),
        ("forward", "forward_ms", "{:.0f}"), ("backward", "backward_ms", "{:.0f}"),
        ("optimizer", "optimizer_ms", "{:.0f}"), ("tokens/s", "tokens_per_s", "{:.0f}"),
        ("peak MB", "peak_mb", "{:.0f}"), ("x bnb", "vs_bitsandbytes", "{:.2f}"),
        ("memory / bnb", "memory_vs_bitsandbytes", "{:.2f}"), ("first loss", "first_loss", "{:.4f}"),
    )  # fmt: skip
    title = f"Llama {options.model}, rank {options.rank}, batch {options.batch} x {options.length} tokens"
    table = Table("dtype", "contender", *(name for name, _, _ in columns), title=title)
    for row in rows:
        if "failed" not in row:
            table.add_row(row["dtype"], row["name"], *(f.format(row[k]) if k in row else "" for _, k, f in columns))
    console.print(table)
    for row in rows:
        if "failed" in row:
            console.print(f"not timed: {row['name']}, {row['dtype']}: {row['failed'].splitlines()[0]}")


def plot(path: str, rows: list[dict]) -> None:
    """Draw step time by phase, and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [row for row in rows if "failed" not in row]
    labels = [f"{row['name']}\n{row['dtype']}" for row in done]
    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    left = [0.0] * len(done)
    for phase in ("forward", "backward", "optimizer"):
        values = [row[f"{phase}_ms"] for row in done]
        time_axes.barh(labels, values, left=left, label=phase)
        left = [a + b for a, b in zip(left, values, strict=True)]
    time_axes.set(xlabel="ms per training step (median)")
    time_axes.legend()
    memory_axes.barh(labels, [row["peak_mb"] for row in done], color="tab:gray")
    memory_axes.set(xlabel="peak memory of a step, MB", yticklabels=[])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", choices=["cpu", "cuda", "stub"], default="cpu", help="stub: stub_cuda.py")
    parser.add_argument("--model", choices=[*LLAMAS], default="135m")
    parser.add_argument("--contenders", nargs="+", default=[*CONTENDERS], choices=CONTENDERS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that warms up")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a contender may take for one step")
    parser.add_argument("--isa", choices=["avx2"], help="limit all contenders to this instruction set")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--jsonl", metavar="FILE", help="append each row to this file as it comes")
    parser.add_argument("--plot", metavar="FILE", help="a PNG")
    parser.add_argument("--quick", action="store_true", help="a smoke test: the tiny model, two steps")
    options = parser.parse_args(argv)
    for name in ("batch", "length", "rank", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.quick:
        options.model, options.batch, options.length, options.steps = "tiny", 2, 16, 2
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.isa:
        os.environ.update(AVX2_ONLY)  # read by torch when the workers load it
    from report import append_json_lines, write_json
    from rich.console import Console

    console = Console(width=170)
    if options.device != "cpu" and not cuda_of(options.device).is_available():
        print("--device cuda: torch finds no CUDA device here", file=sys.stderr)
        return 2
    if options.isa:
        console.print(f"LIMITED to {options.isa} for every contender")
    rows = []
    for dtype in options.dtype:
        found = run(options, dtype)
        append_json_lines(options.jsonl, found)
        rows += found
    print_table(console, rows, options)
    if options.json:
        write_json(options.json, {"options": vars(options), "rows": rows})
    if options.plot:
        plot(options.plot, rows)
    wrong = [text for dtype in options.dtype for text in wrong_losses([r for r in rows if r["dtype"] == dtype])]
    for text in wrong:
        console.print(f"WRONG: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
