"""The only timer of the benchmarks. Contenders take turns, so that a machine's drift falls on all of them alike."""

import itertools
import statistics
import time
from collections.abc import Callable, Container
from dataclasses import dataclass

import stub_cuda
import torch

#: Calls of a contender in one CUDA graph, at least.
GRAPH_CALLS = 32
#: A call slower than this is timed once: some contenders take half a minute, others take milliseconds.
SLOW_SECONDS = 5.0
#: A call faster than this runs a few times uncounted before each timed call. Otherwise it would pay for the contender
#: before it: waking threads and taking back memory adds 0.4 ms to the next call.
QUICK_SECONDS = 0.1
#: How long those calls run, once at least: a virtual CPU that has slept is slow for longer than one quick call.
WARM_UP_SECONDS = 0.005


@dataclass
class Sample:
    """Milliseconds of repeated calls."""

    times: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def percentile(self, share: float) -> float:
        """The time that a ``share`` (0 to 1) of the calls does not exceed."""
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _cpu_call(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def cuda_of(device: str):
    """torch.cuda; for the device "stub", which is the CPU, a double of it."""
    return stub_cuda if device == "stub" else torch.cuda


class _CudaGraph:
    """A call captured :data:`GRAPH_CALLS` times in one graph, which events time. The time of one call, without Python
    and launches by the host.

    The calls of a :class:`Rotating` follow each other in the graph, each as often as the others.
    """

    def __init__(self, call: Callable[[], object], cuda):
        calls = getattr(call, "calls", [call])
        self.count = -(-GRAPH_CALLS // len(calls)) * len(calls)
        for one in calls:  # allocations, autotuning and lazy loading are no part of a graph
            one()
        cuda.synchronize()
        self.cuda, self.graph = cuda, cuda.CUDAGraph()
        with cuda.graph(self.graph):
            for one in itertools.islice(itertools.cycle(calls), self.count):
                one()

    def __call__(self) -> float:
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self.count


class Laps:
    """Times from one :meth:`mark` to the next, in milliseconds; on a GPU by events."""

    def __init__(self, device: str):
        self.cuda = None if device == "cpu" else cuda_of(device)
        self.marks = []

    def mark(self) -> None:
        """End a lap and begin the next."""
        if self.cuda is None:
            self.marks.append(time.perf_counter())
        else:
            self.marks.append(self.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def times(self) -> list[float]:
        """The laps, after the GPU has finished them."""
        if self.cuda is None:
            return [(b - a) * 1e3 for a, b in itertools.pairwise(self.marks)]
        self.marks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(self.marks)]


def _warm_up(timer: Callable[[], float]) -> None:
    spent = 0.0
    while spent < WARM_UP_SECONDS * 1e3:
        spent += timer()


def interleaved(
    contenders: dict[str, Callable[[], object]], rounds: int = 15, device: str = "cpu", once: Container[str] = ()
) -> dict[str, Sample | Exception]:
    """Run the contenders in turn ``rounds`` times after uncounted calls.

    Returns each contender's times, or the exception by which it failed. Contenders named in ``once`` are timed once, as
    all very slow ones are.
    """
    timers: dict[str, Callable[[], float]] = {}
    results: dict[str, Sample | Exception] = {}
    slow, quick = set(), set()
    for name, call in contenders.items():
        try:
            timer = (lambda call=call: _cpu_call(call)) if device == "cpu" else _CudaGraph(call, cuda_of(device))
            first = timer()
        except Exception as error:  # a contender that cannot run is a row of the table, not the end of the benchmark
            results[name] = error
            continue
        timers[name] = timer
        results[name] = Sample([])
        if first < QUICK_SECONDS * 1e3:
            quick.add(name)
        if name in once or first > SLOW_SECONDS * 1e3:
            slow.add(name)
            results[name].times.append(first)
    for _ in range(rounds):
        for name, timer in timers.items():
            if name in quick:
                _warm_up(timer)
            if name not in slow:
                results[name].times.append(timer())
    return results


def repeated(call: Callable[[], object], seconds: float) -> Sample:
    """The times of calls one after the other for ``seconds``, and of ten at least, after uncounted ones."""
    until, sample = time.perf_counter() + seconds / 4, Sample([])
    call()
    while time.perf_counter() < until:
        call()
    until = time.perf_counter() + seconds
    while len(sample.times) < 10 or time.perf_counter() < until:
        sample.times.append(_cpu_call(call))
    return sample


class Rotating:
    """A call that runs the next of ``calls`` each time, so that no cache still holds its operands."""

    def __init__(self, calls: list[Callable[[], object]]):
        self.calls = calls
        self._turn = itertools.cycle(calls)

    def __call__(self) -> object:
        return next(self._turn)()
