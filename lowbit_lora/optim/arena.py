"""The memory in which the states of an optimizer live: on a device, paged by the driver, or in a file."""

import bisect
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence

import torch

from .managed import ManagedMemory, host_memory

_ALIGNMENT = 256
#: Errors by which a file system says that it cannot reserve space but by writing.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

Place = tuple[int, int]  # segment, offset


class Arena:
    """All states of all parameters of one device, as regions of few large segments of memory.

    Regions never move, so that views of them stay valid. Memory is freed once the arena and all tensors on it are gone.

    Args:
        device: of the states.
        paged: on a GPU by NVIDIA take managed memory, whose pages the driver moves to the host where the GPU is full.
            That has only run against a stub of the driver so far. On the CPU it changes nothing.
        folder: on the CPU, where a file without a name holds the states. The system writes pages back to it when memory
            is short. None: plain memory.

    Raises:
        ValueError: the device has no such memory.
        OSError: no file can be made in ``folder``; there is no driver that pages.
    """

    def __init__(self, device: torch.device, *, paged: bool = False, folder: str | os.PathLike | None = None):
        device = torch.device(device)
        if folder is not None:
            _check_folder(device, folder)
        if paged and (device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.version.hip)):
            kind = "ROCm" if device.type == "cuda" else device.type
            raise ValueError(
                f"paged: expected a device of CUDA or the CPU, got one of {kind}, whose memory has no pages"
            )
        if device.type != "cpu" and device.index is None:
            device = torch.empty(0, device=device).device
        self.device, self.folder = device, None if folder is None else os.path.abspath(folder)
        #: uint8 [bytes] each, contiguous, at an address that 256 divides (64 in plain memory of the CPU).
        self.segments: list[torch.Tensor] = []
        self._managed = ManagedMemory(device.index) if paged and device.type == "cuda" else None
        self._regions: dict[Place, int] = {}  # the bytes asked for
        self._free: list[tuple[int, int, int]] = []  # (segment, offset, bytes), sorted
        self._process = os.getpid()

    @property
    def nbytes(self) -> int:
        """The bytes of all segments."""
        return sum(segment.numel() for segment in self.segments)

    @property
    def used(self) -> int:
        """The bytes of all regions, each with what aligns the next one."""
        return sum(map(_reserved, self._regions.values()))

    def take(self, sizes: Sequence[int]) -> list[Place]:
        """Regions of so many zero bytes each: ``(segment, offset)``, whose offset 256 divides.

        A region is put into the first free place that it fits. Those that fit none share one new segment, in order.

        Raises:
            MemoryError, OSError: memory, or the folder's disk, does not suffice. Then nothing has changed.
        """
        self.check_process()
        if any(size < 0 for size in sizes):
            raise ValueError(f"sizes: expected numbers of at least 0, got {list(sizes)}")
        free, places, reused, new_bytes = list(self._free), [], [], 0
        for size in sizes:
            place = _first_fit(free, _reserved(size))
            if place is None:
                place = len(self.segments), new_bytes
                new_bytes += _reserved(size)
            else:
                reused.append((place, size))
            places.append(place)
        if new_bytes:
            segment = self._new_segment(new_bytes)
            if not self.segments:
                self._process = os.getpid()
            self.segments.append(segment)
        self._free = free
        self._regions.update(zip(places, sizes, strict=True))
        for place, _ in reused:
            self.view(place).zero_()
        return places

    def give_back(self, places: Iterable[Place]) -> None:
        """Let later regions have the memory of these; a KeyError, which changes nothing, unless each was taken."""
        places = list(places)
        if not self._regions.keys() >= set(places) or len(set(places)) < len(places):
            raise KeyError(f"expected places that are taken, each once, got {places}")
        for segment, offset in places:
            self._insert_free(segment, offset, _reserved(self._regions.pop((segment, offset))))

    def view(self, place: Place) -> torch.Tensor:
        """uint8 [bytes] on a region; a KeyError if there is none."""
        size, (segment, offset) = self._regions[place], place
        return self.segments[segment][offset : offset + size]

    def prefetch(self) -> None:
        """Start to move pages to the GPU, on its current stream, as many as it has memory free for."""
        if self._managed is None or not self.segments:
            return
        index = self.device.index
        free, stream = self._managed.free_bytes(index), self._managed.stream(index)
        for segment in self.segments:
            nbytes = min(segment.numel(), free)
            if nbytes:
                self._managed.prefetch(segment.data_ptr(), nbytes, index, stream)
            free -= nbytes

    def check_process(self) -> None:
        """RuntimeError in a forked child of the process whose memory this is, unless the child has its own copy."""
        is_shared = self.folder is not None or self._managed is not None
        if is_shared and self.segments and os.getpid() != self._process:
            raise RuntimeError(
                f"the states of this optimizer are memory that process {os.getpid()} shares with its parent "
                f"{self._process}, in which both would write: make the optimizer in the process that takes its steps"
            )

    def close(self) -> None:
        """Forget all regions. Their memory is freed once no tensor is on it."""
        self.segments.clear()
        self._regions.clear()
        self._free.clear()

    def _insert_free(self, segment: int, offset: int, nbytes: int) -> None:
        """Add a free place, merged with its neighbours."""
        at = bisect.bisect(self._free, (segment, offset))
        start = at
        if at > 0 and self._free[at - 1][0] == segment and sum(self._free[at - 1][1:]) == offset:
            start, offset, nbytes = at - 1, self._free[at - 1][1], self._free[at - 1][2] + nbytes
        end = at
        if at < len(self._free) and self._free[at][:2] == (segment, offset + nbytes):
            end, nbytes = at + 1, nbytes + self._free[at][2]
        self._free[start:end] = [(segment, offset, nbytes)]

    def _new_segment(self, nbytes: int) -> torch.Tensor:
        if self._managed is not None:
            return self._managed.zeros(nbytes, self.device.index)
        if self.folder is not None:
            return _in_file(nbytes, self.folder)
        return _in_host_memory(nbytes) if self.device.type == "cpu" else _in_device_memory(nbytes, self.device)


