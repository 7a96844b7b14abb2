"""Launching a kernel: options, arguments and layout, then batches of blocks one after the other."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .address_space import GlobalMemory, Layout
from .batch import Batch
from .counting import Counters, collect
from .errors import LaunchError, RaceError
from .parameters import as_block, encode_arguments
from .parser import align_up
from .races import Hazards

_LANES_PER_BATCH = 4096  # long enough vectors to hide Python, short enough to stay in cache


@dataclass(frozen=True)
class Options:
    """How to run a kernel. The defaults find most mistakes; counting alone is faster without detect_races.

    async_mode: "lazy" lands cp.async data only at the matching wait, "eager" at once.
    detect_races, raise_on_race: look for shared-memory hazards; raise RaceError or only list them in the result.
    warp_races: also want __syncwarp between lanes of a warp that exchange data through shared memory.
    detect_global_waw: report bytes of global memory that two threads write.
    schedule: "lockstep" runs all warps together, "random" (by seed) and "reverse" one at a time in that order.
    mma_mode: "exact" sums mma products exactly, "trunc" drops low bits as a pessimistic tensor core would.
    approx_ulp: move results of approximate instructions by up to that many random ulp.
    counters: count memory traffic and bank conflicts. max_steps: give up on longer runs.
    batch_blocks: thread blocks run together. blocks: run only these of the grid (indices or (x, y, z)), or a function
    of the grid that names them.
    trace: called as trace(batch, instruction, lanes) before every instruction.
    """

    async_mode: str = "lazy"
    detect_races: bool = True
    raise_on_race: bool = True
    warp_races: bool = False
    detect_global_waw: bool = False
    schedule: str = "lockstep"
    seed: int = 0
    mma_mode: str = "exact"
    approx_ulp: int = 0
    counters: bool = True
    max_steps: int = 20_000_000
    batch_blocks: int | None = None
    blocks: Sequence | Callable | None = None
    trace: Callable | None = None

    def __post_init__(self):
        choices = {
            "async_mode": ("lazy", "eager"),
            "schedule": ("lockstep", "random", "reverse"),
            "mma_mode": ("exact", "trunc"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")


def triple(size):
    """4 or (4,) or (4, 1, 1) -> (4, 1, 1)."""
    size = (size,) if np.isscalar(size) else tuple(size)
    return tuple(int(n) for n in size) + (1,) * (3 - len(size))


class Launch:
    """One launch: everything that is the same for all of its blocks."""

    def __init__(self, module, kernel, grid, block, arguments, *, shared, shared_limit, device, fill_missing, options):
        self.module, self.kernel, self.options, self.device = module, kernel, options, device
        self.grid, self.block, self.dynamic_shared = triple(grid), triple(block), int(shared)
        if not kernel.is_kernel:
            raise LaunchError(f"{kernel.name} is a device function, not a kernel")
        self.layout = Layout(module.parsed, kernel, self.dynamic_shared)
        self.shared_size = self.layout.shared_size
        device.check_launch(kernel, self.grid, self.block, self.dynamic_shared, self.layout.static_shared, shared_limit)
        self.threads = int(np.prod(self.block))
        self.lanes_per_block = align_up(self.threads, 32)
        self.generator = np.random.default_rng(options.seed)
        self.counters, self.hazards, self.steps = Counters(), Hazards(), 0

        self.global_memory = GlobalMemory(module.buffers.values(), kernel.name)
        *self.parameter_values, addresses = encode_arguments(kernel, arguments, self.global_memory, fill_missing)
        self.global_memory.set_parameters(*(as_block(values, addresses) for values in self.parameter_values))
        self.symbols = {name: buffer.base for name, buffer in module.buffers.items()}
        self.symbols.update(self.layout.offsets)
        self.symbols.update(addresses)

    def run(self):
        started = time.perf_counter()
        block_ids = self._block_ids()
        together = self.options.batch_blocks or max(1, _LANES_PER_BATCH // self.lanes_per_block)
        with np.errstate(all="ignore"):
            for first in range(0, len(block_ids), together):
                Batch(self, block_ids[first : first + together], first).run()
        self.global_memory.write_back()
        result = collect(self, len(block_ids), time.perf_counter() - started)
        if result.races and self.options.raise_on_race:
            raise RaceError("\n".join(result.races))
        return result

    def _block_ids(self):
        gx, gy, gz = self.grid
        if self.options.blocks is None:
            return [(x, y, z) for z in range(gz) for y in range(gy) for x in range(gx)]
        chosen = self.options.blocks(self.grid) if callable(self.options.blocks) else self.options.blocks
        return [(*b, 0, 0)[:3] if isinstance(b, tuple) else (b % gx, b // gx % gy, b // (gx * gy)) for b in chosen]
