"""What the host does for a call on a GPU: Python, torch's dispatcher and the bindings, without a GPU.

    python benchmarks/bench_host.py

The CUDA bindings run on CPU tensors, over a stub of the CUDA runtime whose launches do nothing (``tests/cuda/``). So
torch's allocator is the CPU's, which takes about as long as its caching one. One row of x: eager decode waits for the
host.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import cuda_bindings  # noqa: E402  (of the tests)
from conftest_cuda import launchers  # noqa: E402

import lowbit  # noqa: E402
from lowbit import backends  # noqa: E402
from lowbit.ops import linear  # noqa: E402

CALLS, ROUNDS = 2000, 15


def microseconds(call: Callable[[], object]) -> float:
    """The median over rounds of a call's mean time."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


def main() -> None:
    """Print a table."""
    n, k, rank = 4096, 4096, 16
    q = lowbit.quantize(torch.randn(n, k))
    ops = cuda_bindings.stub()
    cuda_bindings.stub_library().stub_set_callback_of_bindings(None)
    launchers().set_idle(True)
    backends.NAMESPACES["native"] = "lowbit_stub"
    linear.HAVE_LORA_KERNELS = {("lowbit_stub", "cpu")}
    x, dense = torch.randn(1, k).bfloat16(), torch.randn(8, 8).bfloat16()
    lora_a, lora_b = torch.randn(rank, k), torch.randn(n, rank)
    parts = q.operands()
    calls = {
        "torch's F.linear, 1 x 8 x 8": lambda: torch.nn.functional.linear(x[:, :8], dense),
        "the op lowbit::linear": lambda: ops.linear.default(x, *parts, n, None, None, None, 1.0),
        "lowbit.linear": lambda: lowbit.linear(x, q),
        "the op lowbit::lora_linear": lambda: ops.lora_linear.default(x, *parts, n, None, lora_a, lora_b, 1.0),
        "lowbit.lora_linear": lambda: lowbit.lora_linear(x, q, lora_a, lora_b, 1.0),
    }
    print(f"{cpu_name()}, torch {torch.__version__}\n\n| call, one row of x | us |\n|---|---|")
    with torch.no_grad():
        for name, call in calls.items():
            print(f"| {name} | {microseconds(call):.1f} |", flush=True)


if __name__ == "__main__":
    main()
