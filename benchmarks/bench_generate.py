"""Tokens per second of greedy decoding, one sequence: lowbit, bitsandbytes, the dense model and llama.cpp.

python benchmarks/bench_generate.py --model 1.1b --json generate.json
python benchmarks/bench_generate.py --model FOLDER --gguf FILE  # the same weights in both

A model by name has the shape of a Llama and random weights; FOLDER holds one that transformers loads. Every linear
layer but the head is quantized, to NF4 with double-quantized scales. bitsandbytes decodes in eval mode, in which it
repacks its weights where the CPU has AVX512-BF16. llama.cpp runs the file that --gguf names, whatever its format is.

Each contender has a process of its own, and they take turns. "bound" is the speed at which all of a contender's weights
could be read from memory, at the bandwidth measured before.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

from llama_shapes import LLAMAS
from turns import Contender, take_turns

LOWBIT, INT8, BITSANDBYTES, DENSE, LLAMA_CPP = "lowbit", "lowbit int8", "bitsandbytes eval", "dense", "llama.cpp"
PROMPT = 16  # tokens


def load(name: str, dtype):
    """The dense model, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if name not in LLAMAS:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**LLAMAS[name], tie_word_embeddings=name == "135m"), dtype=dtype
    ).eval()


def quantized(contender: str, model, dtype) -> None:
    """Quantize the linear layers but the head in place."""
    import torch

    if contender == DENSE:
        return
    if contender in (LOWBIT, INT8):
        import lowbit

        lowbit.quantize_(model, skip=["lm_head"])
        for layer in model.modules() if contender == INT8 else ():
            if isinstance(layer, torch.nn.Linear) and isinstance(layer.weight, lowbit.QuantizedTensor):
                layer.forward = functools.partial(lowbit.linear, q=layer.weight, bias=layer.bias, precision="int8")
        return
    import bitsandbytes as bnb

    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            layer.bias = linear.bias
            model.set_submodule(name, layer.to("cpu").eval())


