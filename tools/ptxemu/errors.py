"""What the emulator raises. Every message names the kernel, the PTX line and, with -lineinfo, the source line."""


class EmulatorError(Exception):
    """The kernel, its PTX or the way it was launched is wrong."""


class MemoryFault(EmulatorError):
    """An access out of bounds, misaligned, to unmapped or read-only memory, or a read of memory never written."""


class Deadlock(EmulatorError):
    """Threads wait at a barrier or a warp-synchronous instruction that the others can never reach."""


class RaceError(EmulatorError):
    """A shared-memory race, a missing wait for an asynchronous copy, or another hazard found during the launch."""


class LaunchError(EmulatorError):
    """A launch that the CUDA runtime would refuse, or arguments that do not fit the kernel's parameters.

    ``cuda_error`` is the cudaError_t that the runtime would give the host code.
    """

    def __init__(self, message, cuda_error=1):
        super().__init__(message)
        self.cuda_error = cuda_error


class UnsupportedInstruction(EmulatorError):
    """An instruction the emulator does not know was executed (not merely present in the PTX)."""
