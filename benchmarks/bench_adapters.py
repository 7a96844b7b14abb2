"""A LoRA adapter of its own for each row of a batch, against one adapter for all rows, and against PEFT.

python benchmarks/bench_adapters.py --bases dense nf4 --dtype float32 bfloat16 --rows 32 --adapters 8 --rank 16

One linear layer in a model. Row i has adapter i modulo the number of adapters: neighbours differ, so all rows have to
be sorted. "forward" records no gradients, as when adapters are served. "forward, backward" computes the gradients of x
and of every adapter, as when they are trained together. --swap times loading a saved adapter into another's place.
"""

import argparse
import sys
import tempfile

DTYPES = ("float32", "bfloat16")
BASES = ("dense", "nf4")
PASSES = ("forward", "forward, backward")
#: The model that --swap loads adapters into; see bench_train.
SWAPPED_MODEL = "135m"


def layer(options: argparse.Namespace, dtype: str):
    """Return a model of one linear layer. Every contender gets the same weights."""
    import torch

    torch.manual_seed(0)
    linear = torch.nn.Linear(options.k, options.n, bias=False, dtype=getattr(torch, dtype))
    return torch.nn.Sequential(linear).requires_grad_(False)


def lowbit_model(options: argparse.Namespace, base: str, dtype: str, names: list[str]):
    """Return the layer with adapters by lowbit, all of which train."""
    import torch

    from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel

    how = {"rank": options.rank, "target_modules": ["0"], "init_lora_weights": "random"}
    torch.manual_seed(1)
    if base == "nf4":
        model = QLoRAModel(layer(options, dtype), QLoRAConfig(**how), names[0])
    else:
        model = LoraModel(layer(options, dtype), LoraConfig(**how), names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**how))
    model.set_adapter(names)
    return model.eval()  # PEFT takes names of adapters only in eval mode


