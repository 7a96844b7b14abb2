"""lowbit_lora/optim/managed.py, and the arena on it: managed memory over a stub of CUDA's driver, called by ctypes."""

import contextlib
import ctypes
import gc
import os
import shutil
from pathlib import Path

import pytest
import torch
from codegen.once import ROOT, made_once
from forked import in_child

from lowbit_lora.optim import arena as arena_module
from lowbit_lora.optim import managed
from lowbit_lora.optim.arena import Arena
from lowbit_lora.optim.managed import ManagedMemory

SOURCE = ROOT / "tests" / "cuda" / "stub_driver.cpp"
GPU = torch.device("cuda:1")
HANDLE = 101  # the CUdevice of the stub's second device
STREAM = 0x5EED00005EED  # beyond 32 bits, as addresses are
INVALID_VALUE, OUT_OF_MEMORY = 1, 2


@pytest.fixture(scope="module")
def library() -> Path:
    """The path of the compiled stub."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ found")
    from ptxemu.toolchain import run

    nvcc = shutil.which("nvcc")  # beside it stands the header that the stub's types are compared with
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", *([f"-I{Path(nvcc).parents[1] / 'include'}"] if nvcc else [])]

    def make(folder: Path) -> None:
        run("g++", *flags, SOURCE, "-o", folder / "stub_driver.so")

    return made_once("stub_driver", [*flags, SOURCE], make) / "stub_driver.so"


class Driver:
    """What the stub was called with, and what it is told."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.stub_calls.restype = ctypes.c_char_p
        self.library.stub_set_free.argtypes = [ctypes.c_size_t]
        self.library.stub_reset()

    def calls(self, *names: str) -> list[tuple]:
        """The calls of these functions (of all but those that ask, if none is named), each with its arguments."""
        lines = [line.split() for line in self.library.stub_calls().decode().splitlines()]
        asking = ("cuDeviceGet", "cuDeviceGetAttribute", "cuMemGetInfo_v2", "cuInit", "cuGetErrorString")
        wanted = [line for line in lines if (line[0] in names if names else line[0] not in asking)]
        return [(name, *(int(word) if word.isdigit() else word for word in words)) for name, *words in wanted]

    def fail(self, name: str, code: int) -> None:
        self.library.stub_fail(name.encode(), code)

    def set_free(self, nbytes: int) -> None:
        self.library.stub_set_free(nbytes)


@pytest.fixture
def driver(library):
    gc.collect()  # memory of tests before is freed before the calls are counted
    return Driver(library)


@pytest.fixture
def memory_class(library, driver):
    """ManagedMemory over the stub, whose tensors are the CPU's; ``entered`` lists the contexts made."""

    class StubMemory(ManagedMemory):
        entered: list[int] = []

        def __init__(self, device):
            super().__init__(device, library)

        @contextlib.contextmanager
        def context(self, device):
            self.entered.append(device)
            yield

        def stream(self, device):
            return STREAM + device

        def tensor(self, owner):
            interface = owner.__cuda_array_interface__
            assert interface["typestr"] == "|u1" and interface["version"] == 3
            address, read_only = interface["data"]
            assert not read_only
            memory = (ctypes.c_uint8 * interface["shape"][0]).from_address(address)
            memory.owner = owner  # as torch keeps the object that it was given
            return torch.frombuffer(memory, dtype=torch.uint8)

    return StubMemory


@pytest.fixture
def arena(memory_class, monkeypatch):
    monkeypatch.setattr(arena_module, "ManagedMemory", memory_class)
    return Arena(GPU, paged=True)


def test_arguments_of_the_driver(arena, driver):
    """A wrong argument of a ctypes call reads or frees memory that is not ours."""
    assert driver.calls("cuInit") == [("cuInit", 0)]
    assert driver.calls("cuDeviceGetAttribute") == [("cuDeviceGetAttribute", "pointer", 89, HANDLE)]
    places = arena.take([1000, 24])
    (segment,) = arena.segments
    address = segment.data_ptr()
    assert driver.calls() == [
        ("cuMemAllocManaged", 1280, 1),
        ("cuMemAdvise", address, 1280, 3, HANDLE),
        ("cuMemAdvise", address, 1280, 5, HANDLE),
    ]
    assert address > 1 << 32 and address % 256 == 0
    assert places == [(0, 0), (0, 1024)] and not segment.any()
    assert arena.view(places[1]).data_ptr() == address + 1024
    assert set(arena._managed.entered) == {1}


def test_prefetch_goes_as_far_as_memory_is_free(arena, driver):
    """More would push weights and gradients of the same step out of the GPU."""
    arena.prefetch()
    arena.take([1 << 20])
    arena.take([1 << 20])
    arena.take([256])
    first, second, third = (segment.data_ptr() for segment in arena.segments)
    whole = [("cuMemPrefetchAsync", address, 1 << 20, HANDLE, STREAM + 1) for address in (first, second)]
    arena.prefetch()
    assert driver.calls("cuMemPrefetchAsync") == [*whole, ("cuMemPrefetchAsync", third, 256, HANDLE, STREAM + 1)]
    driver.set_free((1 << 20) + 4096)
    arena.prefetch()
    assert driver.calls("cuMemPrefetchAsync")[3:] == [whole[0], (*whole[1][:2], 4096, *whole[1][3:])]
    driver.set_free(0)
    arena.prefetch()
    assert len(driver.calls("cuMemPrefetchAsync")) == 5


