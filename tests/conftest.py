"""Marks for `make test`: what of it is about CUDA kernels, and what wants a process with Triton's interpreter."""

import pytest

from lowbit.backends import triton


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.startswith(("test_cuda_", "test_ptxemu_")):
            item.add_marker("cuda_kernels")


def pytest_runtest_setup(item):
    if item.get_closest_marker("interpreted") and not triton.INTERPRETED:
        pytest.skip("runs under TRITON_INTERPRET=1; `make test` does both")
