"""A file that is written beside its old version and takes its place in the end."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replaced(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Context with a new file, which is renamed to ``path`` in the end.

    Raises:
        OSError: it could not be written. On this and any other error the old file is as before.
    """
    beside = f"{os.fspath(path)}.{uuid.uuid4().hex}.saving"
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)
