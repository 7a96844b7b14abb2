"""LOWBIT_TRITON_AUTOTUNE=1: the fastest of some configurations, measured at a shape's first use and kept on disk."""

import dataclasses
import functools
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from . import INTERPRETED, shapes
from .launch import is_traced

#: Without it nothing is measured: the first configuration runs, which is predicted to be the best.
WANTED = os.environ.get("LOWBIT_TRITON_AUTOTUNE", "0") == "1"

#: A configuration that fails with one of these is passed over. Triton's own autotuner does the same.
_DOES_NOT_RUN = (OutOfResources, CompilationError, PTXASError)

#: The fields of each key's configuration that this process has found or read.
_KNOWN: dict[str, dict] = {}


def cache_folder() -> Path:
    """Return the folder of what was found, in Triton's own cache directory."""
    return Path(triton.knobs.cache.dir) / "lowbit-autotune"


def _path(key: str) -> Path:
    """Return the key's own file. One for each key: processes that tune at the same time do not overwrite each other."""
    return cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _kept(key: str) -> dict | None:
    """Return the fields of what any process has found for ``key``."""
    if key in _KNOWN:
        return _KNOWN[key]
    path = _path(key)
    try:
        kept = json.loads(path.read_text())
        if not isinstance(kept, dict) or kept.get("key") != key or not isinstance(kept.get("config"), dict):
            raise ValueError(f"expected the key {key!r} and its config")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also of JSON's syntax, and of what is no text
        warnings.warn(f"{path}: cannot be read ({error}); configurations are searched again", stacklevel=2)
        return None
    _KNOWN[key] = kept["config"]
    return kept["config"]


def _keep(key: str, config) -> None:
    """Write what was found. The file is renamed into place: a reader never sees half of it."""
    _KNOWN[key] = dataclasses.asdict(config)
    path = _path(key)
    own = path.with_suffix(f".{uuid.uuid4().hex}")  # not by pid: threads share one, and so may containers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            own.write_text(json.dumps({"key": key, "config": _KNOWN[key]}, indent=1))
            os.replace(own, path)
        finally:
            own.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path}: cannot be written ({error}); what was found lasts as long as the process", stacklevel=2)


def _may_measure() -> bool:
    """Whether calls run now. They do not while torch.compile or a stream's capture makes a graph."""
    return not is_traced() and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def chosen(problem: shapes.Problem, gpu: shapes.Gpu, configs: Sequence[shapes.Config], run: Callable) -> shapes.Config:
    """Return the first of ``configs``; where tuning is wanted, the one with which ``run(config)`` is fastest.

    It is measured once for a ``problem`` on a ``gpu``. What does not compile or fit is passed over; it is an error if
    nothing is left. Under torch.compile and in the capture of a CUDA graph nothing is measured: what an eager call
    found before is used, else the first. So call once eagerly. Triton's interpreter, which has no GPU, takes the first.
    """
    if INTERPRETED or not WANTED:
        return configs[0]
    key = f"{problem} {gpu}"
    kept = _kept(key)
    for config in configs:
        if kept == dataclasses.asdict(config):
            return config
    if not _may_measure():
        return configs[0]
    times = {}
    for position, config in enumerate(configs):
        try:
            times[position] = measure(functools.partial(run, config))
        except _DOES_NOT_RUN:
            continue
    if not times:
        raise RuntimeError(f"{key}: none of {len(configs)} configurations runs on this GPU")
    fastest = configs[min(times, key=times.get)]
    _keep(key, fastest)
    return fastest


def measure(run: Callable[[], None]) -> float:
    """Return the median time in milliseconds."""
    return triton.testing.do_bench(run, return_mode="median")


def run_best(problem: shapes.Problem, gpu: shapes.Gpu, run: Callable[[shapes.Config], None]) -> None:
    """Run the chosen one of all configurations that there are for ``problem``."""
    run(chosen(problem, gpu, shapes.configs(problem, gpu), run))
