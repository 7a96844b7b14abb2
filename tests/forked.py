"""Forks for tests."""

import os
import warnings
from collections.abc import Callable


def start(function: Callable[[], int]) -> int:
    """The process of a forked child, whose exit status is what the function returns, or 1 where it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork where there are threads: the child uses none
        child = os.fork()
    if not child:
        status = 1
        try:
            status = function()
        finally:
            os._exit(status)
    return child


def in_child(function: Callable[[], int]) -> int:
    """The exit status of a forked child, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(start(function), 0)[1])
