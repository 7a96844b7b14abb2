"""Every Triton kernel compiles for every GPU, within what the GPU has. Nothing runs.

Each run takes a part of ``triton_calls.CALLS``; LOWBIT_TRITON_COMPILE=all takes them all.
"""

import os

import pytest
import triton_calls
from conftest_triton import SHARED_MEMORY, TARGETS, compiled, compiled_only, launches, spilled

EVERY_CALL = os.environ.get("LOWBIT_TRITON_COMPILE") == "all"
CALLS = [call for call in triton_calls.CALLS if call.every_run or EVERY_CALL]


@compiled_only
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name.replace(" ", "-"))
def test_compiles(tmp_path, call, target):
    """A kernel that a GPU's compiler refuses, or that wants more shared memory than there is, would fail there."""
    with launches(target) as made:
        call.make()
    assert made
    for launch in made:
        kernel, _ = compiled(launch, target)
        assert kernel.metadata.shared <= SHARED_MEMORY[target], kernel.metadata.name
        assert spilled(kernel, target, tmp_path) == 0, kernel.metadata.name


def test_every_op_is_called():
    """An op added to the backend without an entry in triton_calls.py would never be compiled here."""
    from lowbit.backends import triton as backend

    assert {call.name.split()[0] for call in triton_calls.CALLS} >= set(backend.MODULES)
