"""Answer requests that are for different adapters of one model: together, adapter by adapter, or one at a time."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from text_data import TokenizedRows


class Requests:
    """Texts that are tokenized once, each with the name of the adapter that is to answer it."""

    def __init__(self, tokenizer, texts: Sequence[str], adapters: Sequence[str], max_length: int):
        self.texts, self.adapters = list(texts), list(adapters)
        self._rows = TokenizedRows(tokenizer, [(text, 0) for text in texts], max_length)

    def __len__(self) -> int:
        return len(self.texts)

    def inputs(self, picked: Sequence[int], device: str) -> dict[str, torch.Tensor]:
        """Return the model's inputs for these requests, padded to their longest."""
        return self._rows.batch(picked, device)[0]


@torch.no_grad()
def together(model, requests: Requests, count: int, device: str) -> torch.Tensor:
    """Return the logits (float32, count x labels) of the first requests: one batch, each row with its adapter."""
    names = requests.adapters[:count]
    return model(**requests.inputs(range(count), device), adapter_names=names).logits.float().cpu()


@torch.no_grad()
def by_adapter(model, requests: Requests, count: int, device: str) -> torch.Tensor:
    """Return the same with one batch for each adapter, which is switched to first."""
    logits = None
    for name in dict.fromkeys(requests.adapters[:count]):
        picked = [i for i in range(count) if requests.adapters[i] == name]
        model.set_adapter(name)
        found = model(**requests.inputs(picked, device)).logits.float().cpu()
        logits = found.new_empty(count, found.shape[1]) if logits is None else logits
        logits[picked] = found
    return logits


@torch.no_grad()
def one_at_a_time(model, requests: Requests, count: int, device: str) -> torch.Tensor:
    """Return the same with one call for each request, which switches to its adapter first."""
    found = []
    for i in range(count):
        model.set_adapter(requests.adapters[i])
        found.append(model(**requests.inputs([i], device)).logits.float().cpu())
    return torch.cat(found)


WAYS: dict[str, Callable] = {"together": together, "by_adapter": by_adapter, "one_at_a_time": one_at_a_time}


def milliseconds(model, requests: Requests, count: int, device: str, rounds: int, progress) -> dict[str, float]:
    """Return the median time of each way to answer the first `count` requests. The ways take turns, after one warm-up.

    `progress` is called after each round. The logits are copied to the CPU, so the times are those of finished work.
    """
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, way in WAYS.items():
            start = time.perf_counter()
            way(model, requests, count, device)
            if number:
                times[name].append(1000 * (time.perf_counter() - start))
        progress()
    return {name: statistics.median(values) for name, values in times.items()}


def switch_milliseconds(model, names: Sequence[str], rounds: int) -> float:
    """Return the median time of one `set_adapter`."""
    times = []
    for number in range(rounds * len(names)):
        start = time.perf_counter()
        model.set_adapter(names[number % len(names)])
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)
