"""Run CUDA host code on the CPU: launchers compiled by nvcc, on a stub runtime that gives each launch to the emulator.

    library = hostlaunch.build("launchers.cu", arch="sm_80", include=["csrc"])
    library.call("launch_scale", x, y, 3.0, 384, stream)     # numpy arrays or torch CPU tensors, numbers, None
    library.launches[-1]                                     # kernel, grid, block, shared, stream, device, result

A pointer handed to a kernel must lie in an array passed to `HostLibrary.call` or declared with `HostLibrary.know`; any
other is passed as it is, and an access through it is a MemoryFault.
"""

import bisect
import ctypes
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .address_space import Pointer, Struct, Uninitialized, as_bytes, is_array
from .counting import Result
from .device import Device
from .errors import LaunchError, MemoryFault
from .signatures import SignatureTable
from .toolchain import compile_objects, run

#: The runtime that launchers are linked to.
STUB = Path(__file__).with_name("cudart_stub.c")

# cudaError_t
_INVALID_VALUE, _LAUNCH_FAILURE = 1, 719
_MAX_DYNAMIC_SHARED = 8  # cudaFuncAttributeMaxDynamicSharedMemorySize


class _Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]

    def __iter__(self):
        return iter((self.x, self.y, self.z))


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(_Dim3),
    ctypes.POINTER(_Dim3),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)
_SET_KERNEL_ATTRIBUTE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
_DEVICE_ATTRIBUTE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int)
_MEMORY = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_size_t,
    ctypes.c_void_p,
)


class _Callbacks(ctypes.Structure):
    """Callbacks of cudart_stub.c."""

    _fields_ = [
        ("launch", _LAUNCH),
        ("set_kernel_attribute", _SET_KERNEL_ATTRIBUTE),
        ("device_attribute", _DEVICE_ATTRIBUTE),
        ("memory", _MEMORY),
    ]


@dataclass
class HostLaunch:
    """A kernel launch that the host code made."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # dynamic, in bytes
    stream: int  # the opaque pointer as given; 0 is the default stream
    device: int
    result: Result
    arguments: list[bytes]  # as given: addresses of the host's


@dataclass
class RuntimeCall:
    """Another call of the runtime: memory set, copied, allocated or freed, or a synchronization."""

    name: str
    bytes: int
    stream: int


def build(sources, *, arch="sm_80", include=(), flags=(), out=None, device=None):
    """Compile .cu sources (a path or several), link their host code to the stub runtime, load it.

    ``device`` answers the launchers' questions about the GPU; by default one typical of ``arch``.
    """
    out = Path(tempfile.mkdtemp(prefix="hostlaunch-") if out is None else out)
    modules, objects = compile_objects(sources, out, arch=arch, include=include, flags=flags)
    return load(link(objects, out), modules, sources, device or Device.for_arch(arch))


def link(objects, out):
    """Link the host code of nvcc's object files to the stub runtime; return the library's path in ``out``."""
    stub, library = Path(out) / "cudart_stub.o", Path(out) / "launchers.so"
    run("gcc", "-c", "-O1", "-fPIC", "-Wall", STUB, "-o", stub)
    # -Bsymbolic: a CUDA build of torch may have brought the true runtime's symbols into this process.
    linking = ("-shared", "-fPIC", "-Wl,--no-undefined", "-Wl,-Bsymbolic")
    run("g++", *linking, *objects, stub, "-o", library)
    return library


def load(library, modules, sources, device):
    """What `link` made, loaded: ``modules`` is the `Module` of each source's PTX."""
    return HostLibrary(library, modules, SignatureTable(library, sources), device)


