"""Fine-tune a causal language model with QLoRA on several GPUs, by accelerate's own loop or by transformers' Trainer.

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_many_gpus.py --model M --text FILE
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_many_gpus.py --model M --text FILE
    torchrun --nproc_per_node 2 examples/train_many_gpus.py --model M --text FILE --trainer
    python examples/train_many_gpus.py --model M --text FILE    # one process: the same losses, with all of the batch

The first process writes the whole adapter, and losses.json, to the output folder. Without GPUs the processes talk by
gloo and train on the CPU.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lowbit_lora import LowbitConfig, QLoRAConfig, QLoRAModel


class Blocks(torch.utils.data.Dataset):
    """The tokens of a text in blocks of one length; the labels are the tokens."""

    def __init__(self, tokens: torch.Tensor, length: int):
        self.blocks = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def load(options: argparse.Namespace, accelerator: Accelerator) -> QLoRAModel:
    """The base in 4 bits on this process's device, with an adapter; the same one in each process."""
    base = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=LowbitConfig(), device_map={"": accelerator.device}
    )
    set_seed(options.seed)
    return QLoRAModel(base, QLoRAConfig(rank=options.rank, gradient_checkpointing=options.gradient_checkpointing))


def train(options: argparse.Namespace, model: QLoRAModel, data: Blocks, accelerator: Accelerator) -> list[float]:
    """The mean loss over all processes of each step."""
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=options.lr, weight_decay=0.0)
    loader = torch.utils.data.DataLoader(data, batch_size=options.batch_size, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    model.train()
    while len(losses) < options.steps:
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            if len(losses) == options.steps:
                break
    accelerator.unwrap_model(model).save_pretrained(options.output, is_main_process=accelerator.is_main_process)
    return losses


def train_by_trainer(options: argparse.Namespace, model: QLoRAModel, data: Blocks) -> list[float]:
    """The same by Trainer."""
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    # Not trainer.save_model(), which under FSDP gathers the decoded base too.
    model.save_pretrained(options.output, is_main_process=trainer.is_world_process_zero())
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--text", type=Path, required=True, help="a file of text to train on")
    parser.add_argument("--output", type=Path, default=Path("out/many-gpus"))
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step, for each process")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-steps", type=int, help="of Trainer's checkpoints; by default there are none")
    parser.add_argument("--trainer", action="store_true", help="train by transformers' Trainer")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> QLoRAModel:
    """Train, and return this process's model."""
    options = parse(arguments)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    tokens = AutoTokenizer.from_pretrained(options.model)(options.text.read_text()).input_ids
    data = Blocks(torch.tensor(tokens), options.length)
    model = load(options, accelerator)
    losses = train_by_trainer(options, model, data) if options.trainer else train(options, model, data, accelerator)
    if accelerator.is_main_process:
        (options.output / "losses.json").write_text(json.dumps(losses))
        print(
            f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps of {accelerator.num_processes} processes"
        )
    return model


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
