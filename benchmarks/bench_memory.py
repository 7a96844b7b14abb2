"""The measured peak of a training step beside what `lowbit memory` says of it.

python benchmarks/bench_memory.py --json memory.json

Each case has a process of its own. Its peak is its resident memory at the most in the second step, above what Python
and the libraries took once a tiny model had trained. glibc is told to give each block from 64 KiB on pages of its own
(--keep-malloc leaves it alone): otherwise it keeps what was freed, and that is not a model's memory.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from turns import Contender, memory_kb

from lowbit.models import enable_checkpointing
from lowbit_lora.memory import METHODS, SHAPES, Setting, estimate

#: Model -> rows and tokens of a step.
CASES = {"BERT 110M": (4, 128), "Llama 135M": (2, 128), "RoBERTa 355M": (2, 128)}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def build(shape: dict, setting: Setting):
    """The model with what trains of it, its optimizer and a batch; random weights."""
    import transformers

    from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel

    entries = {key: value for key, value in shape.items() if key != "model_type"} | {"use_cache": False}
    config = transformers.AutoConfig.for_model(shape["model_type"], **entries)
    is_lm = shape["model_type"] == "llama"
    kind = transformers.AutoModelForCausalLM if is_lm else transformers.AutoModelForSequenceClassification
    model = kind.from_config(config).to(getattr(torch, setting.dtype))
    if setting.method == "full":
        if setting.checkpointing:
            enable_checkpointing(model)
    else:
        wrapper, options = (LoraModel, LoraConfig) if setting.method == "lora" else (QLoRAModel, QLoRAConfig)
        model = wrapper(model, options(rank=setting.rank, gradient_checkpointing=setting.checkpointing))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(2, config.vocab_size, (setting.batch, setting.length))
    return model.train(), optimizer, {"input_ids": ids, "labels": ids if is_lm else ids[:, 0] % 2}


def step(model, optimizer, batch) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def steps(name: str, setting: Setting, threads: int):
    """Train, and yield the peak of each step in bytes."""
    torch.set_num_threads(threads)
    tiny = SHAPES[name] | TINY | ({"num_key_value_heads": 2, "head_dim": 16} if "Llama" in name else {})
    for _ in range(2):
        step(*build(tiny, setting))
    before = memory_kb("VmRSS")
    trained = build(SHAPES[name], setting)
    yield {}
    while True:
        Path("/proc/self/clear_refs").write_text("5")
        step(*trained)
        yield {"peak": 1024 * (memory_kb("VmHWM") - before)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep-malloc", action="store_true", help="measure with glibc as it is")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if platform.system() != "Linux":
        parser.error("expected Linux, whose /proc tells the peak of a step")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.keep_malloc:
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_ARENA_MAX": "1"}
    rows = []
    for name in options.models:
        for method in options.methods:
            for checkpointing in (False, True):
                setting = Setting(method, *CASES[name], checkpointing, options.dtype)
                contender = Contender(name, 600, steps, name, setting, options.threads)
                for _ in range(2):
                    contender.turn()
                contender.close()
                if contender.failed:
                    print(f"{name}, {method}: {contender.failed}", file=sys.stderr)
                    return 1
                expected, measured = estimate(SHAPES[name], setting).peak, contender.turns[-1]["peak"]
                rows.append(
                    {"model": name, "method": method, "batch": setting.batch, "length": setting.length}
                    | {"checkpointing": checkpointing, "estimate": expected, "measured": measured}
                )
                print(f"{name}, {method}, checkpointing {checkpointing}: {expected / measured - 1:+.1%}", flush=True)
    table = Table(title=f"Peak of a training step in {options.dtype}, MB")
    for column in ("model", "rows x tokens", "trained", "checkpointing", "estimate", "measured", "off by"):
        table.add_column(column)
    for row in rows:
        numbers = [f"{row[key] / 1e6:,.0f}" for key in ("estimate", "measured")]
        size, off = f"{row['batch']} x {row['length']}", f"{row['estimate'] / row['measured'] - 1:+.1%}"
        table.add_row(row["model"], size, row["method"], "yes" if row["checkpointing"] else "no", *numbers, off)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