class HostLibrary:
    """Loaded launchers.

    ``launches`` and ``runtime_calls`` list what the host code did, in order. ``options`` are the emulator's (see
    `Options`) for every launch. ``device`` may be replaced at any time; ``other_devices`` are GPUs that differ from it,
    by their number.
    """

    def __init__(self, path, modules, signatures, device):
        self.modules, self.signatures, self.options = modules, signatures, {}
        self._every_device = device
        self.other_devices: dict[int, Device] = {}
        self.on_device_change = lambda: None  # for host code that remembers what a device is
        self.launches: list[HostLaunch] = []
        self.runtime_calls: list[RuntimeCall] = []
        self._known = _KnownMemory()
        self._allocations = {}  # address -> array
        self._shared_limits = {}  # kernel -> what cudaFuncSetAttribute allowed
        self._error = None
        self.path = Path(path)
        self._library = ctypes.CDLL(str(path))
        # C keeps only the address of this, so it must live as long as the library.
        self._callbacks = _Callbacks(
            _LAUNCH(self._guarded(self._launch)),
            _SET_KERNEL_ATTRIBUTE(self._guarded(self._set_kernel_attribute)),
            _DEVICE_ATTRIBUTE(lambda attribute, device: self._device(device).attribute(attribute)),
            _MEMORY(self._guarded(self._memory)),
        )
        self._library.stub_set_callbacks(ctypes.byref(self._callbacks))

    # ---- for tests

    @property
    def current_device(self):
        return self._library.stub_current_device()

    @property
    def device(self):
        return self._every_device

    @device.setter
    def device(self, device):
        self._every_device = device
        self.on_device_change()

    def set_capturing(self, is_capturing):
        """Whether cudaStreamGetCaptureInfo says that what is enqueued becomes part of a graph."""
        self._library.stub_set_capturing(is_capturing)

    def set_idle(self, is_idle):
        """Whether launches do nothing, not even call Python: to time the host code."""
        self._library.stub_set_idle(is_idle)

    def replay(self, launch):
        """Run a kernel again as a graph does: with the arguments that it had, on what is in memory now."""
        addresses = [ctypes.create_string_buffer(argument, len(argument)) for argument in launch.arguments]
        pointers = (ctypes.c_void_p * len(addresses))(*map(ctypes.addressof, addresses))
        dims = [(_Dim3 * 1)(_Dim3(*size)) for size in (launch.grid, launch.block)]
        self._launch(launch.kernel.encode(), *dims, launch.shared, pointers, launch.stream)

    def _device(self, number):
        return self.other_devices.get(number, self.device)

    def set_device(self, device):
        """cudaSetDevice, as the caller of the launchers might have done."""
        if self._library.cudaSetDevice(device):
            raise ValueError(f"no device {device}")

    def set_device_count(self, count):
        self._library.stub_set_device_count(count)

    def know(self, array):
        """Declare memory that kernels may touch in any later call: workspaces, arrays reached through structs."""
        self._known.add(array)
        return array

    def address(self, array):
        """Address to store in a struct; the array becomes known."""
        self._known.add(array)
        return _address(array)

    def forget(self):
        """Drop all arrays that `know` and `address` declared."""
        self._known = _KnownMemory()

    def call(self, function, *arguments, restype=ctypes.c_int, check=True):
        """Call a function of the sources and return what it returns.

        Arguments are checked against the function's parameters. What a launch does wrong is raised here, after the
        function has returned. ``check=False`` lets it return its error code for a launch that the runtime refuses, to
        test that launchers report one; faults and races are raised all the same.
        """
        signature = self.signatures.find(function, len(arguments))
        call_memory = []
        converted = [
            self._convert(signature, position, parameter, argument, call_memory)
            for position, (parameter, argument) in enumerate(zip(signature.parameters, arguments, strict=True))
        ]
        native = getattr(self._library, signature.symbol)
        native.restype = restype
        self._error = None
        self._library.stub_forget_error()
        added = [array for array in call_memory if self._known.add(array)]
        try:
            returned = native(*converted)
        finally:
            for array in added:
                self._known.remove(array)
        error, self._error = self._error, None
        if error is not None and (check or not isinstance(error, LaunchError)):
            raise error
        return returned

    def _convert(self, signature, position, parameter, argument, call_memory):
        def mismatch(why):
            return LaunchError(f"{signature}: argument {position} ({parameter.name}) {why}")

        if is_array(argument):
            array = argument.array if isinstance(argument, (Pointer, Uninitialized)) else argument
            if not parameter.is_pointer:
                raise mismatch("got an array")
            size = array.itemsize if isinstance(array, np.ndarray) else array.element_size()
            if parameter.element_bytes not in (None, size):
                raise mismatch(f"points to {parameter.element_bytes}-byte elements, got an array of {array.dtype}")
            call_memory.append(argument.array if isinstance(argument, Pointer) else argument)
            offset = argument.byte_offset if isinstance(argument, Pointer) else 0
            return ctypes.c_void_p(_address(array) + offset)
        if isinstance(argument, ctypes.Structure) and parameter.is_pointer:
            return ctypes.byref(argument)
        if isinstance(argument, (ctypes.Structure, ctypes._SimpleCData)):
            return argument
        if parameter.is_pointer:
            if argument is None or (isinstance(argument, int) and parameter.may_be_stream):
                return ctypes.c_void_p(argument)
            raise mismatch(f"needs an array, Pointer or None, got {argument!r}")
        if not isinstance(argument, (bool, int, float, np.number)):
            raise mismatch(f"needs a number, got {argument!r}")
        ctype = parameter.ctype or ctypes.c_int  # by-value types not known here: an enum
        if ctype in (ctypes.c_float, ctypes.c_double):
            return ctype(float(argument))
        if int(argument) != argument or (ctype is not ctypes.c_bool and ctype(int(argument)).value != argument):
            raise mismatch(f"cannot hold {argument!r}")
        return ctype(int(argument))

    # ---- what the stub runtime calls

    def _guarded(self, callback):
        """Keep the first exception for `call`, and answer C with an error code, as a GPU would."""

        def guarded(*arguments):
            if self._error is not None and not isinstance(self._error, LaunchError):
                return _LAUNCH_FAILURE
            try:
                callback(*arguments)
                return 0
            except Exception as error:
                self._error = self._error or error
                return getattr(error, "cuda_error", _LAUNCH_FAILURE)

        return guarded

    def _kernel(self, name):
        name = name.decode()
        for module in self.modules:
            if name in module.functions:
                return module, module.functions[name]
        raise LaunchError(f"kernel {name} is in none of the compiled sources")

    def _launch(self, name, grid, block, shared, arguments, stream):
        module, kernel = self._kernel(name)
        grid, block = tuple(grid[0]), tuple(block[0])
        values = [
            self._kernel_argument(arguments[position], parameter)
            for position, parameter in enumerate(kernel.parameters)
        ]
        result = module.launch(
            kernel.name,
            grid,
            block,
            values,
            shared=shared,
            shared_limit=self._shared_limits.get(kernel.name, Device.SHARED_PER_BLOCK - module.static_shared(kernel)),
            device=self._device(self.current_device),
            **self.options,
        )
        given = [ctypes.string_at(arguments[i], parameter.size) for i, parameter in enumerate(kernel.parameters)]
        stream = stream or 0
        self.launches.append(HostLaunch(kernel.name, grid, block, shared, stream, self.current_device, result, given))

    def _kernel_argument(self, address, parameter):
        """An argument for the emulator, with pointers into known memory, also inside structs."""
        raw = ctypes.string_at(address, parameter.size)
        if parameter.size % 8 or parameter.type.is_float:
            return raw
        words = {i: int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)}
        pointers = {i: found for i, word in words.items() if (found := self._known.pointer(word)) is not None}
        if not pointers:
            return raw
        return Struct(raw, pointers) if parameter.is_array else pointers[0]

    def _set_kernel_attribute(self, name, attribute, value):
        if attribute != _MAX_DYNAMIC_SHARED:
            return
        module, kernel = self._kernel(name)
        limit = self._device(self.current_device).shared_per_block_opt_in - module.static_shared(kernel)
        if not 0 <= value <= limit:
            raise LaunchError(
                f"kernel {kernel.name}: cudaFuncSetAttribute asks for {value} bytes of dynamic shared memory, the "
                f"device has {limit} for it",
                cuda_error=_INVALID_VALUE,
            )
        self._shared_limits[kernel.name] = value

    def _memory(self, name, pointer, source, value, size, stream):
        name = name.decode()
        self.runtime_calls.append(RuntimeCall(name, size, stream or 0))
        if name.startswith("cudaMalloc"):
            memory = Uninitialized(_aligned_bytes(max(size, 1)))
            address = _address(memory.array)
            self._allocations[address] = self.know(memory)
            pointer[0] = address
        elif name.startswith("cudaFree"):
            if pointer[0]:
                memory = self._allocations.pop(pointer[0], None)
                if memory is None:
                    raise MemoryFault(f"{name} of {pointer[0]:#x}, which was not allocated")
                self._known.remove(memory)
        elif name.startswith("cudaMemset"):
            self._known.range(name, pointer[0], size, writes=True)[:] = value & 0xFF
        elif name.startswith("cudaMemcpy"):
            contents = self._known.range(name, source, size, writes=False).copy()
            self._known.range(name, pointer[0], size, writes=True)[:] = contents


