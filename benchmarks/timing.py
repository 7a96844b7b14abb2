"""The only timer of the benchmarks. Contenders take turns, so that a machine's drift falls on all of them alike."""

import itertools
import statistics
import time
from collections.abc import Callable, Container
from dataclasses import dataclass

import torch

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


class _CudaGraph:
    """A call that is captured once, replayed, and timed by events. The time includes neither Python nor launches.

    For a :class:`Rotating` call, each set of operands is captured, and each replay takes the next one.
    """

    def __init__(self, call: Callable[[], object]):
        self.replay = Rotating([self._capture(one) for one in getattr(call, "calls", [call])])

    @staticmethod
    def _capture(call: Callable[[], object]) -> Callable[[], None]:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def __call__(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


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
            timer = _CudaGraph(call) if device == "cuda" else (lambda call=call: _cpu_call(call))
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
