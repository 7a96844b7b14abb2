"""A step of an optimizer: lowbit's beside torch's, bitsandbytes' and torchao's, all in one run.

python benchmarks/bench_optim.py --sets bert llama-135m llama-8b-attention full --dtype float32 bfloat16
python benchmarks/bench_optim.py --device cuda --json optim.json

Each contender steps parameters and gradients of its own; it has made steps before, so that its states are there. GB/s
count what a step has to move once: parameter and gradient in their dtype, states as they are stored, read and written
(the gradient only read). Copy is torch's copy_ of large tensors, read and written. Bytes of state are those of all
tensors that the optimizer holds. --paged-to also times states in a mapped file.
"""

import argparse
import sys

RANK = 8
#: For each set its shapes: LoRA's factors of every linear layer of a model, and whole weights.
LAYERS = {
    "bert": [(768, 768)] * 48 + [(768, 3072)] * 12 + [(3072, 768)] * 12,
    "llama-135m": ([(576, 576)] * 2 + [(576, 192)] * 2 + [(576, 1536)] * 2 + [(1536, 576)]) * 30,
    "llama-8b-attention": ([(4096, 4096)] * 2 + [(4096, 1024)] * 2) * 32,
}
FULL = [(4096, 4096)] * 4
QUICK = [(128, 128)] * 3
DTYPES = ("float32", "bfloat16")


def shapes(name: str, quick: bool) -> list[tuple[int, int]]:
    """Return the shapes of a set's parameters."""
    if quick:
        return QUICK
    if name == "full":
        return FULL
    return [shape for k, n in LAYERS[name] for shape in ((RANK, k), (n, RANK))]


