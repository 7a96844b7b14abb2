"""lowbit against dense torch, and against bitsandbytes where it is installed: quantize, dequantize and products.

python benchmarks/bench_matmul.py [--size 4096] [--dtype float32 bfloat16] [--rows 1 16 128 512] [--threads N]
"""

import argparse
import importlib.util
import platform

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timing import interleaved_medians

import lowbit


def contenders(weight: torch.Tensor, rows: list[int]) -> dict[str, dict]:
    """Per operation the calls to time, by library."""
    dtype, (n, k) = weight.dtype, weight.shape
    q = lowbit.quantize(weight)
    backward = torch.ops.lowbit.linear_grad_input.default
    cases = {
        "quantize": {"lowbit": lambda: lowbit.quantize(weight)},
        "dequantize": {"lowbit": lambda: lowbit.dequantize(q)},
    }
    for m in rows:
        x, grad = torch.randn(m, k, dtype=dtype), torch.randn(m, n, dtype=dtype)
        cases[f"linear, {m} rows"] = {
            "lowbit": lambda x=x: lowbit.linear(x, q),
            "dense": lambda x=x: F.linear(x, weight),
        }
        cases[f"backward, {m} rows"] = {
            "lowbit": lambda grad=grad: backward(grad, *q.parts(), q.format, q.block_size, k),
            "dense": lambda grad=grad: grad @ weight,
        }
        if importlib.util.find_spec("bitsandbytes"):
            import bitsandbytes as bnb

            packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            cases[f"linear, {m} rows"]["bitsandbytes"] = lambda x=x, p=packed, s=state: bnb.matmul_4bit(x, p.t(), s)
            cases["quantize"]["bitsandbytes"] = lambda: bnb.functional.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=True
            )
            cases["dequantize"]["bitsandbytes"] = lambda p=packed, s=state: bnb.functional.dequantize_4bit(p, s)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="the weight is SIZE x SIZE")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "float16", "bfloat16"]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    title = (
        f"median ms, {options.size} x {options.size} NF4 double-quantized, {options.threads} threads, "
        f"{platform.machine()}, lowbit {torch.ops.lowbit.cpu_isa()}, torch {torch.__version__} "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    table = Table("dtype", "operation", "lowbit", "dense torch", "bitsandbytes", "bitsandbytes / lowbit", title=title)
    for name in options.dtype:
        torch.manual_seed(0)
        weight = (torch.randn(options.size, options.size) * 0.02).to(getattr(torch, name))
        with torch.no_grad():
            for operation, calls in contenders(weight, options.rows).items():
                medians = interleaved_medians(calls, options.rounds)
                theirs = medians.get("bitsandbytes")
                cells = [f"{medians[c]:.2f}" if c in medians else "" for c in ("lowbit", "dense", "bitsandbytes")]
                table.add_row(name, operation, *cells, f"{theirs / medians['lowbit']:.1f}x" if theirs else "")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
