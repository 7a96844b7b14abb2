"""Loads a folder twice, in 4 bits and dense; prints by how many bytes the process grew each time, as JSON.

test_hf_loading.py starts it: in a process that did other things, memory freed before would be used again, unseen.
"""

import ctypes
import gc
import json
import sys
import threading
import time
from pathlib import Path

import torch
from hf_models import load

from lowbit_lora import LowbitConfig


def anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def peak(folder: Path, **options) -> tuple[int, int]:
    """By how many bytes the process grew at most while loading, and how many the parameters have in the end."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    highest, before, ends = [0], anonymous_bytes(), threading.Event()

    def watch():
        while not ends.is_set():
            highest[0] = max(highest[0], anonymous_bytes())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(folder, dtype=torch.bfloat16, **options)
    ends.set()
    watcher.join()
    return highest[0] - before, sum(p.nbytes for p in model.parameters())


if __name__ == "__main__":
    _folder, _first = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    load(_first, quantization_config=LowbitConfig())  # imports, and what is made once
    print(json.dumps({"4 bits": peak(_folder, quantization_config=LowbitConfig()), "dense": peak(_folder)}))