def test_memory_is_freed_with_its_last_tensor(arena, driver):
    """Too early, and a kernel writes memory of something else; too late, and nothing else fits the GPU."""
    arena.take([256])
    view = arena.view(arena.take([256])[0])
    first, second = (segment.data_ptr() for segment in arena.segments)
    arena.close()
    gc.collect()
    assert driver.calls("cuCtxSynchronize", "cuMemFree_v2") == [("cuCtxSynchronize",), ("cuMemFree_v2", first)]
    view.fill_(1)
    del view
    gc.collect()
    assert driver.calls("cuCtxSynchronize", "cuMemFree_v2")[2:] == [("cuCtxSynchronize",), ("cuMemFree_v2", second)]


def test_no_more_than_there_is(arena, driver, monkeypatch):
    """Managed memory that neither the GPU nor the host has hangs the machine or has the process killed."""
    monkeypatch.setattr(managed, "host_memory", lambda: 3000)
    driver.set_free(5000)
    (held,) = arena.take([7936])
    driver.set_free(0)
    with pytest.raises(MemoryError, match="3,072 bytes of paged memory.* 0 on cuda:1 and 3,000 on the host: keep"):
        arena.take([3000])
    assert len(driver.calls("cuMemAllocManaged")) == len(arena.segments) == 1
    assert arena.nbytes == arena.used == 7936 and not arena.view(held).any()


def test_the_driver_has_no_memory(arena, driver):
    """Other processes may have taken it since it was counted: the same error."""
    driver.fail("cuMemAllocManaged", OUT_OF_MEMORY)
    with pytest.raises(MemoryError, match=r"1,024 bytes of paged memory.* 1,073,741,824 on cuda:1"):
        arena.take([1024])
    assert arena.segments == [] and arena.used == 0


@pytest.mark.parametrize("name", ["cuMemAllocManaged", "cuMemAdvise", "cuMemGetInfo_v2", "cuDeviceGet"])
def test_a_call_that_fails_while_memory_is_taken(arena, driver, name):
    """An error that is not looked at becomes wrong states; memory of an arena that could not grow must not be lost."""
    driver.fail(name, INVALID_VALUE)
    with pytest.raises(RuntimeError, match=f"{name}: CUDA error 1: the stub was told to fail"):
        arena.take([1024])
    assert arena.segments == [] and arena.used == 0
    gc.collect()
    assert len(driver.calls("cuMemFree_v2")) == (name in ("cuMemAdvise", "cuDeviceGet"))  # which come after it
    driver.library.stub_reset()
    assert arena.take([1024]) == [(0, 0)]


def test_other_calls_that_fail(arena, memory_class, driver):
    """The same for a prefetch, and where there is no GPU of that index."""
    arena.take([256])
    driver.fail("cuMemPrefetchAsync", INVALID_VALUE)
    with pytest.raises(RuntimeError, match="cuMemPrefetchAsync: CUDA error 1"):
        arena.prefetch()
    driver.fail("cuInit", 100)
    with pytest.raises(RuntimeError, match="cuInit: CUDA error 100"):
        memory_class(1)


def test_gpus_that_cannot_page(memory_class, driver):
    """Under Windows managed memory is no larger than the GPU's: its users must hear it when the optimizer is made."""
    driver.library.stub_set_pages(0)
    with pytest.raises(ValueError, match="cuda:1 is not one"):
        memory_class(1)


def test_no_driver(tmp_path):
    """An error of the loader alone would not say what asked for the driver."""
    with pytest.raises(OSError, match="paged: .* cannot be loaded: .*libnone.so"):
        ManagedMemory(0, tmp_path / "libnone.so")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_forked_child(arena, driver):
    """A child, which has no GPU, must neither free its parent's states nor write them."""
    arena.take([256])

    def child():
        with pytest.raises(RuntimeError, match="shares with its parent"):
            arena.check_process()
        arena.close()
        gc.collect()
        return 77 if driver.calls("cuMemFree_v2") == [] else 1

    assert in_child(child) == 77
    arena.check_process()


def test_host_memory():
    """The bound on managed memory would be no bound if it were read wrongly."""
    available = managed.host_memory()
    if available is None:
        pytest.skip("no /proc/meminfo")
    assert 1 << 20 < available <= managed.host_memory(swap=True) + (1 << 30)
    assert available <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip, reason="needs a GPU by NVIDIA")
def test_on_a_gpu():
    """The stub cannot tell that the driver takes the calls, nor that torch does the addresses."""
    arena = Arena(torch.device("cuda"), paged=True)
    (place,) = arena.take([1 << 20])
    view = arena.view(place)
    assert view.device.type == "cuda" and view.data_ptr() % 256 == 0 and not view.any()
    view.fill_(3)
    arena.prefetch()
    assert (view == 3).all()
    arena.close()
    assert (view == 3).all()
