"""A tiny language model with an adapter that learned something: what the tests of merging into 4 bits run on."""

import copy
import functools

import torch
from conftest_calibrate import model_of

from lowbit_lora import QLoRAConfig, QLoRAModel


def text(seed: int, rows: int = 8, length: int = 24) -> torch.Tensor:
    """Rows of token ids [rows, length] of which each has three possible successors."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 50, (rows, 1), generator=generator)]
    for _ in range(length - 1):
        ids.append((ids[-1] * 7 + 3 * torch.randint(0, 3, (rows, 1), generator=generator)) % 47 + 3)
    return torch.cat(ids, 1)


def fit(model: QLoRAModel, steps: int, lr: float) -> None:
    """AdamW on text."""
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=lr)
    model.train()
    for number in range(steps):
        ids = text(1000 + number)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@functools.cache
def _trained():
    model = QLoRAModel(model_of("Llama", initializer_range=0.2), QLoRAConfig(rank=4))
    fit(model, 30, 2e-3)
    return model


def trained() -> QLoRAModel:
    """A random model in NF4 whose adapter has begun to learn the text: a small change of each weight."""
    return copy.deepcopy(_trained())


def batches(count: int = 8, first: int = 0) -> list[dict]:
    """Batches of text."""
    return [{"input_ids": text(first + number)} for number in range(count)]


def held_out(count: int = 4) -> list[dict]:
    """Others."""
    return batches(count, first=500)
