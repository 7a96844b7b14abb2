"""lowbit_lora/optim/arena.py: the memory of an optimizer's states, plain or in a file.

tests/test_optim_managed.py has that of a GPU.
"""

import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from forked import in_child
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from small_disk import small_disk

from lowbit_lora.optim import arena as module
from lowbit_lora.optim.arena import Arena

CPU = torch.device("cpu")
SIZES = [0, 1, 255, 256, 257, 4097]


@pytest.fixture(params=["plain", "file"])
def folder(request, tmp_path):
    """None, or a folder for the file."""
    return None if request.param == "plain" else tmp_path


def mapped(folder) -> int:
    """How many files of a folder this process has mapped."""
    with open("/proc/self/maps") as maps:
        return sum(f"{folder}{os.sep}" in line for line in maps)


needs_maps = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc")


def test_regions(folder):
    """Kernels that read several values at once need aligned states, all in one segment, and zeros to begin with."""
    arena = Arena(CPU, folder=folder)
    assert arena.segments == [] and arena.nbytes == arena.used == 0
    assert arena.take([]) == [] and arena.segments == []
    places = arena.take(SIZES)
    (segment,) = arena.segments
    assert places == [(0, 0), (0, 256), (0, 512), (0, 768), (0, 1024), (0, 1536)]
    assert arena.used == arena.nbytes == segment.numel() == 1536 + 17 * 256
    assert segment.dtype == torch.uint8 and segment.device == CPU and segment.is_contiguous()
    assert segment.data_ptr() % (256 if folder else 64) == 0
    for place, size in zip(places, SIZES, strict=True):
        view = arena.view(place)
        assert view.shape == (size,) and not view.any()
        assert view.data_ptr() == segment.data_ptr() + place[1] or not size
        assert view.untyped_storage().data_ptr() == segment.data_ptr()


def test_growth_leaves_views_valid(folder):
    """A parameter that is added later must not cost the others their states."""
    arena = Arena(CPU, folder=folder)
    (first,) = arena.take([1000])
    view = arena.view(first).view(torch.float32)
    view.copy_(torch.arange(250.0))
    address = arena.segments[0].data_ptr()
    others = arena.take([1 << 20, 5])
    assert others == [(1, 0), (1, 1 << 20)]
    assert arena.segments[0].data_ptr() == address
    arena.view(others[0]).fill_(255)
    assert torch.equal(arena.view(first).view(torch.float32), torch.arange(250.0))
    assert torch.equal(view, torch.arange(250.0))


def test_reuse(folder):
    """Adapters that come and go must not make the memory grow, nor get the states of those before."""
    arena = Arena(CPU, folder=folder)
    first, second, third, fourth = arena.take([256, 300, 256, 256])
    for segment in arena.segments:
        segment.fill_(7)
    arena.give_back([third, first])
    assert arena.used == 512 + 256
    arena.give_back([second])  # merges with both neighbours
    assert arena.take([1024]) == [first]
    assert arena.nbytes == 1280
    assert not arena.view(first).any()
    assert (arena.view(fourth) == 7).all()
    arena.give_back([first])
    # What fits no free place goes into a segment of its own; the others are reused.
    assert arena.take([512, 1000, 1]) == [(0, 0), (1, 0), (0, 512)]
    assert arena.take([256]) == [(0, 768)]
    assert arena.used == arena.nbytes == 1280 + 1024


def test_places_that_are_not_taken():
    """A place that is given back twice would later belong to two parameters."""
    arena = Arena(CPU)
    first, second = arena.take([10, 10])
    arena.give_back([first])
    for wrong in ([first], [second, first], [second, second], [(0, 1)], [(1, 0)]):
        with pytest.raises(KeyError):
            arena.give_back(wrong)
    for wrong in (first, (0, 1), (1, 0)):
        with pytest.raises(KeyError):
            arena.view(wrong)
    assert arena.used == 256
    with pytest.raises(ValueError, match="at least 0"):
        arena.take([-1])
    assert arena.take([1]) == [first]


