"""Training of its own process for tests/test_optim_processes.py: it saves, is killed, or is short of memory.

python optim_training.py steps FOLDER STEPS      train to a number of steps, from the newest checkpoint on
python optim_training.py capped MEGABYTES [FOLDER]   three steps of 32 MB of parameters, private memory capped
"""

import os
import resource
import sys
from pathlib import Path

import torch
from conftest_models import mlp

from lowbit_lora import QLoRAConfig, QLoRAModel, get_paged_optimizer


def train(folder: Path, steps: int) -> None:
    """Save after each second step; the newest checkpoint is what ``newest`` names. Write the adapter at the end."""
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
        print(step + 1, flush=True)
    torch.save(model.adapter_state_dict(), folder / "trained.pt")


def train_capped(megabytes: int, folder: str | None) -> None:
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
    print(float(torch.stack(list(params)).detach().mean()))


if __name__ == "__main__":
    if sys.argv[1] == "steps":
        train(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        train_capped(int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
