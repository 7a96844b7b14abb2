"""Addresses: which 64-bit address belongs to which memory, and the global memory made of the arrays of a launch.

Each allocation lives in a window of 64 GiB of its own, so an address that runs past its array never lands in another.
"""

import re

import numpy as np

from .errors import LaunchError
from .parser import align_up

WINDOW_SHIFT = 36
_PRESERVED_ALIGNMENT = 16  # the widest access
_FIRST_OFFSET = 1 << 24  # allocations start 16 MiB into their window, so that small negative offsets stay in it
_LARGEST_COPY = 1 << 30  # in bytes
SHARED_WINDOW, LOCAL_WINDOW, PARAMETER_WINDOW, FIRST_GLOBAL_WINDOW = 1, 2, 3, 16


def window_base(window):
    return (window << WINDOW_SHIFT) + _FIRST_OFFSET


SHARED_BASE, LOCAL_BASE, PARAMETER_BASE = (window_base(w) for w in (SHARED_WINDOW, LOCAL_WINDOW, PARAMETER_WINDOW))


def in_window(addresses, base):
    return (addresses >> np.uint64(WINDOW_SHIFT)) == np.uint64(base >> WINDOW_SHIFT)


def in_global_window(addresses):
    return (addresses >> np.uint64(WINDOW_SHIFT)) >= np.uint64(FIRST_GLOBAL_WINDOW)


class Pointer:
    """Argument: a pointer ``byte_offset`` bytes into ``array``, bounded by the whole array."""

    def __init__(self, array, byte_offset=0):
        self.array, self.byte_offset = array, byte_offset


class Struct:
    """Argument: a struct by value, and what is a Pointer if the kernel reads it in one piece: ``{offset: Pointer}``.

    A word of 8 bytes that is no pointer may look like one: two numbers, or a number and padding of any content. Kernels
    read these in pieces of less than 8 bytes, and get them as they are given.
    """

    def __init__(self, given, pointers):
        self.given, self.pointers = given, pointers

    def with_addresses(self, address_of):
        """Return the bytes, with addresses of the emulator; ``address_of`` returns that of a Pointer."""
        encoded = bytearray(self.given)
        for offset, pointer in self.pointers.items():
            encoded[offset : offset + 8] = address_of(pointer).to_bytes(8, "little")
        return bytes(encoded)


class Uninitialized:
    """Argument: memory whose contents are undefined until written. Reading a byte before its first write is a fault.

    The record of what is written stays with the object, so one kernel may fill what the next one reads.
    """

    def __init__(self, array):
        self.array = array
        self.written = np.zeros(as_bytes(array).size, bool)

    def all_written(self):
        return bool(self.written.all())


def is_tensor(value):
    return hasattr(value, "data_ptr")


def is_array(value):
    return isinstance(value, (np.ndarray, Pointer, Uninitialized)) or is_tensor(value)


def as_bytes(array):
    """Return a flat uint8 array that shares the memory of a numpy array or torch CPU tensor."""
    if is_tensor(array):
        import torch

        if array.device.type != "cpu" or not array.is_contiguous():
            raise LaunchError(f"expected a contiguous CPU tensor, got {array.device} with strides {array.stride()}")
        return array.detach().reshape(-1).view(torch.uint8).numpy()
    if not array.flags.c_contiguous:
        raise LaunchError(f"expected a C-contiguous array, got strides {array.strides} for shape {array.shape}")
    return array.reshape(-1).view(np.uint8)


