"""Makes things that take long only once: in one of several test processes, and only if their inputs changed."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "kept"


def digest(inputs: Iterable[bytes | str | Path]) -> str:
    """A hash of texts, bytes and the contents of files, in this order."""
    hashed = hashlib.sha256()
    for value in inputs:
        contents = (
            value.read_bytes() if isinstance(value, Path) else value.encode() if isinstance(value, str) else value
        )
        hashed.update(hashlib.sha256(contents).digest())
    return hashed.hexdigest()


def made_once(name: str, inputs: Iterable[bytes | str | Path], make: Callable[[Path], object]) -> Path:
    """The folder that ``make(folder)`` filled, in this process or in another one with the same inputs.

    Processes that ask for it meanwhile wait. If ``make`` raises, nothing is kept. A folder made of other inputs is
    deleted, so that only the newest is kept.
    """
    versions = KEPT / name
    versions.mkdir(parents=True, exist_ok=True)
    folder = versions / digest(inputs)[:16]
    with FileLock(versions / "lock"):
        if not folder.exists():
            for older in versions.iterdir():
                if older.is_dir():
                    shutil.rmtree(older)
            unfinished = Path(tempfile.mkdtemp(dir=versions))
            make(unfinished)
            unfinished.rename(folder)
    return folder
