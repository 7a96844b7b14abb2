"""Memory that was freed, and that the C library keeps."""

import ctypes
import sys


def return_memory() -> None:
    """Give what was freed back to the system.

    glibc keeps blocks of up to 32 MB, and the small ones of a quantized weight make them useless for the next dense
    one: a model that is cast as it is loaded took as much memory as the dense one, without this.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