class _KnownMemory:
    """The arrays that kernels may touch, by address."""

    def __init__(self):
        self._starts, self._ends, self._arrays = [], [], []

    def add(self, array):
        """Return whether the array was not known before."""
        if any(other is array for other in self._arrays):
            return False
        start = _address(array)
        position = bisect.bisect_right(self._starts, start)
        self._starts.insert(position, start)
        self._ends.insert(position, start + as_bytes(_array(array)).size)
        self._arrays.insert(position, array)
        return True

    def remove(self, array):
        position = next(i for i, other in enumerate(self._arrays) if other is array)
        del self._starts[position], self._ends[position], self._arrays[position]

    def pointer(self, address):
        """Return a Pointer into the array that holds the address (or ends at it), or None."""
        found = None
        if address == 0:  # most of a large struct
            return None
        for start, end, array in zip(self._starts, self._ends, self._arrays, strict=True):
            if start <= address < end or (address == end and found is None and end > start):
                found = Pointer(array, address - start)
            if start <= address < end:
                break
        return found

    def range(self, call, address, size, *, writes):
        """Bytes of a known range, or a MemoryFault."""
        pointer = self.pointer(address or 0)
        contents = None if pointer is None else as_bytes(_array(pointer.array))
        if contents is None or pointer.byte_offset + size > contents.size:
            raise MemoryFault(f"{call} of {size} bytes at {address or 0:#x} leaves the memory it was given")
        chosen = slice(pointer.byte_offset, pointer.byte_offset + size)
        if isinstance(pointer.array, Uninitialized):
            if writes:
                pointer.array.written[chosen] = True
            elif not pointer.array.written[chosen].all():
                raise MemoryFault(f"{call} of {size} bytes at {address:#x} reads memory never written")
        return contents[chosen]


def _aligned_bytes(size, alignment=256):
    """As cudaMalloc aligns."""
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.__array_interface__["data"][0] % alignment
    return memory[start : start + size]


def _array(memory):
    return memory.array if isinstance(memory, Uninitialized) else memory


def _address(memory):
    return as_bytes(_array(memory)).__array_interface__["data"][0]