class Regions(RuleBasedStateMachine):
    """What takes and gives do, against a dictionary of what each region holds."""

    places = Bundle("places")

    @initialize()
    def make(self):
        self.arena, self.held, self.views, self.written = Arena(CPU), {}, {}, 0

    @rule(target=places, size=st.integers(0, 1100))
    def take_one(self, size):
        (place,) = self.arena.take([size])
        self.hold(place, size)
        return place

    @rule(target=places, sizes=st.lists(st.integers(0, 600), max_size=6), kept=st.integers(0, 6))
    def take_several_and_give_some_back(self, sizes, kept):
        places = self.arena.take(sizes)
        for place, size in zip(places, sizes, strict=True):
            self.hold(place, size)
        for place in places[kept:]:
            del self.held[place], self.views[place]
        self.arena.give_back(iter(places[kept:]))
        return multiple(*places[:kept])

    @rule(place=consumes(places))
    def give_back(self, place):
        del self.held[place], self.views[place]
        self.arena.give_back([place])

    def hold(self, place, size):
        assert place not in self.held and place[1] % 256 == 0
        view = self.arena.view(place)
        assert view.numel() == size and not view.any()
        self.written = self.written % 255 + 1
        view.fill_(self.written)
        self.held[place], self.views[place] = (size, self.written), view

    @invariant()
    def regions_are_apart_and_keep_what_they_hold(self):
        for place, (size, value) in self.held.items():
            for view in (self.views[place], self.arena.view(place)):
                assert view.numel() == size and (view == value).all()
        ends = {}
        for (segment, offset), (size, _) in sorted(self.held.items()):
            assert offset >= ends.get(segment, 0)
            ends[segment] = offset + max(size, 1)
            assert ends[segment] <= self.arena.segments[segment].numel()
        assert self.arena.used == sum(-(-max(size, 1) // 256) * 256 for size, _ in self.held.values())
        assert self.arena.nbytes == self.arena.used + self.free_bytes()

    def free_bytes(self):
        """Of the free places, which are apart and of which none borders on another."""
        free = self.arena._free
        for (segment, offset, nbytes), following in zip(free, free[1:], strict=False):
            assert nbytes > 0 and (segment, offset + nbytes) < following[:2]
        return sum(nbytes for _, _, nbytes in free)


class TestRegions(Regions.TestCase):
    """Whatever order adapters come and go in: states of two of them in one place would train both wrongly."""

    settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.fixture
def full_disk(monkeypatch):
    """A function after which files cannot be reserved, for want of space."""

    def reserve(file, offset, nbytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "posix_fallocate", reserve, raising=False)


def assert_take_fails_and_changes_nothing(arena, sizes, error, match):
    held, middle, end = arena.take([300, 256, 10])
    arena.view(held).fill_(3)
    arena.give_back([middle])
    before = arena.nbytes, arena.used, list(arena.segments)
    with pytest.raises(error, match=match) as raised:
        arena.take([256, *sizes])
    assert (arena.nbytes, arena.used) == before[:2]
    assert all(segment is old for segment, old in zip(arena.segments, before[2], strict=True))
    assert (arena.view(held) == 3).all()
    assert arena.take([256]) == [middle]
    arena.give_back([held, middle, end])
    assert arena.take([1024]) == [held]
    return raised.value


def test_a_disk_that_is_full_already(tmp_path):
    """Who trains on a small disk must hear it before the first step, and how much is missing."""
    size = 1 << 60
    error = assert_take_fails_and_changes_nothing(
        Arena(CPU, folder=tmp_path), [100, size], OSError, f"{size + 256:,} bytes are wanted.* there are [0-9,]+ in"
    )
    assert error.errno == errno.ENOSPC and error.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_others_fill_meanwhile(tmp_path, full_disk):
    """Without the check of the system itself a step would end in a bus error, hours later."""
    arena = Arena(CPU, folder=tmp_path)
    arena.take([256])
    full_disk()
    arena.give_back([(0, 0)])
    (place,) = arena.take([100])
    arena.view(place).fill_(1)
    with pytest.raises(OSError, match="No space left.*1,024 bytes are wanted.*disk with more") as raised:
        arena.take([1000])
    assert raised.value.errno == errno.ENOSPC
    assert arena.nbytes == arena.used == 256 and len(arena.segments) == 1
    assert (arena.view(place) == 1).all()
    if os.path.exists("/proc/self/maps"):
        assert mapped(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk(tmp_path):
    """The same on a disk, where the space is taken and not only asked for."""
    with small_disk(tmp_path / "disk", "256k") as folder:
        arena = Arena(CPU, folder=folder)
        arena.view(arena.take([128 << 10])[0]).fill_(1)
        assert_take_fails_and_changes_nothing(arena, [200 << 10], OSError, "204,800 bytes are wanted.* 1[0-9,]+ in")
        arena.close()
        gc.collect()  # the error's traceback knows the arena's segments
        Arena(CPU, folder=folder).take([200 << 10])  # the space is back


def test_a_limit_on_the_size_of_files(tmp_path):
    """A quota, which free space says nothing about, must be an error as well."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    arena = Arena(CPU, folder=tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        error = assert_take_fails_and_changes_nothing(arena, [20_000], OSError, "too large: 20,224 bytes are wanted")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.errno == errno.EFBIG


@pytest.mark.parametrize("errors", [None, errno.EOPNOTSUPP])
def test_file_systems_that_reserve_nothing(tmp_path, monkeypatch, errors):
    """On such disks, and on macOS, the states must work all the same, in space that was there."""
    reserved = []

    def reserve(file, offset, nbytes):
        raise OSError(errors, "not supported")

    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    if errors is not None:
        monkeypatch.setattr(os, "posix_fallocate", reserve, raising=False)
    monkeypatch.setattr(
        os, "write", lambda file, data, write=os.write: reserved.append(write(file, data)) or reserved[-1]
    )
    arena = Arena(CPU, folder=tmp_path)
    (place,) = arena.take([(2 << 20) + 5])
    assert sum(reserved) == arena.nbytes
    assert not arena.view(place).any()
    arena.view(place).fill_(1)


def test_memory_that_is_not_there():
    """The system would promise memory that it does not have, and kill the process once it is written."""
    size = 1 << 60
    assert_take_fails_and_changes_nothing(
        Arena(CPU), [size], MemoryError, f"{size:,} bytes of memory are wanted.* there are .*page them to a folder"
    )


def test_a_gpu_that_is_full(monkeypatch):
    """torch's own error would not say that states can be smaller."""

    def zeros(*size, **options):
        raise torch.OutOfMemoryError("Tried to allocate 1 KiB, of which 0 bytes are free")

    arena = Arena(torch.device("meta"))
    arena.take([10])
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(torch.OutOfMemoryError, match="1,024 bytes on meta are wanted.* 8 bits.* 0 bytes are free"):
        arena.take([1000])
    assert arena.nbytes == arena.used == 256


def run_in_process(program: str, *args) -> str:
    """What a program in a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not limit data so")
def test_a_limit_on_memory(tmp_path):
    """A folder is what helps where memory is short: its pages must not count, and the error must say so."""
    program = """
        import re, resource, sys
        import torch
        from lowbit_lora.optim.arena import Arena

        size = 256 << 20
        with open("/proc/self/status") as status:
            data = 1024 * int(re.search("VmData:[^0-9]*([0-9]+)", status.read())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (data + size // 2,) * 2)
        arena = Arena(torch.device("cpu"))
        held = arena.take([1000])
        try:
            arena.take([size])
        except MemoryError as error:
            print(error)
        assert arena.nbytes == arena.used == 1024 and not arena.view(held[0]).any()
        paged = Arena(torch.device("cpu"), folder=sys.argv[1])
        (place,) = paged.take([size])
        paged.view(place).fill_(1)
        assert paged.view(place)[::4096].sum() == size // 4096
    """
    assert "268,435,456 bytes of memory are wanted" in run_in_process(program, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@needs_maps
def test_memory_is_freed_with_its_last_tensor(tmp_path):
    """A model that is gone must not keep its disk space, nor may a tensor that is left lose its memory."""
    arena = Arena(CPU, folder=tmp_path)
    (place,) = arena.take([4096])
    view = arena.view(place).view(torch.float32)
    view.fill_(3)
    arena.take([4096])
    assert mapped(tmp_path) == 2
    arena.close()
    gc.collect()
    assert mapped(tmp_path) == 1  # the segment that nothing uses is gone
    assert (view == 3).all()
    assert arena.nbytes == arena.used == 0 and arena.segments == []
    with pytest.raises(KeyError):
        arena.view(place)
    arena.close()
    del view
    gc.collect()
    assert mapped(tmp_path) == 0

    arena = Arena(CPU, folder=tmp_path)
    view = arena.view(arena.take([4096])[0])
    del arena
    gc.collect()
    assert mapped(tmp_path) == 1
    view.fill_(1)
    del view
    gc.collect()
    assert mapped(tmp_path) == 0


def test_no_file_is_left(tmp_path):
    """Jobs that are killed must not fill the disk with files that nobody knows."""
    program = """
        import os, signal, sys
        import torch
        from lowbit_lora.optim.arena import Arena

        arena = Arena(torch.device("cpu"), folder=sys.argv[1])
        arena.view(arena.take([1 << 20])[0]).fill_(1)
        print(os.listdir(sys.argv[1]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and done.stdout == "[]\n", done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_forked_child(folder):
    """Two processes that write one file would spoil the states of both, without an error."""
    arena, later = Arena(CPU, folder=folder), Arena(CPU, folder=folder)
    places = arena.take([256, 256])
    arena.view(places[0]).fill_(1)
    arena.give_back(places[1:])
    arena.check_process()

    def child():
        later.take([256])  # whose memory is the child's own
        later.check_process()
        for call in (arena.check_process, lambda: arena.take([256])):
            try:
                call()
            except RuntimeError as error:
                assert folder is not None and str(os.getppid()) in str(error)
            else:
                assert folder is None
        return 77

    assert in_child(child) == 77
    arena.check_process()
    assert (arena.view(places[0]) == 1).all()


def test_devices_and_folders_that_cannot_be(tmp_path, monkeypatch):
    """A mistake in a script must be told by its name when the optimizer is made, not in its first step."""
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="folder.*missing"):
        Arena(CPU, folder=tmp_path / "missing")
    with pytest.raises(NotADirectoryError, match="folder.*file"):
        Arena(CPU, folder=file)
    with pytest.raises(ValueError, match="folder: expected None for states on cuda:0"):
        Arena(torch.device("cuda:0"), paged=True, folder=tmp_path)
    for device in ("xpu:0", "mps", "meta"):
        with pytest.raises(ValueError, match="paged: expected"):
            Arena(torch.device(device), paged=True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ValueError, match="paged: expected.*ROCm"):
        Arena(torch.device("cuda:0"), paged=True)
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """The same for a folder that is read-only."""

    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/tmp1234")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match="folder: .*Permission denied") as raised:
        Arena(CPU, folder=tmp_path)
    assert raised.value.filename == str(tmp_path)


def test_folder_as_a_relative_path(tmp_path, monkeypatch):
    """A script that changes its folder must not lose the one of the states."""
    (tmp_path / "states").mkdir()
    monkeypatch.chdir(tmp_path)
    arena = Arena(CPU, folder="states")
    monkeypatch.chdir("/")
    assert arena.take([1]) == [(0, 0)]


def test_paged_on_the_cpu_changes_nothing(folder):
    """A script for both devices sets paged once."""
    arena = Arena(CPU, paged=True, folder=folder)
    arena.take([10])
    arena.prefetch()
    assert arena.folder == (None if folder is None else str(folder))
    assert arena.nbytes == 256
