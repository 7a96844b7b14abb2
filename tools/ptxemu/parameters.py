"""Kernel arguments -> the bytes of the parameter space, and the parameters of device function calls."""

import numpy as np

from .address_space import PARAMETER_BASE, Struct, is_array
from .errors import EmulatorError, LaunchError
from .numerics import f32_to_bf16
from .parser import align_up
from .ptx_types import UNSIGNED


def encode_arguments(kernel, arguments, global_memory, fill_missing=False):
    """Return (bytes of each parameter by name, the same for reads of less than 8 bytes, address of each by name).

    Arrays become pointers, numbers are checked to fit, bytes pass through. ``fill_missing`` sets missing trailing
    parameters to zero: Triton adds pointers to scratch memory that most kernels do not use.
    """
    parameters, arguments = kernel.parameters, list(arguments)
    if fill_missing:
        arguments += [None] * (len(parameters) - len(arguments))
    if len(arguments) != len(parameters):
        expected = ", ".join(f"{p.type.name}{f'[{p.size} bytes]' if p.is_array else ''}" for p in parameters)
        raise LaunchError(f"kernel {kernel.name} takes {len(parameters)} arguments ({expected}), got {len(arguments)}")
    values, given, addresses, end = {}, {}, {}, 0
    for position, (parameter, argument) in enumerate(zip(parameters, arguments, strict=True)):
        value = _encode(kernel, parameter, argument, position, global_memory)
        values[parameter.name] = value
        given[parameter.name] = argument.given if isinstance(argument, Struct) else value
        start = align_up(end, parameter.align)
        addresses[parameter.name] = PARAMETER_BASE + start
        end = start + len(value)
    return values, given, addresses


def as_block(values, addresses):
    """Return the parameter space: the bytes of each parameter at its address."""
    block = bytearray()
    for name, value in values.items():
        block += bytes(addresses[name] - PARAMETER_BASE - len(block)) + value
    return bytes(block)


def _encode(kernel, parameter, argument, position, global_memory):
    name = f"arg{position}"

    def mismatch(expected):
        got = f"{type(argument).__name__} {argument!r}" if np.isscalar(argument) else type(argument).__name__
        return LaunchError(f"kernel {kernel.name}: argument {position} must be {expected}, got {got}")

    t, size = parameter.type, parameter.size
    if isinstance(argument, Struct):
        argument = argument.with_addresses(lambda array: global_memory.address_of(array, name))
    if is_array(argument):
        if parameter.is_array and isinstance(argument, np.ndarray):
            argument = argument.tobytes()
        elif parameter.is_array or size != 8 or t.is_float:
            raise mismatch(f"{size} bytes ({t.name}), not an array")
        else:
            return global_memory.address_of(argument, name).to_bytes(8, "little")
    if isinstance(argument, np.void):
        argument = argument.tobytes()
    if isinstance(argument, (bytes, bytearray)):
        if len(argument) != size:
            raise LaunchError(f"kernel {kernel.name}: argument {position} must have {size} bytes, got {len(argument)}")
        return bytes(argument)
    if argument is None:
        return bytes(size)
    if parameter.is_array or not np.isscalar(argument) or isinstance(argument, str):
        raise mismatch(f"{size} bytes" if parameter.is_array else "an array or a number")
    if isinstance(argument, (float, np.floating)) or t.is_float:
        if t.kind in "us":
            raise mismatch(f"an integer ({t.name})")
        if t.name == "bf16":
            return f32_to_bf16(np.array([argument], np.float32)).tobytes()
        return {2: np.float16, 4: np.float32, 8: np.float64}[size](argument).tobytes()
    bits = 8 * size
    if not -(1 << (bits - 1)) <= int(argument) < 1 << bits:
        raise mismatch(f"an integer of {bits} bits")
    return (int(argument) & ((1 << bits) - 1)).to_bytes(size, "little")


class ParameterSpace:
    """.param memory of a batch: the kernel's own, the same for all lanes, and those of calls in progress.

    ``values`` and ``given`` are those of :func:`encode_arguments`.
    """

    def __init__(self, values, given, lanes, kernel_name):
        self._values, self._given, self._lanes, self._kernel_name = values, given, lanes, kernel_name
        self._cache = {}
        self.call_values = {}  # name -> uint8[lanes, bytes]

    def read(self, name, offset, size, bits):
        dtype = UNSIGNED[bits]
        if name in self.call_values:
            return np.ascontiguousarray(self.call_values[name][:, offset : offset + size]).view(dtype).ravel()
        key = (name, offset, bits)
        if key not in self._cache:
            value = (self._values if size == 8 else self._given).get(name, b"")
            if offset + size > len(value):
                raise EmulatorError(f"kernel {self._kernel_name} reads beyond parameter {name}: byte {offset}")
            scalar = np.frombuffer(value[offset : offset + size], dtype)[0]
            self._cache[key] = np.full(self._lanes, scalar)
        return self._cache[key]

    def write(self, name, offset, size, values, mask):
        current = self.call_values.get(name)
        needed = max(offset + size, 16)
        grown = np.zeros((self._lanes, needed if current is None else max(needed, current.shape[1])), np.uint8)
        if current is not None:
            grown[:, : current.shape[1]] = current
        raw = np.ascontiguousarray(np.broadcast_to(values, (self._lanes,))).view(np.uint8).reshape(self._lanes, size)
        lanes = slice(None) if mask is None else mask
        grown[lanes, offset : offset + size] = raw[lanes]
        self.call_values[name] = grown