class Buffer:
    """One allocation: a padded copy of an array, at an address.

    An array of more than 1 GiB that needs no padding is used in place. If numpy.zeros made it, only the pages that a
    kernel touches take memory.

    It starts ``lead`` bytes into ``data``, which keeps the array's own alignment up to 16 bytes. So a slice that starts
    at an odd byte is misaligned here too. Offsets of accesses count from ``aligned_base``.
    """

    def __init__(self, name, contents, window, *, lead=0, writable=True, counted=True, written=None):
        self.name, self.size, self.writable, self.counted = name, contents.size, writable, counted
        self.aligned_base, self.lead = window_base(window), lead
        self.in_place = self.size > _LARGEST_COPY and lead == 0 and self.size % 64 == 0
        if self.in_place:
            self.data = self.contents = contents
        else:
            self.data = np.zeros(align_up(max(lead + self.size, 1), 64), np.uint8)
            self.contents = self.data[lead : lead + self.size]
            self.contents[:] = contents
        self.written = written  # bool per byte for memory that starts uninitialized, else None
        self.forget_accesses()

    def forget_accesses(self):
        self.dirty = False
        self.sectors_read = np.zeros(self.data.size // 32, bool)
        self.sectors_written = np.zeros(self.data.size // 32, bool)
        self.writer = None  # thread that last wrote each byte, for the detector of double writes

    @property
    def base(self):
        return self.aligned_base + self.lead


class GlobalMemory:
    """All buffers of one launch: module variables (which outlive it), kernel parameters and passed arrays."""

    def __init__(self, module_buffers, kernel_name):
        self.kernel_name = kernel_name
        self.buffers = {buffer.base >> WINDOW_SHIFT: buffer for buffer in module_buffers}
        for buffer in self.buffers.values():
            buffer.forget_accesses()
        self._arrays = []  # (address in this process, buffer, bytes)
        self._next_window = FIRST_GLOBAL_WINDOW + len(self.buffers)

    def address_of(self, argument, name):
        """Return the address of an array, Pointer or Uninitialized, which becomes a buffer when first seen."""
        offset, written = 0, None  # a Pointer may lead into an Uninitialized
        if isinstance(argument, Pointer):
            argument, offset = argument.array, argument.byte_offset
        if isinstance(argument, Uninitialized):
            argument, written = argument.array, argument.written
        contents = as_bytes(argument)
        start = contents.__array_interface__["data"][0]
        for other_start, buffer, other in self._arrays:
            if (start, contents.size) == (other_start, other.size):
                return buffer.base + offset
            overlaps = start < other_start + other.size and other_start < start + contents.size
            if overlaps and contents.size and other.size:
                raise LaunchError(
                    f"kernel {self.kernel_name}: {name} overlaps {buffer.name}; pass Pointer(array, byte_offset) "
                    "into one array instead"
                )
        writable = argument.flags.writeable if isinstance(argument, np.ndarray) else True
        lead = start % _PRESERVED_ALIGNMENT if contents.size else 0
        buffer = Buffer(name, contents, self._next_window, lead=lead, writable=writable, written=written)
        self._next_window += 1
        self.buffers[buffer.base >> WINDOW_SHIFT] = buffer
        self._arrays.append((start, buffer, contents))
        return buffer.base + offset

    def set_parameters(self, block, given):
        """Set the bytes of the parameter space, and what smaller reads than those of pointers find there."""
        self.buffers[PARAMETER_WINDOW], self._given = (
            Buffer("kernel parameters", np.frombuffer(part, np.uint8), PARAMETER_WINDOW, writable=False, counted=False)
            for part in (block, given)
        )

    def in_pieces(self, data):
        """Return the data of a buffer as reads of less than 8 bytes find it."""
        return self._given.data if data is self.buffers[PARAMETER_WINDOW].data else data

    def write_back(self):
        """Copy what the kernel wrote into the caller's arrays."""
        for _, buffer, contents in self._arrays:
            if buffer.dirty and not buffer.in_place:
                contents[:] = buffer.contents


class Layout:
    """Offsets of shared and local variables, for one kernel (PTX ISA 5.1, "State spaces")."""

    def __init__(self, parsed, kernel, dynamic_size):
        self.offsets = {}
        self._size = 0
        self.local_size = 0
        callable_functions = [f for f in parsed.functions.values() if f is kernel or not f.is_kernel]
        for function in callable_functions:
            for variable in function.shared.values():
                self._place(variable)
            for name, offset in function.local_offsets.items():
                self.offsets[name] = self.local_size + offset
            self.local_size = align_up(self.local_size + function.local_size, 64)
        text = " ".join(ins.text for function in callable_functions for ins in function.code)
        used = set(re.findall(r"[\w$.]+", text))
        for variable in parsed.shared.values():
            if variable.name in used:
                self._place(variable)
        if parsed.dynamic_shared and (self._size or used & parsed.dynamic_shared.keys()):
            self._size = align_up(self._size, max(16, *parsed.dynamic_shared.values()))
        for name in parsed.dynamic_shared:
            self.offsets[name] = self._size
        self.static_shared = self._size
        self.shared_size = self._size + dynamic_size

    def _place(self, variable):
        self._size = align_up(self._size, variable.align)
        self.offsets[variable.name] = self._size
        self._size += variable.size
