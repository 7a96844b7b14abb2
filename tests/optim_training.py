"""Training in a process of its own for tests/test_optim_processes.py: it saves, is killed, or is short of memory."""

import os
import resource
import traceback
from pathlib import Path

import torch
from conftest_models import mlp

from lowbit_lora import QLoRAConfig, QLoRAModel, get_paged_optimizer


def run(pipe, function, *arguments) -> None:
    """What the process does. It sends what the function announces, and at the end its result or its traceback."""
    try:
        pipe.send((function(pipe.send, *arguments), ""))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
        raise


def train(announce, folder: Path, steps: int) -> None:
    """Train to a number of steps, from the newest checkpoint on, each step being announced.

    It saves after each second step; the newest checkpoint is what ``newest`` names. It writes the adapter at the end.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    newest, done = folder / "newest", 0
    if newest.exists():
        made = folder / newest.read_text()
        model = QLoRAModel.from_pretrained(mlp(), made, is_trainable=True, paged_adamw=True)
        done = int(made.name)
    else:
        config = QLoRAConfig(rank=64, target_modules=["first", "second"], paged_adamw=True)
        model = QLoRAModel(mlp(), config)
    optimizer = model.create_optimizer(lr=0.01, bits=8, paged_to=folder, stochastic_rounding=True)
    if done:
        optimizer.load(made / "optimizer.pt")
    for step in range(done, steps):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step % 2:
            made = folder / str(step + 1)
            model.save_pretrained(made)
            optimizer.save(made / "optimizer.pt")
            (folder / "newest.saving").write_text(made.name)
            os.replace(folder / "newest.saving", newest)
        announce(step + 1)
    torch.save(model.adapter_state_dict(), folder / "trained.pt")


def train_capped(announce, megabytes: int, folder: Path | None = None) -> float:
    """Three steps with 64 MB of states, with so much private memory beyond what the process has before."""
    params = torch.nn.ParameterList(torch.ones(1 << 17) for _ in range(64))
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer = get_paged_optimizer(params, lr=0.1, weight_decay=0.0, paged_to=folder)
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    limit = (int(status["VmData"].split()[0]) << 10) + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for _ in range(3):
        optimizer.step()
    return float(torch.stack(list(params)).detach().mean())
