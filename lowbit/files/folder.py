"""A folder whose files are written beside it first, so that a failure leaves the old ones."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

from safetensors import SafetensorError


@contextlib.contextmanager
def written_beside(folder: str | os.PathLike, stale: Callable[[str], bool] = lambda name: False) -> Iterator[str]:
    """Context with a new folder inside ``folder``; its files are renamed into ``folder`` in the end.

    Args:
        stale: whether a file of such a name, which was there before and has no successor, is removed.

    Raises:
        OSError: the files could not be written, as on a full disk. Those that were there are as before.
    """
    folder = os.fspath(folder)
    os.makedirs(folder, exist_ok=True)
    beside = tempfile.mkdtemp(prefix=".", suffix=".saving", dir=folder)
    try:
        try:
            yield beside
            written = sorted(os.listdir(beside))
            for name in written:
                _flush(os.path.join(beside, name))
        except (OSError, SafetensorError) as error:
            reason = error.__cause__ or error  # what stopped a folder inside
            raise OSError(f"{folder}: could not be written, and its files are as they were ({reason})") from reason
        for name in written:
            os.replace(os.path.join(beside, name), os.path.join(folder, name))
        if any(map(stale, written)):
            for name in os.listdir(folder):
                if stale(name) and name not in written:
                    os.remove(os.path.join(folder, name))
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _flush(path: str) -> None:
    """Have the file on the disk; some file systems tell only now that they are full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
