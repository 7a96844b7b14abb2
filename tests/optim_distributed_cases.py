"""What the processes of tests/test_optim_distributed.py run, and the single process to compare them with."""

from pathlib import Path

import distributed_cases as cases
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowbit_lora.optim import AdamW, PagedAdamW8bit

KINDS = {"adamw": AdamW, "paged 8-bit": PagedAdamW8bit}
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.05}


def model() -> nn.Sequential:
    """Weights whose rows are whole blocks of 256, whose rows are not, and with fewer rows than processes."""
    torch.manual_seed(0)
    first, second, third = nn.Linear(512, 33), nn.Linear(33, 768), nn.Linear(768, 7)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third, nn.Linear(7, 1))


def sharded() -> nn.Sequential:
    """The model with FSDP2 on each layer."""
    module, mesh = model(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def train(module: nn.Module, optimizer, steps) -> None:
    """Every process has the same batch, so that means of gradients are exact."""
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(4, 512, generator=torch.Generator().manual_seed(step))
        module(x).square().mean().backward()
        optimizer.step()


def result(module: nn.Module, optimizer) -> dict:
    """The whole parameters and states, by name."""
    found = {}
    for name, p in module.named_parameters():
        found[name] = cases.whole(p.detach()).clone()
        for state, value in optimizer.state[p].items():
            found[f"{name} {state}"] = cases.whole(value).clone() if isinstance(value, torch.Tensor) else value
    return found | {"norm": float(optimizer.grad_norm), "bytes": optimizer.state_bytes}


def fsdp_case(rank: int, folder: Path) -> dict:
    """Two processes train and save; four load, and both go on."""
    results = {}
    for kind, cls in KINDS.items():
        module = sharded()
        optimizer = cls(module.parameters(), **OPTIONS)
        file = {"checkpoint_id": folder / kind}
        if dist.get_world_size() == 2:
            train(module, optimizer, range(3))
            results[f"{kind} 3"] = result(module, optimizer)
            state = {"model": module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer)}
            checkpoint.save(state, **file)
        else:
            state = {"model": module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer)}
            checkpoint.load(state, **file)
            module.load_state_dict(state["model"])
            set_optimizer_state_dict(module, optimizer, state["optimizer"])
            optimizer.grad_norm = torch.zeros(())
            results[f"{kind} 3"] = result(module, optimizer)
        train(module, optimizer, range(3, 5))
        results[f"{kind} 5"] = result(module, optimizer)
    return results
