"""LOWBIT_TRITON_AUTOTUNE=1: the fastest of some configurations, measured at a shape's first use and kept on disk."""

import dataclasses
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

from .launch import is_traced

#: Without it nothing is ever measured: the first, best predicted configuration runs.
WANTED = os.environ.get("LOWBIT_TRITON_AUTOTUNE", "0") == "1"


def cache_path() -> Path:
    """The file of what was found, in Triton's own cache directory."""
    return Path(triton.knobs.cache.dir) / "lowbit-autotune.json"


@functools.cache
def _found() -> dict[str, dict]:
    """By shape the fields of its configuration; what is read once is then kept up by ``_keep``."""
    path = cache_path()
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not all(isinstance(fields, dict) for fields in found.values()):
            raise ValueError("expected an object of objects")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: cannot be read ({error}); configurations are searched again", stacklevel=2)
        return {}


def _keep(key: str, config) -> None:
    """Written beside the file and renamed: a reader, or another process that writes, never sees half of it."""
    found = _found()
    found[key] = dataclasses.asdict(config)
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            json.dump(found, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"{path}: cannot be written ({error}); what was found lasts as long as the process", stacklevel=2)


def _may_measure() -> bool:
    """Not while a graph is made, by torch.compile or by a stream's capture: nothing runs then."""
    return not is_traced() and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def chosen(operation: str, problem, gpu, configs: Sequence, run: Callable):
    """The first of ``configs`` (dataclasses); where tuning is wanted, the one with which ``run(config)`` is fastest.

    Measured once for a ``problem`` on a ``gpu``, where it can be. What does not compile or fit is passed over; an error
    if that is all of them.
    """
    if not WANTED:
        return configs[0]
    key = f"{operation} {problem} {gpu}"
    kept = _found().get(key)
    for config in configs:
        if kept == dataclasses.asdict(config):
            return config
    if not _may_measure():
        return configs[0]
    times = {}
    for position, config in enumerate(configs):
        try:
            times[position] = measure(functools.partial(run, config))
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
            continue
    if not times:
        raise RuntimeError(f"{key}: none of {len(configs)} configurations runs on this GPU")
    fastest = configs[min(times, key=times.get)]
    _keep(key, fastest)
    return fastest


def measure(run: Callable[[], None]) -> float:
    """Milliseconds, of a median."""
    return triton.testing.do_bench(run, return_mode="median")