def contenders(options: argparse.Namespace, dtype: str) -> dict:
    """Return for each contender what makes its optimizer of parameters; for one that is not installed, why not."""
    import torch

    from lowbit_lora.optim import AdamW, AdamW8bit, Lion, Lion8bit, PagedAdamW, PagedAdamW8bit

    found = {
        "lowbit AdamW": AdamW,
        "lowbit AdamW8bit": AdamW8bit,
        "lowbit Lion": Lion,
        "lowbit Lion8bit": Lion8bit,
        "torch AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
        "torch AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    }
    if options.paged_to or options.device != "cpu":
        where = {"paged_to": options.paged_to} if options.device == "cpu" else {}
        found["lowbit PagedAdamW"] = lambda p: PagedAdamW(p, **where)
        found["lowbit PagedAdamW8bit"] = lambda p: PagedAdamW8bit(p, **where)
    if dtype == "bfloat16":
        found["lowbit AdamW, stochastic"] = lambda p: AdamW(p, stochastic_rounding=True)
    try:
        import bitsandbytes

        found["bitsandbytes AdamW"] = bitsandbytes.optim.AdamW
        found["bitsandbytes AdamW8bit"] = bitsandbytes.optim.AdamW8bit
    except ImportError as error:
        found["bitsandbytes"] = error
    try:
        from torchao.optim import AdamW8bit as TorchaoAdamW8bit

        found["torchao AdamW8bit"] = TorchaoAdamW8bit
    except ImportError as error:
        found["torchao"] = error
    return found


def parameters(options: argparse.Namespace, of: list[tuple[int, int]], dtype: str) -> list:
    """Return parameters with gradients."""
    import torch

    generator = torch.Generator(options.device).manual_seed(0)
    how = {"generator": generator, "device": options.device}
    params = [torch.nn.Parameter(torch.randn(shape, **how).to(getattr(torch, dtype))) for shape in of]
    for p in params:
        p.grad = torch.randn(p.shape, **how).to(p.dtype) * 1e-2
    return params


def state_bytes(optimizer) -> int:
    """Return the bytes of all tensors that an optimizer holds for its parameters, without its counts of steps."""
    import torch

    if hasattr(optimizer, "state_bytes"):
        return optimizer.state_bytes
    total = 0
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and not name.startswith(("step", "qmap")):
                parts = [value]
                if hasattr(value, "__tensor_flatten__"):
                    parts = [getattr(value, part) for part in value.__tensor_flatten__()[0] if part != "qmap"]
                total += sum(part.nbytes for part in parts)
    return total


def times(options: argparse.Namespace) -> list[dict]:
    """Time every set and dtype; return the rows of the table."""
    from timing import Sample, interleaved
    from tqdm import tqdm

    rows = []
    for name, dtype in tqdm([(s, d) for s in options.sets for d in options.dtype], unit="set", disable=None):
        of = shapes(name, options.quick)
        numel = sum(a * b for a, b in of)
        optimizers, calls = {}, {}
        for who, make in contenders(options, dtype).items():
            row = {"set": name, "tensors": len(of), "elements": numel, "dtype": dtype, "name": who}
            rows.append(row)
            if isinstance(make, Exception):
                row["failed"] = f"{type(make).__name__}: {make}"
                continue
            optimizers[who] = make(parameters(options, of, dtype))
            calls[who] = optimizers[who].step if options.device == "cpu" else synchronized(optimizers[who].step)
            try:
                calls[who]()  # makes the states; torchao's compiles for half a minute
            except Exception as error:
                del calls[who]
                row["failed"] = f"{type(error).__name__}: {error}"
        results = interleaved(calls, options.rounds)
        of_case = {row["name"]: row for row in rows[-len(contenders(options, dtype)) :]}
        for who, sample in results.items():
            row = of_case[who]
            if not isinstance(sample, Sample):
                row["failed"] = f"{type(sample).__name__}: {sample}"
                continue
            held = state_bytes(optimizers[who])
            size = {"float32": 4, "bfloat16": 2}[dtype]
            row |= {"median_ms": sample.median, "p20_ms": sample.percentile(0.2), "p80_ms": sample.percentile(0.8)}
            row |= {"state_bytes": held / numel, "gb_per_s": (3 * size * numel + 2 * held) / sample.median / 1e6}
            row["vs_fused"] = results["torch AdamW, fused"].median / sample.median
            theirs = results.get("bitsandbytes AdamW8bit" if "8bit" in who else "bitsandbytes AdamW")
            if isinstance(theirs, Sample):
                row["vs_bitsandbytes"] = theirs.median / sample.median
        del optimizers, calls, results
    return rows


def synchronized(step):
    """Return a call that ends when the GPU has made the step."""
    import torch

    def call():
        step()
        torch.cuda.synchronize()

    return call


def print_table(console, rows: list[dict], bandwidth: float) -> None:
    """Print one table for each set and dtype."""
    from rich.table import Table

    for name, dtype in dict.fromkeys((row["set"], row["dtype"]) for row in rows):
        of = [row for row in rows if (row["set"], row["dtype"]) == (name, dtype)]
        titles = ("contender", "median ms", "p20", "p80", "GB/s", "of copy", "state bytes", "x torch fused", "x bnb")
        table = Table(*titles, title=f"{name}: {of[0]['tensors']} tensors, {of[0]['elements']:,} elements, {dtype}")
        for row in of:
            if "failed" in row:
                table.add_row(row["name"], row["failed"][:40])
                continue
            values = [f"{row[key]:.3f}" for key in ("median_ms", "p20_ms", "p80_ms")]
            values += [f"{row['gb_per_s']:.1f}", f"{row['gb_per_s'] / bandwidth:.0%}", f"{row['state_bytes']:.2f}"]
            values += [f"{row['vs_fused']:.2f}", f"{row['vs_bitsandbytes']:.1f}" if "vs_bitsandbytes" in row else ""]
            table.add_row(row["name"], *values)
        console.print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=[*LAYERS, "full"], choices=[*LAYERS, "full"])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--paged-to", metavar="FOLDER", help="also time states in a file there")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="a smoke test: three small tensors, few rounds")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.quick:
        options.sets, options.rounds = options.sets[:1], 2
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    import torch
    from machine import copy_bandwidth, cpu_name
    from report import write_json
    from rich.console import Console

    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=130)
    name = cpu_name() if options.device == "cpu" else torch.cuda.get_device_name()
    bandwidth = copy_bandwidth(options.device, 2**20 if options.quick else 2**26)
    threads, version = torch.get_num_threads(), torch.__version__
    console.print(f"{name}, {threads} threads, torch {version}, copy {bandwidth:.1f} GB/s")
    rows = times(options)
    print_table(console, rows, bandwidth)
    if options.json:
        write_json(options.json, {"options": vars(options), "copy_gb_per_s": bandwidth, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