def weight_bytes(model) -> int:
    """What one token reads: every parameter but an embedding that is no head."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    total = 0
    for parameter in model.parameters():
        if parameter is embedding and embedding is not head:
            continue
        state = getattr(parameter, "quant_state", None)
        total += parameter.nbytes if state is None else parameter.nbytes + state.absmax.nbytes
    return total


def decode(contender: str, options: argparse.Namespace):
    """Load the model, then yield tokens per second of one run of decoding after the other."""
    import torch
    from transformers import StaticCache

    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    model = load(options.model, dtype)
    quantized(contender, model, dtype)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT), generator=generator)
    yield {"bytes": weight_bytes(model), "isa": torch.backends.cpu.get_cpu_capability()}
    while True:
        with torch.inference_mode():
            cache = StaticCache(config=model.config, max_cache_len=PROMPT + options.tokens)
            token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            for at in range(options.tokens):
                positions = torch.tensor([[PROMPT + at]])
                logits = model(token, past_key_values=cache, position_ids=positions).logits
                token = logits[:, -1:].argmax(-1)
            seconds = time.perf_counter() - start
        yield {"tokens_per_s": options.tokens / seconds, "finite": bool(logits.isfinite().all())}


def decode_llama_cpp(options: argparse.Namespace):
    """As :func:`decode`, of the file that --gguf names."""
    import torch
    from llama_cpp import Llama

    threads = options.threads or torch.get_num_threads()
    model = Llama(options.gguf, n_ctx=PROMPT + options.tokens + 8, n_threads=threads, verbose=False)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(model.n_vocab(), (PROMPT,), generator=generator).tolist()
    yield {"bytes": Path(options.gguf).stat().st_size, "isa": "its own"}
    while True:
        model.reset()
        model.eval(prompt)
        start = time.perf_counter()
        for _ in range(options.tokens):
            model.eval([model.sample(temp=0.0)])
        yield {"tokens_per_s": options.tokens / (time.perf_counter() - start), "finite": True}


def run(options: argparse.Namespace, bandwidth: float) -> list[dict]:
    """The rows of the table; ``bandwidth`` in GB/s."""
    from timing import Sample

    contenders = []
    for name in options.contenders:
        if name != LLAMA_CPP:
            contenders.append(Contender(name, options.timeout, decode, name, options))
        elif options.gguf:
            contenders.append(Contender(name, options.timeout, decode_llama_cpp, options))
    take_turns(contenders, options.rounds, options.model)
    rows = []
    for contender in contenders:
        row = {"model": options.model, "dtype": options.dtype, "name": contender.name}
        rows.append(row)
        if not contender.failed and not all(turn["finite"] for turn in contender.turns):
            contender.failed = "its logits are not finite"
        if contender.failed:
            row["failed"] = contender.failed.splitlines()[0]
            continue
        speed = Sample([turn["tokens_per_s"] for turn in contender.timed])
        row |= {"tokens_per_s": speed.median, "p20": speed.percentile(0.2), "p80": speed.percentile(0.8)}
        row |= {"mb": contender.about["bytes"] / 1e6, "bound": bandwidth * 1e9 / contender.about["bytes"]}
        row["bound_share"] = row["tokens_per_s"] / row["bound"]
    theirs = next((row["tokens_per_s"] for row in rows if row["name"] == BITSANDBYTES and "tokens_per_s" in row), None)
    for row in rows:
        if theirs and "tokens_per_s" in row:
            row["vs_bitsandbytes"] = row["tokens_per_s"] / theirs
    return rows


def print_table(console, rows: list[dict]) -> None:
    from rich.table import Table

    columns = (
        ("tokens/s", "tokens_per_s", "{:.1f}"), ("p20", "p20", "{:.1f}"), ("p80", "p80", "{:.1f}"),
        ("x bnb", "vs_bitsandbytes", "{:.2f}"), ("MB a token", "mb", "{:.0f}"), ("bound", "bound", "{:.1f}"),
        ("of bound", "bound_share", "{:.0%}"),
    )  # fmt: skip
    table = Table("model", "dtype", "contender", *(title for title, _, _ in columns))
    for row in rows:
        if "failed" not in row:
            cells = [form.format(row[key]) if key in row else "" for _, key, form in columns]
            table.add_row(row["model"], row["dtype"], row["name"], *cells)
    console.print(table)
    for row in rows:
        if "failed" in row:
            console.print(f"not timed: {row['name']}: {row['failed']}")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.1b", help=f"{', '.join(LLAMAS)}, or a folder; default: 1.1b")
    parser.add_argument("--gguf", metavar="FILE", help="a model for llama.cpp")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    every = (LOWBIT, INT8, BITSANDBYTES, DENSE, LLAMA_CPP)
    parser.add_argument("--contenders", nargs="+", default=[*every], choices=every)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender, after one that warms up")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a contender may take for one turn")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="a smoke test: the tiny model, two turns")
    options = parser.parse_args(argv)
    for name in ("tokens", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.quick:
        options.model, options.tokens, options.rounds = "tiny", 4, 2
    if options.model not in LLAMAS and not Path(options.model, "config.json").exists():
        parser.error(f"--model: expected {', '.join(LLAMAS)} or a folder with a config.json, got {options.model}")
    if options.gguf and not Path(options.gguf).exists():
        parser.error(f"--gguf: there is no file {options.gguf}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    from machine import cpu_name, read_bandwidth
    from report import write_json
    from rich.console import Console

    console = Console(width=150)
    bandwidth = read_bandwidth("cpu", 2**22 if options.quick else 2**28)
    console.print(f"{cpu_name()}; measured: read {bandwidth:.1f} GB/s")
    rows = run(options, bandwidth)
    print_table(console, rows)
    if options.json:
        write_json(options.json, {"machine": cpu_name(), "read_bandwidth": bandwidth, "rows": rows})
    ours = [row for row in rows if row["name"] == LOWBIT]
    return 1 if any("failed" in row for row in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
