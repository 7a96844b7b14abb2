"""Fine-tuning from adapters that begin with what quantization takes away, against those that begin with nothing.

python benchmarks/bench_calibrated_start.py --json start.json
python benchmarks/bench_calibrated_start.py --starts plain calibrated --seeds 0 --steps 40 --method static

Each start is fine-tuned on the bundled dialogues with each seed, which chooses the batches and what is random in the
adapters, and judged on held-out windows of 128 tokens as it goes. The table says after how many steps a start has the
loss that the plain one ends with. Calibration sees windows that are trained on.
"""

import argparse
import statistics
import time
from pathlib import Path

import calibration_text
import torch

STARTS = ("plain", "loftq", "calibrated base", "calibrated")
LENGTH, HELD_OUT, CALIBRATED_ON = 128, 96, 96


class Data:
    """Windows of the dialogues [any, LENGTH]: to judge by, and to train on."""

    def __init__(self, ids: torch.Tensor):
        windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        self.held_out, self.train = windows[:HELD_OUT], windows[2 * HELD_OUT :]

    def batches(self, seed: int, steps: int, rows: int) -> list[torch.Tensor]:
        """What a seed trains on."""
        generator = torch.Generator().manual_seed(seed)
        return [self.train[torch.randint(len(self.train), (rows,), generator=generator)] for _ in range(steps)]

    @torch.inference_mode()
    def loss(self, model) -> float:
        """Nats per token on the held-out windows."""
        model.eval()
        parts = self.held_out.split(16)
        return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in parts) / HELD_OUT


def build(start: str, model, data: Data, options: argparse.Namespace):
    """The model with its adapters, made in place."""
    import lowbit_lora
    from lowbit_lora import QLoRAConfig, QLoRAModel

    config = {"rank": options.rank, "lora_alpha": 2 * options.rank}
    calibration = [{"input_ids": window[None]} for window in data.train[:CALIBRATED_ON]]
    if start == "calibrated":
        return QLoRAModel.calibrated(model, QLoRAConfig(**config), calibration, options.method, progress=False)
    if start == "calibrated base":
        lowbit_lora.calibrate(model, calibration, options.method, progress=False)
    if start == "loftq":
        config |= {"init_lora_weights": "loftq", "loftq_iterations": 2}
    return QLoRAModel(model, QLoRAConfig(**config))


def begin(wrapped, start: str, first: dict[str, torch.Tensor], seed: int) -> None:
    """Put the adapter where training with a seed begins."""
    from lowbit_lora import LoRABaseLayer

    if start in ("loftq", "calibrated"):
        wrapped.load_adapter_state_dict(first)
        return
    torch.manual_seed(seed)
    for layer in wrapped.modules():
        if isinstance(layer, LoRABaseLayer):
            layer.reset_lora_parameters()


def train(wrapped, data: Data, seed: int, options: argparse.Namespace) -> list[tuple[int, float]]:
    """``(step, held-out loss)`` before training, every so many steps, and after the last."""
    parameters = wrapped.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / options.steps, options.steps)
    curve = [(0, data.loss(wrapped))]
    for step, batch in enumerate(data.batches(seed, options.steps, options.rows), start=1):
        wrapped.train()
        wrapped(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        if step % options.every == 0 or step == options.steps:
            curve.append((step, data.loss(wrapped)))
    return curve


def steps_to(curve: list[tuple[int, float]], loss: float) -> int | None:
    """After how many steps, of those that were judged, a run has this loss for the first time."""
    return next((step for step, value in curve if value <= loss), None)


def measured(row: dict, plain: dict, seeds: list[int]) -> dict:
    """Of a start: its mean losses before and after training, and after how many steps it has the plain one's last."""
    curves = [row["curves"][str(seed)] for seed in seeds]
    first, last = (statistics.mean(curve[index][1] for curve in curves) for index in (0, -1))
    goals = [plain["curves"][str(seed)][-1][1] for seed in seeds]
    return {"first": first, "last": last, "steps": [steps_to(*pair) for pair in zip(curves, goals, strict=True)]}


def table(rows: list[dict], seeds: list[int]) -> str:
    """The starts, the plain one first, as a table in Markdown."""
    from lowbit_lora.cli.output import table

    cells = []
    for row in rows:
        found = measured(row, rows[0], seeds)
        steps = ", ".join(str(step or "-") for step in found["steps"])
        times = [f"{row[key]:.0f}" for key in ("cpu_seconds", "train_cpu_seconds")]
        cells.append([row["start"], f"{found['first']:.4f}", f"{found['last']:.4f}", steps, *times])
    columns = ["start", "loss before", "loss after", "steps to the plain one's", "made, CPU s", "trained, CPU s"]
    return table(columns, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    calibration_text.add_options(parser)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--method", choices=("sequential", "static", "scale"), default="sequential")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=10, help="steps between two looks at the held-out windows")
    parser.add_argument("--rows", type=int, default=4, help="windows in a batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-4, help="falls linearly")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--markdown", help="file to write")
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lowbit_lora.cli import output

    torch.set_num_threads(options.threads)
    options.model = calibration_text.model_folder(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = calibration_text.dialogues(options.dialogues)
    data = Data(torch.tensor(tokenizer(text, verbose=False)["input_ids"]))
    rows: list[dict] = []
    for start in sorted({"plain", *options.starts}, key=STARTS.index):
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        if not rows:
            print(f"{'dense fp32':16} loss {data.loss(model):.4f}", flush=True)
        began = time.process_time()
        wrapped = build(start, model, data, options)
        made = time.process_time()
        first = {key: tensor.detach().clone() for key, tensor in wrapped.adapter_state_dict().items()}
        row = {"start": start, "cpu_seconds": made - began, "curves": {}}
        for seed in options.seeds:
            begin(wrapped, start, first, seed)
            row["curves"][str(seed)] = train(wrapped, data, seed, options)
        row["train_cpu_seconds"] = time.process_time() - made
        rows.append(row)
        print(start, measured(row, rows[0], options.seeds), flush=True)
        if options.json:
            output.write(options.json, {"settings": vars(options), "rows": rows})
    print(found := table(rows, options.seeds))
    if options.markdown:
        Path(options.markdown).write_text(found + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
