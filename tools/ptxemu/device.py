"""The pretended GPU: what launchers may ask the runtime for, and the limits that launches must respect."""

from dataclasses import dataclass

from .errors import LaunchError

_KIB = 1024
_INVALID_VALUE, _INVALID_CONFIGURATION = 1, 9  # cudaError_t


@dataclass(frozen=True)
class Device:
    """Limits in bytes and threads (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""

    compute_capability: tuple[int, int] = (8, 0)
    sm_count: int = 108
    shared_per_block_opt_in: int = 163 * _KIB
    shared_per_sm: int = 164 * _KIB
    threads_per_sm: int = 2048
    l2_cache: int = 40 << 20

    SHARED_PER_BLOCK = 48 * _KIB  # without cudaFuncSetAttribute
    THREADS_PER_BLOCK = 1024
    MAX_BLOCK = (1024, 1024, 64)
    MAX_GRID = (2**31 - 1, 65535, 65535)

    @classmethod
    def for_arch(cls, arch):
        """A typical device of an architecture: "sm_80", "80", "sm_90a"."""
        name = str(arch).removeprefix("sm_").removeprefix("compute_")
        if name.rstrip("af") not in _TYPICAL:
            raise ValueError(f"arch must be one of {', '.join(_TYPICAL)}, got {arch!r}")
        return _TYPICAL[name.rstrip("af")]

    def attribute(self, number):
        """Return what cudaDeviceGetAttribute gives for a cudaDeviceAttr; 0 for one that is not modelled."""
        return {
            1: self.THREADS_PER_BLOCK,
            2: self.MAX_BLOCK[0],
            3: self.MAX_BLOCK[1],
            4: self.MAX_BLOCK[2],
            5: self.MAX_GRID[0],
            6: self.MAX_GRID[1],
            7: self.MAX_GRID[2],
            8: self.SHARED_PER_BLOCK,
            10: 32,  # warp size
            16: self.sm_count,
            38: self.l2_cache,
            39: self.threads_per_sm,
            75: self.compute_capability[0],
            76: self.compute_capability[1],
            81: self.shared_per_sm,
            97: self.shared_per_block_opt_in,
        }.get(number, 0)

    def check_launch(self, kernel, grid, block, dynamic_shared, static_shared, shared_limit):
        """Raise LaunchError where the CUDA runtime would refuse the launch.

        ``shared_limit`` is the dynamic shared memory that the kernel may use: what cudaFuncSetAttribute allowed, or
        what its static shared memory leaves of SHARED_PER_BLOCK.
        """

        def refuse(why, cuda_error=_INVALID_VALUE):
            raise LaunchError(f"kernel {kernel.name}: {why} (grid {grid}, block {block})", cuda_error)

        if any(not 1 <= size <= limit for size, limit in zip(grid, self.MAX_GRID, strict=True)):
            refuse(f"grid must be 1 to {self.MAX_GRID}", _INVALID_CONFIGURATION)
        threads = block[0] * block[1] * block[2]
        if threads > self.THREADS_PER_BLOCK or any(
            not 1 <= size <= limit for size, limit in zip(block, self.MAX_BLOCK, strict=True)
        ):
            refuse(
                f"block must be 1 to {self.MAX_BLOCK} and at most {self.THREADS_PER_BLOCK} threads",
                _INVALID_CONFIGURATION,
            )
        if kernel.required_block and kernel.required_block != block:
            refuse(f"the kernel was compiled for blocks of {kernel.required_block}")
        if kernel.max_threads and threads > kernel.max_threads:
            refuse(f"{threads} threads exceed the kernel's __launch_bounds__({kernel.max_threads})")
        if dynamic_shared > shared_limit:
            refuse(
                f"{dynamic_shared} bytes of dynamic shared memory exceed {shared_limit}; ask for more with "
                "cudaFuncSetAttribute(cudaFuncAttributeMaxDynamicSharedMemorySize)"
            )
        if static_shared + dynamic_shared > self.shared_per_block_opt_in:
            refuse(
                f"{dynamic_shared} bytes of dynamic and {static_shared} of static shared memory exceed the device's "
                f"{self.shared_per_block_opt_in}"
            )


_TYPICAL = {
    "75": Device((7, 5), 40, 64 * _KIB, 64 * _KIB, 1024, 4 << 20),  # T4
    "80": Device(),  # A100
    "86": Device((8, 6), 84, 99 * _KIB, 100 * _KIB, 1536, 6 << 20),  # RTX 3090
    "89": Device((8, 9), 128, 99 * _KIB, 100 * _KIB, 1536, 72 << 20),  # RTX 4090
    "90": Device((9, 0), 132, 227 * _KIB, 228 * _KIB, 2048, 50 << 20),  # H100
    "100": Device((10, 0), 148, 227 * _KIB, 228 * _KIB, 2048, 126 << 20),  # B200
    "120": Device((12, 0), 170, 99 * _KIB, 100 * _KIB, 1536, 96 << 20),  # RTX 5090
}
