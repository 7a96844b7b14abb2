"""Which of Triton's two modes a test is for: its interpreter is on or off for a whole process."""

import pytest

from lowbit.backends import triton


def pytest_runtest_setup(item):
    if item.get_closest_marker("interpreted") and not triton.INTERPRETED:
        pytest.skip("runs under TRITON_INTERPRET=1; `make test` does both")
