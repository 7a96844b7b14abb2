"""Every Triton kernel compiles for every GPU, within what the GPU has. Nothing runs.

Each run takes a part of ``triton_calls.CALLS``, in the configurations that would run. LOWBIT_TRITON_COMPILE=all takes
all calls, in every configuration that autotune may choose.
"""

import dataclasses
import os

import pytest
import triton_calls
from conftest_triton import SHARED_MEMORY, TARGETS, compiled, compiled_only, launches, spilled

EVERYTHING = os.environ.get("LOWBIT_TRITON_COMPILE") == "all"
CALLS = [call for call in triton_calls.CALLS if call.every_run or EVERYTHING]

#: The launches of earlier calls.
_SEEN = set()


def run_each(operation, problem, gpu, configs, run):
    """In place of ``autotune.chosen``: runs one of each kind. (In how many parts a sum is makes no other code.)"""
    for config in configs:
        kind = dataclasses.replace(config, splits=min(config.splits, 2))
        key = (operation, gpu, dataclasses.replace(problem, m=0, n=0, experts=0), kind)
        if key not in _SEEN:
            _SEEN.add(key)
            run(config)
    return configs[0]


@compiled_only
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name.replace(" ", "-"))
def test_compiles(monkeypatch, tmp_path, call, target):
    """A kernel that a GPU's compiler refuses, or that wants more shared memory than there is, would fail there."""
    from lowbit.backends.triton import autotune

    if EVERYTHING:
        monkeypatch.setattr(autotune, "chosen", run_each)
    with launches(target) as made:
        call.make()
    assert made
    for launch in made:
        kernel, _ = compiled(launch, target)
        assert kernel.metadata.shared <= SHARED_MEMORY[target], kernel.metadata.name
        assert spilled(kernel, target, tmp_path) == 0, (kernel.metadata.name, launch.options)


def test_every_op_is_called():
    """An op without a kernel would be the reference's; one that triton_calls.py leaves out is never compiled here."""
    from lowbit.backends import triton as backend
    from lowbit.ops import OPS, lora

    by_torch = {op.name for op in lora.OPS}  # Product calls these only where there are kernels for them
    assert backend.MODULES.keys() >= {op.name for op in OPS.values() if op.kernel is None} - by_torch
    assert {call.name.split()[0] for call in triton_calls.CALLS} >= backend.MODULES.keys()
