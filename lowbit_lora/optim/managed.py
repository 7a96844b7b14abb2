"""CUDA's managed memory: memory of a GPU whose pages the driver moves to the host and back, so that it may be larger.

So far this has run against a stub of the driver only (tests/cuda/stub_driver.cpp), not on a GPU.
"""

import contextlib
import ctypes
import os
import weakref
from collections.abc import Iterator

import torch

_ATTACH_GLOBAL = 1  # any stream of any GPU may use the memory
_SET_PREFERRED_LOCATION, _SET_ACCESSED_BY = 3, 5
_CONCURRENT_MANAGED_ACCESS = 89
_OUT_OF_MEMORY = 2

_POINTER, _BYTES, _DEVICE = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int
#: The driver's functions, each of which returns a CUresult. cuMemAdvise and cuMemPrefetchAsync are those of before CUDA
#: 12.2, which take a CUdevice; every later driver has them as well.
_FUNCTIONS = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (ctypes.POINTER(_DEVICE), ctypes.c_int),
    "cuDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, _DEVICE),
    "cuMemGetInfo_v2": (ctypes.POINTER(_BYTES), ctypes.POINTER(_BYTES)),
    "cuMemAllocManaged": (ctypes.POINTER(_POINTER), _BYTES, ctypes.c_uint),
    "cuMemAdvise": (_POINTER, _BYTES, ctypes.c_int, _DEVICE),
    "cuMemPrefetchAsync": (_POINTER, _BYTES, _DEVICE, ctypes.c_void_p),
    "cuCtxSynchronize": (),
    "cuMemFree_v2": (_POINTER,),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


def host_memory(*, swap: bool = False) -> int | None:
    """How many bytes the host can still give to programs, ``swap`` included or not; None where no file says so."""
    try:
        with open("/proc/meminfo") as file:
            kibibytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in file)}
    except OSError:
        return None
    return 1024 * (kibibytes["MemAvailable"] + (kibibytes["SwapFree"] if swap else 0))


class ManagedMemory:
    """Allocates managed memory through the driver. ``device`` is the index of a GPU in torch, as in all methods.

    Raises:
        OSError: there is no such driver.
        ValueError: memory of this GPU cannot be paged.
        RuntimeError: a call of the driver failed; the error names it.
    """

    def __init__(self, device: int, library: str | os.PathLike = "libcuda.so.1"):
        try:
            self._driver = ctypes.CDLL(os.fspath(library))
        except OSError as error:
            raise OSError(
                f"paged: memory of a GPU is paged by NVIDIA's driver, which cannot be loaded: {error}"
            ) from None
        for name, argtypes in _FUNCTIONS.items():
            function = getattr(self._driver, name)
            function.argtypes, function.restype = argtypes, ctypes.c_int
        self._call("cuInit", 0)
        pages = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(pages), _CONCURRENT_MANAGED_ACCESS, self._cu_device(device))
        if not pages.value:
            raise ValueError(f"paged: expected a GPU and a system that page the GPU's memory; cuda:{device} is not one")

    def allocate(self, nbytes: int, device: int) -> int:
        """The address of so many bytes, whose values are anything.

        Raises:
            MemoryError: the GPU and the host together do not have that much.
        """
        free, host = self.free_bytes(device), host_memory() or 0
        message = (
            f"{nbytes:,} bytes of paged memory are wanted for states of an optimizer, and there are {free:,} on "
            f"cuda:{device} and {host:,} on the host: keep states in 8 bits, or train fewer parameters"
        )
        if nbytes > free + host:
            raise MemoryError(message)
        address = _POINTER()
        with self.context(device):
            code = self._driver.cuMemAllocManaged(ctypes.byref(address), nbytes, _ATTACH_GLOBAL)
        if code == _OUT_OF_MEMORY:
            raise MemoryError(message)
        self._check("cuMemAllocManaged", code)
        return address.value

    def free(self, address: int, device: int) -> None:
        """Free what ``allocate`` gave, once the GPU's work is done, which may use it."""
        with self.context(device):
            self._call("cuCtxSynchronize")
            self._call("cuMemFree_v2", address)

    def prefer(self, address: int, nbytes: int, device: int) -> None:
        """Let pages be on the GPU where they can, and the GPU reach the others without a fault."""
        with self.context(device):
            for advice in (_SET_PREFERRED_LOCATION, _SET_ACCESSED_BY):
                self._call("cuMemAdvise", address, nbytes, advice, self._cu_device(device))

    def prefetch(self, address: int, nbytes: int, device: int, stream: int) -> None:
        """Move pages to the GPU, in order with the work of a stream (its handle)."""
        with self.context(device):
            self._call("cuMemPrefetchAsync", address, nbytes, self._cu_device(device), stream)

    def free_bytes(self, device: int) -> int:
        """How much memory the GPU has free."""
        free, total = _BYTES(), _BYTES()
        with self.context(device):
            self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def zeros(self, nbytes: int, device: int) -> torch.Tensor:
        """uint8 zeros [nbytes] in managed memory, which is freed with the last tensor on it."""
        owner = Owner(self, nbytes, device)
        self.prefer(owner.address, nbytes, device)
        return self.tensor(owner).zero_()

    # ---- what torch does, for which a test has others

    @contextlib.contextmanager
    def context(self, device: int) -> Iterator[None]:
        """Context in which the driver's calls are about torch's context of a GPU."""
        with torch.cuda.device(device):
            torch.cuda.mem_get_info(device)  # the first call of CUDA's runtime in a thread makes the context current
            yield

    def stream(self, device: int) -> int:
        """The handle of torch's current stream."""
        return torch.cuda.current_stream(device).cuda_stream

    def tensor(self, owner: "Owner") -> torch.Tensor:
        """The tensor on an owner's memory, which keeps the owner."""
        return torch.as_tensor(owner, device=f"cuda:{owner.device}")

    # ----

    def _cu_device(self, device: int) -> int:
        handle = _DEVICE()
        self._call("cuDeviceGet", ctypes.byref(handle), device)
        return handle.value

    def _call(self, name: str, *args) -> None:
        self._check(name, getattr(self._driver, name)(*args))

    def _check(self, name: str, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: CUDA error {code}: {(text.value or b'unknown').decode()}")


class Owner:
    """Managed memory, freed when the last tensor that keeps this object is gone."""

    def __init__(self, memory: ManagedMemory, nbytes: int, device: int):
        self.nbytes, self.device = nbytes, device
        self.address = memory.allocate(nbytes, device)
        finalizer = weakref.finalize(self, _free, memory, self.address, device, os.getpid())
        finalizer.atexit = False  # the driver frees all that a process leaves, and may be gone by then

    @property
    def __cuda_array_interface__(self) -> dict:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}


def _free(memory: ManagedMemory, address: int, device: int, process: int) -> None:
    if os.getpid() == process:  # a forked child has the object, but not the memory
        memory.free(address, device)
