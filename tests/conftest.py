"""What holds for every test: where compilers keep their results, and which tests want Triton's interpreter."""

import os
from pathlib import Path

import pytest

pytest_plugins = ["ptxemu.proofs"]

# Triton compiles for the GPUs of several tests; each kernel once for all of them, and for the next run.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "triton"))


def pytest_runtest_setup(item):
    from lowbit.backends import triton

    if item.get_closest_marker("interpreted") and not triton.INTERPRETED:
        pytest.skip("runs under TRITON_INTERPRET=1; `make test` does both")
