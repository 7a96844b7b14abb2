"""The one timer of the benchmarks: contenders take turns, so that a machine's drift falls on all of them alike."""

import itertools
import statistics
import time
from collections.abc import Callable, Container
from dataclasses import dataclass

import torch

#: A call slower than this is timed once: some contenders take half a minute where others take milliseconds.
SLOW_SECONDS = 5.0
#: A call faster than this is made a few times more, uncounted, before each timed one. Otherwise it would pay for the
#: contender before it: waking its threads and taking back its memory was measured to add 0.4 ms to whoever came next.
QUICK_SECONDS = 0.1
#: So long, but once at least: a virtual CPU that has slept is slow for longer than one quick call.
WARM_UP_SECONDS = 0.005


@dataclass
class Sample:
    """Milliseconds of repeated calls."""

    times: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def percentile(self, share: float) -> float:
        """The time that ``share`` (0 to 1) of the calls do not exceed."""
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _cpu_call(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


class _CudaGraph:
    """A call captured once and replayed, timed by events: neither Python nor launches are in the figure.

    Of a :class:`Rotating` call each operand set is captured, and the next one replayed each time.
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
    """Times of each contender, run in turn ``rounds`` times after uncounted calls; an exception where it failed.

    Those named in ``once`` are timed once, as all very slow ones are.
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


class Rotating:
    """One call that runs the next of ``calls`` each time: operands that no cache still holds."""

    def __init__(self, calls: list[Callable[[], object]]):
        self.calls = calls
        self._turn = itertools.cycle(calls)

    def __call__(self) -> object:
        return next(self._turn)()
