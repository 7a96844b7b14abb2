"""Marks for `make test`: what is Triton's, and what of it wants Triton's interpreter, on or off for a whole process."""

import pytest

from lowbit.backends import triton


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.startswith("test_triton_"):
            item.add_marker("triton")


def pytest_runtest_setup(item):
    if item.get_closest_marker("interpreted") and not triton.INTERPRETED:
        pytest.skip("runs under TRITON_INTERPRET=1; `make test` does both")
