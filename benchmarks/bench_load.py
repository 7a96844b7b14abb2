"""What loading a model in 4 bits takes: seconds, and memory at the peak.

    python benchmarks/bench_load.py FOLDER  # of a dense causal language model

Each load is in a process of its own, after the libraries are imported and the files read into the cache. The
anonymous peak is sampled every 0.5 ms and counts from before the load; a file that is mapped is not in it. The peak of
the process counts everything, libraries too. Linux only. bitsandbytes' rows need bitsandbytes.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from machine import cpu_name

#: name -> (which library quantizes or nothing, whether the folder is quantized already).
CONTENDERS = {
    "lowbit": ("lowbit", False),
    "bitsandbytes": ("bitsandbytes", False),
    "dense": (None, False),
    "lowbit, folder in 4 bits": ("lowbit", True),
    "bitsandbytes, folder in 4 bits": ("bitsandbytes", True),
}


def settings_of(library: str | None):
    """The quantization_config of a library's NF4 with double-quantized scales."""
    if library == "lowbit":
        from lowbit_lora import LowbitConfig

        return LowbitConfig()
    if library == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return None


def memory(field: str) -> int:
    """Bytes that Linux says of this process: RssAnon is now, VmHWM the most there was of all kinds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def read_through(path: Path) -> None:
    """Bring a file into the system's cache, with little memory."""
    with open(path, "rb", buffering=0) as file:
        while file.read(2**16):
            pass


def load(folder: Path, library: str | None, is_quantized: bool, dtype: torch.dtype):
    """The model of a folder, quantized by a library."""
    from transformers import AutoModelForCausalLM

    given = {} if library is None or is_quantized else {"quantization_config": settings_of(library)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **given)


def measure(folder: Path, library: str | None, is_quantized: bool, dtype: torch.dtype) -> dict[str, float]:
    """Load once; return seconds, and bytes at the peak and of what was loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if library is not None:
        importlib.import_module(library if library == "bitsandbytes" else "lowbit_lora")
    config = AutoConfig.from_pretrained(folder)
    settings = vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)  # imports the class
    assert (settings is not None) == is_quantized
    for path in folder.iterdir():
        read_through(path)
    before, highest, ends = memory("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not ends.is_set():
            highest[0] = max(highest[0], memory("RssAnon"))
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load(folder, library, is_quantized, dtype)
    seconds = time.perf_counter() - start
    ends.set()
    watcher.join()
    stored = sum(p.nbytes for p in model.parameters())
    return {"seconds": seconds, "anonymous": highest[0] - before, "process": memory("VmHWM"), "model": stored}


def in_process(name: str, folder: Path, options: argparse.Namespace, save_to: Path | None = None) -> dict[str, float]:
    """What a contender's process prints; with ``save_to`` it writes its model there instead."""
    command = [sys.executable, __file__, str(folder), "--contender", name, "--dtype", options.dtype]
    command += ["--threads", str(options.threads), *(["--save-to", str(save_to)] if save_to else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time loading in 4 bits, and measure its memory.")
    parser.add_argument("folder", type=Path, help="a dense causal language model")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--rounds", type=int, default=3, help="loads of each contender, in turns; the table has medians"
    )
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--save-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.folder / "config.json").is_file():
        parser.error(f"folder: expected a model with a config.json, got {options.folder}")
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected a number from 1, got {getattr(options, name)}")
    return options


def run_contender(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    library, is_quantized = CONTENDERS[options.contender]
    dtype = getattr(torch, options.dtype)
    if options.save_to:
        load(options.folder, library, False, dtype).save_pretrained(options.save_to)
        print("{}")
    else:
        print(json.dumps(measure(options.folder, library, is_quantized, dtype)))


def main() -> None:
    """Print a table."""
    options = parse_options()
    if options.contender:
        run_contender(options)
        return
    have_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    names = [name for name, (library, _) in CONTENDERS.items() if library != "bitsandbytes" or have_bitsandbytes]
    with tempfile.TemporaryDirectory() as made:
        folders = {}
        for name in names:
            library, is_quantized = CONTENDERS[name]
            folders[name] = Path(made, library) if is_quantized else options.folder
            if is_quantized:
                in_process(name, options.folder, options, save_to=folders[name])
        found = {name: [] for name in names}
        for _ in range(options.rounds):
            for name in names:
                found[name].append(in_process(name, folders[name], options))
    print(
        f"{cpu_name()}, torch {torch.__version__}, {options.threads} threads, {options.dtype}, {options.folder.name}\n"
    )
    print("| | s | anonymous peak MB | process at its peak MB | weights MB |\n|---|---|---|---|---|")
    for name, rows in found.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        megabytes = " | ".join(f"{middle[key] / 1e6:.0f}" for key in ("anonymous", "process", "model"))
        print(f"| {name} | {middle['seconds']:.2f} | {megabytes} |")


if __name__ == "__main__":
    main()
