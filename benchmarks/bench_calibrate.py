"""How much of a language model survives NF4, by how codes and scales are chosen: perplexity and KL to the dense model.

python benchmarks/bench_calibrate.py --wikipedia gensim-4.4.0-*.whl --json calibrate.json
python benchmarks/bench_calibrate.py --wikipedia gensim-4.4.0-*.whl --contenders static sequential --windows 48

Each contender stores the same model, in fp32, in the same bytes, and is judged on 12 windows of 512 tokens of
Wikipedia, and on 12 of dialogues. It is calibrated on other windows of Wikipedia alone. "With adapters": beside it are
untrained adapters that begin with what quantization takes away. Every weight is checked to be what bitsandbytes decodes
from its bytes, where bitsandbytes is installed.
"""

import argparse
import importlib.util
import json
import math
import time
from pathlib import Path

import calibration_text
import torch
import torch.nn.functional as F

WITH_ADAPTERS = " with adapters"
CONTENDERS = (
    *("absmax", "search", "scale", "static", "sequential"),
    *(f"{method}{WITH_ADAPTERS}" for method in ("static", "sequential")),
)
TEXTS = ("wikipedia", "dialogues")
LENGTH, JUDGED, STRIDE = 512, 12, 20000
#: Where calibration windows begin in each stretch of STRIDE tokens; the windows that judge begin at 0.
OFFSETS = (8000, 14000, 4000, 11000, 17000)


