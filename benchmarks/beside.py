"""Times beside other work: with all cores free, and while a process keeps one of them busy (bench_matmul.py --beside).

A slice of the scheduler is some milliseconds, so a library that waits for a thread without a core is a hundred times
slower for small products. Medians hide how often that happens; the means are shown too.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import bench_train
import contenders
import report
from rich.console import Console
from rich.table import Table
from timing import Sample, repeated
from turns import Contender

#: The program of the busy process. It ends when its parent has, however that ended.
BUSY = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(sys.argv[1])})
while os.getppid() == int(sys.argv[2]):
    for _ in range(100_000):
        pass
"""
#: Operands this large stay in the caches: the times are those of a model that is used again and again.
CACHE_BYTES, MEMORY_BYTES = 2**16, 2**30
STEPS = 3


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """While this lasts, another process computes on the last of this process's cores."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    busy = subprocess.Popen([sys.executable, "-c", BUSY, str(max(cores)), str(os.getpid())])
    try:
        time.sleep(0.5)  # until it has started
        yield
    finally:
        busy.kill()
        busy.wait()


def products(options: argparse.Namespace) -> dict[tuple[str, str, str], object]:
    """The calls to time by shape and rows, dtype and contender."""
    calls = {}
    for dtype in options.dtype:
        for shape in dict.fromkeys(sum(options.shapes, [])):
            n, k = (int(size) for size in shape.split("x"))
            o = contenders.Operands(n, k, dtype, "cpu", options.format, options.block_size, CACHE_BYTES, MEMORY_BYTES)
            for m in options.m:
                case = contenders.linear_case(o, m, with_reference=False)
                shown = ("lowbit", report.DENSE[dtype], "bitsandbytes")
                calls |= {(f"{shape}, m={m}", dtype, name): case.calls[name] for name in shown if name in case.calls}
    return calls


class Training:
    """A training step of each contender of bench_train, in a process of its own."""

    def __init__(self, options: argparse.Namespace):
        settings = argparse.Namespace(
            device="cpu",
            model="tiny" if options.quick else "135m",
            rank=16,
            batch=1,
            length=64,
            timeout=300,
            isa=options.isa,
            threads=options.threads,
        )
        self.dtype = options.dtype[0]
        self.contenders = [
            Contender(name, settings.timeout, bench_train.steps, name, settings, self.dtype)
            for name in bench_train.CONTENDERS
        ]

    def times(self) -> dict[tuple[str, str, str], Sample]:
        """Milliseconds of steps after one that is not counted; without contenders that failed."""
        samples = {}
        for contender in self.contenders:
            contender.turns.clear()
            for _ in range(STEPS + 1):
                contender.turn()
            if not contender.failed:
                times = [step["forward"] + step["backward"] + step["optimizer"] for step in contender.timed]
                samples["training step, 1 x 64 tokens", self.dtype, contender.name] = Sample(times)
        return samples

    def close(self) -> None:
        for contender in self.contenders:
            contender.close()


def main(options: argparse.Namespace) -> int:
    """Prints the table, and writes it to ``options.json``; returns the exit status."""
    calls = products(options)
    training = Training(options) if options.train else None

    def times() -> dict[tuple[str, str, str], Sample]:
        samples = {key: repeated(call, 0.02 if options.quick else 0.4) for key, call in calls.items()}
        return samples | (training.times() if training else {})

    try:
        idle = times()
        with busy_core():
            beside = times()
    finally:
        if training:
            training.close()
    rows = []
    for key in idle:
        if key not in beside:
            continue
        row = dict(zip(("work", "dtype", "name"), key, strict=True))
        row |= {"idle_ms": idle[key].median, "beside_ms": beside[key].median}
        row |= {
            "idle_mean_ms": statistics.fmean(idle[key].times),
            "beside_mean_ms": statistics.fmean(beside[key].times),
        }
        rows.append(row | {"ratio": row["beside_ms"] / row["idle_ms"]})
    columns = ("work", "dtype", "contender", "idle ms", "beside ms", "ratio", "idle mean", "beside mean")
    table = Table(*columns, title="Median and mean times, alone and beside a process that keeps one core busy")
    for row in rows:
        times_shown = (row["idle_ms"], row["beside_ms"], row["ratio"], row["idle_mean_ms"], row["beside_mean_ms"])
        table.add_row(row["work"], row["dtype"], row["name"], *(f"{time:.3f}" for time in times_shown))
    Console(width=140).print(table)
    if options.json:
        report.write_json(options.json, {"rows": rows})
    return 0
