"""A loaded PTX text: its kernels, its __device__ and __constant__ variables, and the call that launches a kernel."""

import numpy as np

from .address_space import FIRST_GLOBAL_WINDOW, Buffer, Layout, as_bytes
from .compiler import compile_function
from .device import Device
from .errors import LaunchError
from .launch import Launch, Options
from .parser import parse


def load(ptx):
    """Return the Module of a PTX text (nvcc -ptx, or Triton's ``kernel.asm["ptx"]``)."""
    return Module(ptx)


class Module:
    def __init__(self, ptx):
        self.text, self.parsed = ptx, parse(ptx)
        self.functions = self.parsed.functions
        self.buffers = {
            variable.name: Buffer(
                variable.name,
                np.frombuffer(variable.initial, np.uint8),
                FIRST_GLOBAL_WINDOW + position,
                writable=variable.space == "global",
                counted=variable.space == "global",
            )
            for position, variable in enumerate(self.parsed.globals.values())
        }

    @property
    def kernels(self):
        """Names of the kernels, mangled as in the PTX."""
        return [name for name, function in self.functions.items() if function.is_kernel]

    def kernel(self, name):
        """The kernel of this name, or the only one whose mangled name contains it."""
        if name in self.functions:
            return self.functions[name]
        matches = [n for n in self.kernels if name in n]
        if len(matches) != 1:
            raise LaunchError(f"{len(matches)} kernels match {name!r}; this module has {', '.join(self.kernels)}")
        return self.functions[matches[0]]

    def static_shared(self, kernel):
        """Bytes of shared memory that a kernel (from `kernel`) uses whatever the launch."""
        return Layout(self.parsed, kernel, 0).static_shared

    def launch(
        self,
        name,
        grid,
        block,
        args,
        *,
        shared=0,
        shared_limit=None,
        device=None,
        pad_args=False,
        **options,
    ):
        """Run a kernel to its end and return a Result; arrays among ``args`` are changed in place.

        args: numpy arrays, contiguous torch CPU tensors, `Pointer` and `Uninitialized` become pointers (bf16 as
        uint16 or torch.bfloat16); numbers must fit the parameter; bytes pass as they are. pad_args sets missing
        trailing parameters to zero (Triton's scratch pointers).
        shared: dynamic shared memory in bytes, up to shared_limit (default: what ``device`` has).
        options: the fields of `Options`.
        """
        device = device or Device()
        shared_limit = device.shared_per_block_opt_in if shared_limit is None else shared_limit
        return Launch(
            self,
            self.kernel(name),
            grid,
            block,
            args,
            shared=shared,
            shared_limit=shared_limit,
            device=device,
            fill_missing=pad_args,
            options=Options(**options),
        ).run()

    def _variable(self, name):
        matches = [name] if name in self.buffers else [n for n in self.buffers if name in n]
        if len(matches) != 1:
            raise LaunchError(f"{len(matches)} variables match {name!r}; this module has {', '.join(self.buffers)}")
        return self.buffers[matches[0]]

    def set_symbol(self, name, array):
        """cudaMemcpyToSymbol: fill a __constant__ or __device__ variable."""
        buffer, contents = self._variable(name), as_bytes(np.ascontiguousarray(array))
        if contents.size > buffer.size:
            raise LaunchError(f"{contents.size} bytes do not fit variable {buffer.name} of {buffer.size}")
        buffer.contents[: contents.size] = contents

    def get_symbol(self, name, dtype=np.uint8):
        """cudaMemcpyFromSymbol."""
        buffer = self._variable(name)
        return buffer.contents.view(dtype).copy()

    def unsupported(self, name=None):
        """Instructions that would raise UnsupportedInstruction if executed, each with its place."""
        functions = [self.kernel(name)] if name else self.functions.values()
        found = []
        for function in functions:
            compile_function(function)
            found += [f"{ins.unsupported}: {ins.where}" for ins in function.code if ins.unsupported]
        return found