def peft_model(options: argparse.Namespace, base: str, dtype: str, names: list[str]):
    """Return the layer with adapters by PEFT, all of which train; its 4-bit base is bitsandbytes'."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = layer(options, dtype)
    if base == "nf4":
        import bitsandbytes as bnb

        quantized = bnb.nn.Linear4bit(
            options.k, options.n, bias=False, compute_dtype=getattr(torch, dtype), quant_type="nf4"
        )
        quantized.weight = bnb.nn.Params4bit(
            model[0].weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        model[0] = quantized.to("cpu")
    config = LoraConfig(r=options.rank, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(model, config, adapter_name=names[0], autocast_adapter_dtype=True)
    for name in names[1:]:
        model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in key)
    return model.eval()


def call(model, x, names: list[str] | None, backward: bool):
    """Return a function that runs one pass."""
    import torch

    how = {} if names is None else {"adapter_names": names}
    if not backward:

        def forward():
            with torch.no_grad():
                return model(x, **how)

        return forward
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = x.clone().requires_grad_()
    grad = torch.ones(*x.shape[:-1], model(x[:1]).shape[-1], dtype=x.dtype)

    def forward_and_backward():
        torch.autograd.grad(model(x, **how), [x, *parameters], grad)

    return forward_and_backward


def contenders(options: argparse.Namespace, base: str, dtype: str, backward: bool) -> dict:
    """Return the calls to time, by name."""
    import torch

    names = [f"a{number}" for number in range(options.adapters)]
    by_row = [names[row % len(names)] for row in range(options.rows)]
    shape = (options.rows, options.k) if options.tokens == 1 else (options.rows, options.tokens, options.k)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(getattr(torch, dtype))
    several = f"{options.adapters} adapters"
    found = {
        "lowbit, one adapter": call(lowbit_model(options, base, dtype, names[:1]), x, None, backward),
        f"lowbit, {several}": call(lowbit_model(options, base, dtype, names), x, by_row, backward),
    }
    if options.no_peft:
        return found
    return found | {
        "PEFT, one adapter": call(peft_model(options, base, dtype, names[:1]), x, None, backward),
        f"PEFT, {several}": call(peft_model(options, base, dtype, names), x, by_row, backward),
    }


def times(options: argparse.Namespace) -> list[dict]:
    """Time every base, dtype and pass; return the rows of the table."""
    from timing import Sample, interleaved
    from tqdm import tqdm

    rows = []
    cases = [(base, dtype, way) for base in options.bases for dtype in options.dtype for way in PASSES]
    for base, dtype, way in tqdm(cases, unit="case", disable=None):
        results = interleaved(contenders(options, base, dtype, way != "forward"), options.rounds)
        for name, sample in results.items():
            row = {"base": base, "dtype": dtype, "pass": way, "name": name}
            rows.append(row)
            if not isinstance(sample, Sample):
                row["failed"] = f"{type(sample).__name__}: {sample}"
                continue
            row |= {"median_ms": sample.median, "p20_ms": sample.percentile(0.2), "p80_ms": sample.percentile(0.8)}
            one = results[f"{name.split(',')[0]}, one adapter"]
            theirs = results.get(name.replace("lowbit", "PEFT"))
            row["vs_one"] = sample.median / one.median
            if isinstance(theirs, Sample) and theirs is not sample:
                row["faster_than_peft"] = theirs.median / sample.median
    return rows


def swaps(options: argparse.Namespace) -> list[dict]:
    """Time loading a saved adapter, files included, into the place of another; return the rows of the table."""
    import torch
    from llama_shapes import LLAMAS
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter
    from timing import Sample, interleaved
    from transformers import LlamaConfig, LlamaForCausalLM

    from lowbit_lora import LoraConfig, LoraModel

    size = "tiny" if options.quick else SWAPPED_MODEL

    def base():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**LLAMAS[size]))

    def load_again(model, folder):
        model.delete_adapter("other")
        model.load_adapter(folder, "other")

    config = LoraConfig(rank=options.rank, init_lora_weights="random", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        ours = LoraModel(base(), config)
        ours.save_pretrained(folder)
        ours.load_adapter(folder, "other")
        theirs = PeftModel.from_pretrained(base(), folder)
        theirs.load_adapter(folder, "other")
        calls = {
            "lowbit, load_adapter into a name that is there": lambda: ours.load_adapter(folder, "other"),
            "lowbit, delete_adapter and load_adapter": lambda: load_again(ours, folder),
            "PEFT, hotswap_adapter": lambda: hotswap_adapter(theirs, folder, "default"),
            "PEFT, delete_adapter and load_adapter": lambda: load_again(theirs, folder),
        }
        results = interleaved(calls, options.rounds)
    rows = []
    for name, sample in results.items():
        rows.append({"model": size, "pass": "swap", "name": name})
        if isinstance(sample, Sample):
            p20, p80 = sample.percentile(0.2), sample.percentile(0.8)
            rows[-1] |= {"median_ms": sample.median, "p20_ms": p20, "p80_ms": p80}
        else:
            rows[-1]["failed"] = f"{type(sample).__name__}: {sample}"
    return rows


def print_tables(console, rows: list[dict], options: argparse.Namespace) -> None:
    """Print the table of passes, and that of swaps."""
    from rich.table import Table

    columns = {"median ms": "median_ms", "p20": "p20_ms", "p80": "p80_ms"}
    ratios = {"x one adapter": "vs_one", "times faster than PEFT": "faster_than_peft"}
    passes = Table("base", "dtype", "pass", "contender", *columns, *ratios)
    passes.title = f"{options.n} x {options.k}, {options.rows} rows of {options.tokens} token(s), rank {options.rank}"
    swaps = Table("Llama", "contender", *columns)
    swaps.title = f"loading an adapter of rank {options.rank} for every linear layer but the head"
    for row in rows:
        if "failed" in row:
            console.print(f"not timed: {row}")
            continue
        times = [f"{row[key]:.3f}" for key in columns.values()]
        if row["pass"] == "swap":
            swaps.add_row(row["model"], row["name"], *times)
        else:
            shares = [f"{row[key]:.2f}" if key in row else "" for key in ratios.values()]
            passes.add_row(row["base"], row["dtype"], row["pass"], row["name"], *times, *shares)
    for table in (passes, swaps):
        if table.row_count:
            console.print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=[*BASES], choices=BASES)
    parser.add_argument("--dtype", nargs="+", default=[*DTYPES], choices=DTYPES)
    parser.add_argument("--n", type=int, default=4096, help="outputs of the layer")
    parser.add_argument("--k", type=int, default=4096, help="inputs of the layer")
    parser.add_argument("--rows", type=int, default=32, help="rows of the batch")
    parser.add_argument("--tokens", type=int, default=1, help="tokens of each row")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--no-peft", action="store_true", help="leave out PEFT")
    parser.add_argument("--swap", action="store_true", help="also time loading an adapter in the place of another")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a small layer, few rounds")
    options = parser.parse_args(argv)
    for name in ("n", "k", "rows", "tokens", "adapters", "rank", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.quick:
        options.n, options.k, options.rounds = 128, 256, 3
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    import torch
    from machine import cpu_name
    from report import write_json
    from rich.console import Console

    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=130)
    console.print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = times(options)
    if options.swap:
        rows += swaps(options)
    print_tables(console, rows, options)
    if options.json:
        write_json(options.json, {"options": vars(options), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
