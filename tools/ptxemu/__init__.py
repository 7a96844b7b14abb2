"""CUDA and Triton kernels executed on the CPU from their PTX; see README.md beside this file."""

from . import instructions  # noqa: F401  (registers the handlers)
from .address_space import Pointer, Uninitialized
from .counting import Result
from .device import Device
from .errors import (
    Deadlock,
    EmulatorError,
    LaunchError,
    MemoryFault,
    RaceError,
    UnsupportedInstruction,
)
from .launch import Options
from .module import Module, load

__all__ = [
    "Deadlock",
    "Device",
    "EmulatorError",
    "LaunchError",
    "MemoryFault",
    "Module",
    "Options",
    "Pointer",
    "RaceError",
    "Result",
    "Uninitialized",
    "UnsupportedInstruction",
    "load",
]
