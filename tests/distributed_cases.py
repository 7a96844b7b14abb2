"""What the processes of tests/test_tensor_distributed.py run, and the single process to compare them with."""

import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit import QuantizedTensor, WeightSpec

IDS = torch.arange(12).reshape(3, 4) % 10
BATCHES = [IDS, (IDS + 3) % 10]


class Adapted(nn.Module):
    """A quantized linear layer and a LoRA."""

    def __init__(self, inputs: int, outputs: int, spec: WeightSpec):
        super().__init__()
        self.base = lowbit.quantize_(nn.Linear(inputs, outputs), spec)
        self.lora_a = nn.Parameter(torch.randn(2, inputs) / 8)
        self.lora_b = nn.Parameter(torch.randn(outputs, 2) / 8)

    def forward(self, x):
        return torch.tanh(self.base(x) + F.linear(F.linear(x, self.lora_a), self.lora_b))


class Experts(nn.Module):
    """The mean of three experts that share one stack."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(lowbit.quantize(torch.randn(3, 64, 64) / 8), requires_grad=False)

    def forward(self, x):
        return sum(F.linear(x, self.weight[expert]) for expert in range(3)) / 3


class Embedding(nn.Embedding):
    """An embedding of ten quantized rows."""

    def __init__(self):
        super().__init__(10, 64)
        self.weight = nn.Parameter(lowbit.quantize(self.weight.detach()), requires_grad=False)


def model(seed: int = 0) -> nn.Sequential:
    """A model with one layer of each kind of sharding; the comments name them."""
    torch.manual_seed(seed)
    return nn.Sequential(
        Embedding(),
        Adapted(64, 96, WeightSpec()),  # rows are whole blocks, and divide evenly
        Adapted(96, 33, WeightSpec()),  # rows cut blocks, and do not divide
        Adapted(33, 64, WeightSpec("int8")),
        Adapted(64, 70, WeightSpec("nf4", 64, False)),  # rows are whole blocks, and 70 is no multiple of 4
        Adapted(70, 64, WeightSpec("fp4", 32, True)),
        Experts(),  # three rows: one rank of four has none
        Adapted(64, 2, WeightSpec("nf4", 32, True)),
    )


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """The whole tensors of the trainable parameters, by name."""
    return {name: whole(p.detach()) for name, p in module.named_parameters() if p.requires_grad}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(module: nn.Module, batches: list[torch.Tensor], steps: int = 2) -> dict[str, torch.Tensor]:
    """Do steps of SGD on the mean loss of the batches; return what was trained."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        for ids in batches:
            (module(ids).square().mean() / len(batches)).backward()
        optimizer.step()
    return trained(module)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the output and the gradients of one step."""
    y = module(IDS)
    y.float().square().mean().backward()
    return {"y": y.detach()} | {n: whole(p.grad).float() for n, p in module.named_parameters() if p.requires_grad}


def shard(module: nn.Module, **options) -> nn.Module:
    """Put each layer of ``module`` under FSDP2; return it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in module:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(module, mesh=mesh, **options)


class Sent(TorchDispatchMode):
    """Counts the bytes of weights and gradients that collectives send. (DDP's own messages are integers.)"""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d" and isinstance(args[0], (list, tuple)):
            for tensor in args[0]:
                if isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.dtype == torch.uint8):
                    name = op.overloadpacket.__name__
                    self.bytes[name] = self.bytes.get(name, 0) + tensor.nbytes
        return op(*args, **(kwargs or {}))


def ddp_case(rank: int, folder: Path) -> dict:
    """Two processes train on a batch each. The module goes into DDP bare and inside of a container."""
    torch.manual_seed(rank)  # adapters differ until DDP sends those of rank 0
    results = {}
    for name, wrap in (("bare", lambda m: m), ("container", nn.Sequential)):
        module = model()
        with torch.no_grad():
            for parameter in (p for p in module.parameters() if p.requires_grad):
                parameter.add_(rank)
        with Sent() as sent:
            parallel = DistributedDataParallel(wrap(module))
            results[f"sent {name}"] = dict(sent.bytes)
            sent.bytes.clear()
            train(parallel, [BATCHES[rank]], steps=1)
            results[f"sent in a step {name}"] = dict(sent.bytes)
        train(parallel, [BATCHES[rank]], steps=1)
        results[name] = trained(module)
    return results


def fsdp_case(rank: int, folder: Path) -> dict:
    """Every process trains on the same batch: sums of equal gradients are exact in any order."""
    results = {}
    for reshard in (True, False):
        module = shard(model(), reshard_after_forward=reshard)
        results[f"fp32 {reshard}"] = train(module, [IDS])
        local = [p.to_local() for p in module.parameters() if isinstance(p.to_local(), QuantizedTensor)]
        results["bytes"] = sum(q.packed.nbytes for q in local)
    module = shard(model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    results["bf16"] = gradients(module)
    weights = [p for p in shard(model()).parameters() if isinstance(p.to_local(), QuantizedTensor)]
    results["weights"] = [p.full_tensor() for p in weights]
    if dist.get_world_size() == 2:
        module = shard(model())
        checkpoint.save({n: p for n, p in module.named_parameters() if p.requires_grad}, checkpoint_id=folder / "dcp")
    else:
        module = shard(model(seed=1))  # other values than the file's
        state = {n: p for n, p in module.named_parameters() if p.requires_grad}
        checkpoint.load(state, checkpoint_id=folder / "dcp")
        results["loaded"] = {name: whole(p.detach()) for name, p in state.items()}
    return results


def two_batches_case(rank: int, folder: Path) -> dict:
    """Two processes train on a batch each under FSDP2."""
    return {"fsdp": train(shard(model()), [BATCHES[rank]])}


def run(rank: int, ranks: int, folder: Path, cases: tuple) -> None:
    """Run cases in one process; write each result to a file in the folder."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    for case in cases:
        torch.save(case(rank, folder), folder / f"{case.__name__}.{ranks}.{rank}")
    gc.collect()  # DDP that is freed after its group waits for a thread that waits for Python's lock
    dist.destroy_process_group()


def spawn(ranks: int, folder: Path, *cases) -> None:
    """Run the cases in ``ranks`` processes."""
    torch.multiprocessing.start_processes(run, (ranks, folder, cases), nprocs=ranks, start_method="spawn")
