"""The one timer of the benchmarks: contenders take turns, so that a machine's drift falls on all of them alike."""

import statistics
import time
from collections.abc import Callable


def interleaved_medians(contenders: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of each contender, run in turn ``rounds`` times after one uncounted round."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in samples.items()}
