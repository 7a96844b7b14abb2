"""Train a classifier and measure it: the loop, the schedule, the evaluation.

It works on anything that maps a batch of its rows to an output with `.logits`: a plain Hugging Face model, a
LoRA model or a QLoRA model. Parameters with `requires_grad` train.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from tqdm import tqdm

from lowbit_lora import get_paged_optimizer

WARMUP_SHARE = 0.06


class Rows(Protocol):
    """Labelled inputs of a model: texts or images."""

    labels: torch.Tensor

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, generator: random.Random | None = None) -> Iterator[list[int]]:
        """Return all row numbers in batches, in random order if there is a generator."""

    def batch(self, rows: Sequence[int], device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the model's inputs and the labels (int64, rows) for these row numbers."""


@dataclass
class History:
    """What happened in training: one loss per step, and held-out accuracy as (step, accuracy) pairs.

    `logits` are those of the test rows after the last epoch.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    train_seconds: float = 0.0
    logits: torch.Tensor | None = None

    @property
    def median_step_seconds(self) -> float:
        return statistics.median(self.step_seconds)


def learning_rate_factor(step: int, total: int) -> float:
    """Return the factor of a step (from 0): linear warm-up over the first 6%, then linear decay to zero."""
    warmup = max(1, math.ceil(WARMUP_SHARE * total))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


@torch.no_grad()
def predict(model, rows: Rows, batch_size: int, device: str, labels: int | None = None) -> torch.Tensor:
    """Return logits (float32, rows x labels) in the order of `rows`, with dropout off.

    `labels`: how many of the head's outputs are labels of these rows, from the first on; None: all.
    """
    was_training = model.training
    model.eval()
    logits = None
    for picked in rows.batches(batch_size):
        inputs, _ = rows.batch(picked, device)
        found = model(**inputs).logits[:, :labels].float().cpu()
        if logits is None:
            logits = torch.empty(len(rows), found.shape[1])
        logits[picked] = found
    model.train(was_training)
    return logits


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of rows whose largest logit is the label's."""
    return (logits.argmax(1) == labels).float().mean().item()


def compare(trained: torch.Tensor, other: torch.Tensor) -> dict:
    """Return how far two sets of logits are apart, and on how many rows they choose different labels."""
    return {
        "max_logit_difference": (trained - other).abs().max().item(),
        "different_predictions": int((trained.argmax(1) != other.argmax(1)).sum()),
    }


def train(
    model,
    train_rows: Rows,
    test_rows: Rows,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
    device: str,
    progress: bool = True,
    description: str = "training",
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.nn.functional.cross_entropy,
    score: Callable[[torch.Tensor, torch.Tensor], float] = accuracy,
    each_epoch: bool = True,
    labels: int | None = None,
    make_optimizer: Callable[..., torch.optim.Optimizer] = get_paged_optimizer,
) -> History:
    """Train in place with AdamW; return what happened. The test rows are measured after each epoch, or the last.

    They choose nothing. `loss_of` and `score` take logits (float32, rows x labels) and labels. `labels` is as in
    `predict`: other outputs of the head have no loss, since pushing them down would, in the first steps, move all
    features in one direction, which can end the training before it begins.
    """
    history = History()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, lr=lr, weight_decay=weight_decay)
    steps_per_epoch = math.ceil(len(train_rows) / batch_size)
    total = epochs * steps_per_epoch
    shuffler = random.Random(seed)
    with tqdm(total=total, desc=description, unit="step", disable=not progress) as bar:
        for epoch in range(epochs):
            model.train()
            for picked in train_rows.batches(batch_size, shuffler):
                start = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = lr * learning_rate_factor(len(history.losses), total)
                inputs, expected = train_rows.batch(picked, device)
                loss = loss_of(model(**inputs).logits[:, :labels].float(), expected)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                history.losses.append(loss.item())  # .item() waits for the device: the time is the step's
                history.step_seconds.append(time.perf_counter() - start)
                bar.update()
                recent = history.losses[-20:]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
            if not each_epoch and epoch < epochs - 1:
                continue
            history.logits = predict(model, test_rows, 2 * batch_size, device, labels)
            held_out = score(history.logits, test_rows.labels)
            history.accuracy.append((len(history.losses), held_out))
            bar.set_postfix(loss=f"{history.losses[-1]:.3f}", test_accuracy=f"{held_out:.3f}")
    history.train_seconds = sum(history.step_seconds)
    return history
