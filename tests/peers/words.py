"""PEFT's words for lowbit's errors: the tests look for them. The errors themselves, and their types, are lowbit's."""

import functools
import re

#: What lowbit says -> what PEFT says where the same is wrong.
_WORDS = {}


def in_peft(error: Exception) -> Exception:
    """The same error in PEFT's words, or the error itself."""
    for pattern, text in _WORDS.items():
        if found := re.search(pattern, str(error), re.S):
            return type(error)(found.expand(text))
    return error


def peft_errors(function):
    """A function whose errors are in PEFT's words."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            own = in_peft(error)
            if own is error:
                raise
            raise own from error

    return wrapped
