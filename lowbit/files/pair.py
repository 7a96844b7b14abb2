"""Two files that belong together, replaced so that a failure leaves both as they were."""

import contextlib
import os
import uuid

#: Seconds without a write after which a temporary file is one of a process that was killed.
_LEFT_OVER = 3600


def replace_pair(folder: str, data: tuple[str, bytes], settings: tuple[str, bytes]) -> None:
    """Write two files, each ``(name, content)``, beside the old ones, then rename them into place: the data first.

    Settings that are there already stay. Several processes may do so at once: the names of the new files are their own,
    and the last rename counts. What a process left that was killed an hour ago is removed.

    Raises:
        OSError: the files cannot be written. Both are then as they were.
    """
    os.makedirs(folder, exist_ok=True)
    mark = uuid.uuid4().hex
    names = data[0], settings[0]
    final_data, final_settings = (os.path.join(folder, name) for name in names)
    new_data, new_settings, old_data = (
        os.path.join(folder, f".{name}.{mark}{end}.saving")
        for name, end in ((data[0], ""), (settings[0], ""), (data[0], ".old"))
    )
    try:
        _write(new_data, data[1])
        _write(new_settings, settings[1])
        _remove_left_over(folder, names, os.stat(new_settings).st_mtime - _LEFT_OVER)
        if _content(final_settings) == settings[1]:
            os.replace(new_data, final_data)
            return
        is_first = not os.path.exists(final_data)
        with contextlib.suppress(OSError):  # there is none, or the file system has no links
            os.link(final_data, old_data)
            os.utime(old_data)  # so that another process does not take it for one that was left
        os.replace(new_data, final_data)
        try:
            os.replace(new_settings, final_settings)
        except BaseException:
            if os.path.exists(old_data):
                os.replace(old_data, final_data)
            elif is_first:
                os.remove(final_data)
            raise
    finally:
        for path in (new_data, new_settings, old_data):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def _write(path: str, content: bytes) -> None:
    try:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno is not None:  # else the message would become "None"
            error.filename = path  # which writing does not say
        raise


def _content(path: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    return None


def _remove_left_over(folder: str, names: tuple[str, ...], before: float) -> None:
    begins = tuple(f".{name}." for name in names)
    for entry in os.scandir(folder):
        if entry.name.startswith(begins) and entry.name.endswith(".saving"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if entry.stat().st_mtime < before:
                    os.remove(entry.path)