def _reserved(size: int) -> int:
    """What a region takes of its segment: at least one byte, so that its place is its own."""
    return -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT


def _first_fit(free: list[tuple[int, int, int]], nbytes: int) -> Place | None:
    """Take so many bytes off the first place in ``free`` that has them."""
    for i, (segment, offset, available) in enumerate(free):
        if available >= nbytes:
            rest = (segment, offset + nbytes, available - nbytes)
            free[i : i + 1] = [rest] if rest[2] else []
            return segment, offset
    return None


def _check_folder(device: torch.device, folder: str | os.PathLike) -> None:
    if device.type != "cpu":
        raise ValueError(
            f"folder: expected None for states on {device}, got {os.fspath(folder)!r}; it is for the CPU's"
        )
    if not os.path.exists(folder):
        raise FileNotFoundError(errno.ENOENT, "folder: expected a folder that exists", os.fspath(folder))
    if not os.path.isdir(folder):
        raise NotADirectoryError(errno.ENOTDIR, "folder: expected a folder", os.fspath(folder))
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        text = f"folder: expected one in which files can be made ({error.strerror})"
        raise OSError(error.errno, text, os.fspath(folder)) from None


def _in_host_memory(nbytes: int) -> torch.Tensor:
    available = host_memory(swap=True)
    message = (
        f"{nbytes:,} bytes of memory are wanted for states of an optimizer, and there are "
        f"{'an unknown number' if available is None else f'{available:,}'}, limits of the process aside: keep states "
        f"in 8 bits, or page them to a folder"
    )
    if available is not None and nbytes > available:  # the system would grant it, and kill the process in a later step
        raise MemoryError(message)
    try:
        return torch.zeros(nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise MemoryError(message) from error


def _in_device_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{nbytes:,} bytes on {device} are wanted for states of an optimizer: keep states in 8 bits, or page them. "
            f"{error}"  # which says how many there are
        ) from error


def _in_file(nbytes: int, folder: str) -> torch.Tensor:
    """Zeros in a mapped file, which is gone with the last tensor on it. It has no name, which a kill could leave."""
    available = shutil.disk_usage(folder).free
    try:
        if nbytes > available:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), nbytes)
            mapped = mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        text = (
            f"{error.strerror}: {nbytes:,} bytes are wanted for states of an optimizer, and there are {available:,} in "
            f"the folder: choose one on a disk with more, or keep states in 8 bits"
        )
        raise OSError(error.errno, text, folder) from error
    return torch.frombuffer(mapped, dtype=torch.uint8)


def _reserve(file: int, nbytes: int) -> None:
    """Make a file so long, on a disk that has the space: else a write to the mapped file could end the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(file, 0, nbytes)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise
    zeros = bytes(1 << 20)
    while nbytes:
        nbytes -= os.write(file, zeros[:nbytes])
    return None
