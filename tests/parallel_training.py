"""What the processes of tests/test_hf_parallel.py run: the example, and a note of what each of them held and sent.

It forks the processes that `accelerate launch` would start, with the environment that accelerate makes of a config
file, and imports everything once for all of them:

    python tests/parallel_training.py OUTPUT ddp:4,fsdp2:2 ROWS-OF-A-STEP [options of the example]
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.commands import launch
from accelerate.utils import DistributedType
from accelerate.utils.launch import get_free_port, prepare_multi_gpu_env
from distributed_cases import Sent
from forked import start
from transformers import AutoModelForCausalLM

from lowbit import QuantizedTensor
from lowbit_lora import LowbitConfig, QLoRAConfig, QLoRAModel
from lowbit_lora.hf.parallel import tensor_parallel_
from lowbit_lora.hf.trainer import save_adapters_only

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.append(str(EXAMPLES))
import train_many_gpus  # noqa: E402


def shard_on_the_cpu() -> None:
    """Let accelerate shard over processes of the CPU; it does so on several GPUs only. The device stays the CPU."""
    plain = PartialState.__init__

    def init(state, *args, **kwargs):
        plain(state, *args, **kwargs)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def train(output: Path, options: list[str]) -> None:
    """Run the example with its own loop and with Trainer; write what this process held and sent."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_the_cpu()
    seen = {}
    for kind in ("loop", "trainer"):
        flags = ["--trainer"] if kind == "trainer" else []
        with Sent() as sent:
            model = train_many_gpus.main([*options, *flags, "--output", str(output / kind)])
        local = [getattr(p, "_local_tensor", p) for p in model.parameters()]
        seen[kind] = {
            "sent": sent.bytes,
            "codes": sum(q.packed.nbytes for q in local if isinstance(q, QuantizedTensor)),
            "dense": sum(p.nbytes for p in local if not isinstance(p, QuantizedTensor)),
        }
    (output / f"seen.{os.environ['RANK']}").write_text(json.dumps(seen))
    del model, local
    gc.collect()  # DDP that is freed after its group waits for a thread that waits for Python's lock
    torch.distributed.destroy_process_group()


def split(output: Path, options: list[str]) -> None:
    """Run a model of which each process has a part; write the output, the gradients and the whole adapter."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = adapted(train_many_gpus.parse(options).model, noise=rank)
    tensor_parallel_(model)
    results = gradients(model)
    results["codes"] = sum(p.packed.nbytes for p in model.parameters() if isinstance(p, QuantizedTensor))
    model.save_pretrained(output, is_main_process=rank == 0)
    torch.save(results, output / f"results.{rank}")
    torch.distributed.destroy_process_group()


def resume(output: Path, options: list[str]) -> None:
    """Save a state of accelerate's after a step, and go on twice: at once, and with other factors that load it."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    shard_on_the_cpu()
    accelerator = Accelerator(cpu=True)
    save_adapters_only(accelerator)
    ids = torch.arange(16).view(2, 8) + accelerator.process_index

    def start(noise: int) -> tuple[QLoRAModel, torch.optim.Optimizer]:
        accelerator.free_memory()
        model = adapted(train_many_gpus.parse(options).model, noise)
        return accelerator.prepare(model, torch.optim.AdamW(model.trainable_parameters(), lr=0.01))

    def step(model: QLoRAModel, optimizer: torch.optim.Optimizer) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        plugin = accelerator.state.fsdp_plugin
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of the other kind
        plugin.set_state_dict_type(kind)
        running = start(0)
        step(*running)
        accelerator.save_state(str(output / kind))
        through = [step(*running) for _ in range(2)]
        running = start(1)
        accelerator.load_state(str(output / kind))
        losses[kind] = through, [step(*running) for _ in range(2)]
    (output / f"losses.{accelerator.process_index}").write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()


def adapted(folder: str, noise: int = 0) -> QLoRAModel:
    """The model with an adapter that changes something; with ``noise`` another one."""
    config = LowbitConfig(block_size=32, modules_to_not_convert=["layers.1.mlp.down_proj"])
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    torch.manual_seed(noise)
    model = QLoRAModel(base, QLoRAConfig(rank=4))
    for p in model.trainable_parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def gradients(model: QLoRAModel) -> dict[str, torch.Tensor]:
    """The logits, the gradient of the input, and those of the factors by name."""
    x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    logits = model(inputs_embeds=x).logits
    logits.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), "input": x.grad} | found


def environment(config: str, processes: int) -> dict[str, str]:
    """What `accelerate launch` gives to the processes of a config file."""
    file = str(EXAMPLES / "accelerate" / f"{config}.yaml")
    arguments = ["--config_file", file, "--num_processes", str(processes), "--mixed_precision", "no", __file__]
    parsed, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
    return prepare_multi_gpu_env(parsed) | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}


def fork(output: Path, config: str, processes: int, options: list[str]) -> None:
    """Train in forked processes."""
    run_by, config_file = RUNS.get(config, (train, config))
    shared = environment(config_file, processes) | {"MASTER_PORT": str(get_free_port())}

    def process(rank: int):
        def run() -> int:
            os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
            try:
                run_by(output, options)
            except BaseException:
                traceback.print_exc()
                raise
            return 0

        return run

    children = [start(process(rank)) for rank in range(processes)]
    if any([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]):
        sys.exit(f"{config} failed in {processes} processes")


#: Runs that are not of the example -> what runs, under which config.
RUNS = {"tensor": (split, "ddp"), "state": (resume, "fsdp2")}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for run in sys.argv[2].split(","):
        name, _, count = run.partition(":")
        (folder / run).mkdir()
        rows = int(sys.argv[3]) // int(count)
        fork(folder / run, name, int(count), [*sys.argv[4:], f"--batch-size={rows}"])