def windows(ids: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` windows to calibrate on [count, LENGTH]."""
    stretches = (len(ids) - LENGTH - max(OFFSETS)) // STRIDE + 1
    per_offset = min(24, stretches)
    begins = [i * STRIDE + offset for offset in OFFSETS for i in range(per_offset)]
    if count > len(begins):
        raise ValueError(f"--windows: expected at most {len(begins)} of this text, got {count}")
    return torch.stack([ids[begin : begin + LENGTH] for begin in begins[:count]])


class Judge:
    """Windows of a text, with what the dense model makes of them."""

    def __init__(self, ids: torch.Tensor, model, stride: int):
        self.windows = [ids[i * stride : i * stride + LENGTH] for i in range(JUDGED)]
        self.dense, loss = [], 0.0
        for window in self.windows:
            logits = self._logits(model, window)
            loss += F.cross_entropy(logits, window[1:]).item() / JUDGED
            self.dense.append(logits.half())
        self.of_dense = {"ppl": math.exp(loss), "kl": 0.0}

    def __call__(self, model) -> dict[str, float]:
        """``ppl`` and ``kl`` (nats per token) of a model."""
        loss = divergence = 0.0
        for window, dense in zip(self.windows, self.dense, strict=True):
            own, reference = self._logits(model, window).log_softmax(-1), dense.float().log_softmax(-1)
            loss += F.nll_loss(own, window[1:]).item() / JUDGED
            divergence += (reference.exp() * (reference - own)).sum(-1).mean().item() / JUDGED
        return {"ppl": math.exp(loss), "kl": divergence}

    @staticmethod
    def _logits(model, window: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=window[None], use_cache=False).logits[0, :-1].float()


def quantize(model, how: str, calibration: torch.Tensor, options: argparse.Namespace) -> dict:
    """Quantize in place; returns what is to be said of it."""
    import lowbit
    import lowbit_lora

    cpu, wall = time.process_time(), time.perf_counter()
    report = None
    if how in ("absmax", "search"):
        lowbit.quantize_(model, scale=how)
    else:
        settings = {
            key: value for key, value in vars(options).items() if key in ("damping", "sweeps", "shift", "ridge")
        }
        settings["progress"] = not options.quiet
        batches = [{"input_ids": window[None]} for window in calibration]
        method = how.removesuffix(WITH_ADAPTERS)
        if method == how:
            report = lowbit_lora.calibrate(model, batches, method, **settings)
        else:
            config = lowbit_lora.QLoRAConfig(rank=options.rank)
            report = lowbit_lora.QLoRAModel.calibrated(model, config, batches, method, **settings).calibration
    row = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
    if report is not None and options.plot:
        report.plot(f"{options.plot}-{how.replace(' ', '-')}.png")
    return row


def check_against_bitsandbytes(model) -> int:
    """How many weights bitsandbytes decodes to the same bits; fails where one differs."""
    import bitsandbytes.functional as theirs

    from lowbit import QuantizedTensor, files, format

    count = 0
    for name, weight in model.named_parameters():
        if not isinstance(weight, QuantizedTensor):
            continue
        state = files.to_state(weight.data, "w")
        about = json.loads(bytes(state["w.quant_state.bitsandbytes__nf4"].tolist()))
        nested = theirs.QuantState(
            absmax=state["w.nested_absmax"], code=state["w.nested_quant_map"], blocksize=256, dtype=torch.float32
        )
        whole = theirs.QuantState(
            absmax=state["w.absmax"],
            shape=torch.Size(about["shape"]),
            code=format.codebook("nf4"),
            blocksize=about["blocksize"],
            quant_type="nf4",
            dtype=torch.float32,
            offset=torch.tensor(about["nested_offset"]),
            state2=nested,
        )
        decoded, own = theirs.dequantize_4bit(state["w"], whole), weight.dequantize(torch.float32)
        if (decoded - own).abs().max() > 1e-6 * own.abs().max():
            raise AssertionError(f"{name}: bitsandbytes decodes other values")
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    calibration_text.add_options(parser)
    parser.add_argument("--wikipedia", required=True, help="gensim's wheel")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, to calibrate on")
    parser.add_argument("--threads", type=int, default=2)
    for name, value in (("damping", 0.1), ("shift", 0.5), ("ridge", 1.0)):
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--markdown", help="file to write")
    parser.add_argument("--plot", help="beginning of the names of plots, one for each calibrated contender")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lowbit_lora.cli import output

    torch.set_num_threads(options.threads)
    options.model = calibration_text.model_folder(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    wikipedia, dialogues = (
        torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        for text in (calibration_text.wikipedia(options.wikipedia), calibration_text.dialogues(options.dialogues))
    )

    def load():
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    model = load()
    judges = {
        "wikipedia": Judge(wikipedia, model, STRIDE),
        "dialogues": Judge(dialogues, model, len(dialogues) // (JUDGED + 1)),
    }
    rows = [{"name": "dense fp32"} | {name: judge.of_dense for name, judge in judges.items()}]
    show(rows[0])
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    for how in options.contenders:
        model = load()
        row = {"name": how} | quantize(model, how, windows(wikipedia, options.windows), options)
        if has_bitsandbytes:
            row["checked_with_bitsandbytes"] = check_against_bitsandbytes(model)
        rows.append(row | {name: judge(model) for name, judge in judges.items()})
        show(rows[-1])
    if options.json:
        output.write(options.json, {"windows": options.windows, "rows": rows})
    if options.markdown:
        Path(options.markdown).write_text(markdown(rows) + "\n", encoding="utf-8")


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    from lowbit_lora.cli.output import table

    cells = [
        [
            row["name"],
            *(f"{row[text][key]:.{digits}f}" for text in TEXTS for key, digits in (("ppl", 2), ("kl", 4))),
            *(f"{row[key]:.0f}" if key in row else "" for key in ("seconds", "cpu_seconds")),
        ]
        for row in rows
    ]
    return table(["", *(f"{text}: {what}" for text in TEXTS for what in ("perplexity", "KL")), "s", "CPU s"], cells)


def show(row: dict) -> None:
    """Print a row, with the columns' names in it."""
    texts = "   ".join(f"{name} ppl {row[name]['ppl']:.3f} KL {row[name]['kl']:.4f}" for name in TEXTS)
    cost = f"   {row['cpu_seconds']:.0f} CPU s, {row['seconds']:.0f} s" if "cpu_seconds" in row else ""
    print(f"{row['name']:24} {texts}{cost}", flush=True)


if __name__ == "__main__":
    main()
