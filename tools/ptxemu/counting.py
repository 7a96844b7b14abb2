"""What a launch cost: instructions, bytes, 32-byte sectors, shared-memory bank conflicts, by place and in total.

Shared memory is modelled as 32 banks of 4 bytes; a warp's 8-byte accesses go by half warps and 16-byte ones by
quarters (CUDA C++ Programming Guide, "Shared memory"). Global memory moves in sectors of 32 bytes.
"""

from dataclasses import dataclass, field

import numpy as np

from .parser import Instruction


@dataclass
class GlobalAccess:
    """Totals of one instruction. ``unique_bytes`` counts a byte once per warp and execution."""

    ins: Instruction
    access: str  # read, write or atomic
    warps: int = 0
    sectors: int = 0
    bytes: int = 0
    unique_bytes: int = 0

    @property
    def efficiency(self):
        """Share of the bytes moved that were asked for."""
        return self.unique_bytes / max(1, 32 * self.sectors)


@dataclass
class SharedAccess:
    """Totals of one instruction: bank cycles taken, those taken without conflicts, and the worst single conflict."""

    ins: Instruction
    wavefronts: int = 0
    ideal: int = 0
    worst: int = 0


class Counters:
    def __init__(self):
        self.instructions = {}  # function -> ([warps that issued each], [threads that executed each])
        self.global_accesses: dict[int, GlobalAccess] = {}
        self.shared_accesses: dict[int, SharedAccess] = {}

    def of_function(self, function):
        return self.instructions.setdefault(function, ([0] * len(function.code), [0] * len(function.code)))

    def count_global(self, ins, access, addresses, lanes, size):
        warps = lanes.astype(np.uint64) >> np.uint64(5)
        # Addresses use the low 44 bits, so one key holds the warp too; keys sort by warp, then address.
        keys = _unique((warps << np.uint64(44)) | addresses)
        entry = self.global_accesses.setdefault(ins.line, GlobalAccess(ins, access))
        entry.warps += _changes(keys >> np.uint64(44))
        entry.sectors += _changes(keys >> np.uint64(5))
        entry.bytes += len(addresses) * size
        entry.unique_bytes += len(keys) * size

    def count_shared(self, ins, offsets, lanes, size):
        phases, words = lanes >> (3 if size >= 16 else 4 if size == 8 else 5), offsets >> 2
        if size > 4:
            phases = np.repeat(phases, size // 4)
            words = (words[:, None] + np.arange(size // 4)).ravel()
        distinct_words = _unique((phases << 32) | words)
        # Words of one bank in one phase are served one after the other.
        banks, per_bank = np.unique(((distinct_words >> 32) << 5) | (distinct_words & 31), return_counts=True)
        phase_of_bank = banks >> 5
        starts = np.flatnonzero(np.r_[True, phase_of_bank[1:] != phase_of_bank[:-1]])
        cycles = np.maximum.reduceat(per_bank, starts)
        entry = self.shared_accesses.setdefault(ins.line, SharedAccess(ins))
        entry.wavefronts += int(cycles.sum())
        entry.ideal += len(cycles)
        entry.worst = max(entry.worst, int(cycles.max()))


def _unique(values):
    ordered = np.sort(values)
    return ordered[np.r_[True, ordered[1:] != ordered[:-1]]]


def _changes(ordered):
    """Number of distinct values of a sorted array."""
    return 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


@dataclass
class Result:
    """What a launch did. Sizes are bytes; ``instructions`` counts warp issues per opcode."""

    kernel: str
    blocks: int
    threads: int
    static_shared: int
    seconds: float
    instructions: dict[str, int]
    warp_instructions: int
    thread_instructions: int
    by_source: dict[tuple[str, int] | None, int]  # (file, line) -> warp issues
    global_accesses: list[GlobalAccess]
    shared_accesses: list[SharedAccess]
    read_footprint: int  # distinct 32-byte sectors touched
    write_footprint: int
    races: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def _global(self, field_name, kinds):
        return sum(getattr(a, field_name) for a in self.global_accesses if a.access in kinds)

    @property
    def load_bytes(self):
        return self._global("bytes", ("read", "atomic"))

    @property
    def load_sectors(self):
        return self._global("sectors", ("read", "atomic"))

    @property
    def load_efficiency(self):
        return self._global("unique_bytes", ("read", "atomic")) / max(1, 32 * self.load_sectors)

    @property
    def store_bytes(self):
        return self._global("bytes", ("write", "atomic"))

    @property
    def store_sectors(self):
        return self._global("sectors", ("write", "atomic"))

    @property
    def store_efficiency(self):
        return self._global("unique_bytes", ("write", "atomic")) / max(1, 32 * self.store_sectors)

    @property
    def bank_conflicts(self):
        """Bank cycles beyond those that conflict-free accesses would have taken."""
        return sum(a.wavefronts - a.ideal for a in self.shared_accesses)

    @property
    def worst_conflict(self):
        """Ways of the worst bank conflict; 1 means none, 0 no shared access."""
        return max((a.worst for a in self.shared_accesses), default=0)

    def count(self, prefix):
        """Warp issues of the opcodes that start with ``prefix``."""
        return sum(count for opcode, count in self.instructions.items() if opcode.startswith(prefix))

    def report(self, opcodes=12):
        most = sorted(self.instructions.items(), key=lambda item: -item[1])[:opcodes]
        lines = [
            f"{self.kernel}: {self.blocks} blocks x {self.threads} threads, {self.warp_instructions} warp "
            f"instructions ({self.thread_instructions} thread instructions), emulated in {self.seconds:.2f} s",
            "  opcodes (warp issues): " + ", ".join(f"{opcode}:{count}" for opcode, count in most),
            f"  global loads: {self.load_bytes} B asked for, {self.load_sectors} sectors, efficiency "
            f"{self.load_efficiency:.2f}; stores: {self.store_bytes} B, {self.store_sectors} sectors, efficiency "
            f"{self.store_efficiency:.2f}",
            f"  footprint: {self.read_footprint} B read, {self.write_footprint} B written",
            f"  shared: {sum(a.wavefronts for a in self.shared_accesses)} wavefronts, {self.bank_conflicts} of them "
            f"conflicts, worst access {self.worst_conflict}-way",
        ]
        lines += [f"  RACE {race}" for race in self.races]
        lines += [f"  WARNING {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def source_report(self, lines=20):
        """The source lines that issued most warp instructions (needs -lineinfo)."""
        most = sorted(self.by_source.items(), key=lambda item: -item[1])[:lines]
        return "\n".join(
            f"{count:10d}  {'{}:{}'.format(*place) if place else '(no line information)'}" for place, count in most
        )


def collect(launch, blocks, seconds):
    """Return the Result of a finished launch from its counters and hazards."""
    counters, opcodes, by_source = launch.counters, {}, {}
    warp_total = thread_total = 0
    for function, (warp_counts, thread_counts) in counters.instructions.items():
        for ins, warps, threads in zip(function.code, warp_counts, thread_counts, strict=True):
            if warps:
                opcodes[ins.opcode] = opcodes.get(ins.opcode, 0) + warps
                by_source[ins.location] = by_source.get(ins.location, 0) + warps
                warp_total += warps
                thread_total += threads
    buffers = launch.global_memory.buffers.values()
    return Result(
        kernel=launch.kernel.name,
        blocks=blocks,
        threads=launch.threads,
        static_shared=launch.layout.static_shared,
        seconds=seconds,
        instructions=opcodes,
        warp_instructions=warp_total,
        thread_instructions=thread_total,
        by_source=by_source,
        global_accesses=list(counters.global_accesses.values()),
        shared_accesses=list(counters.shared_accesses.values()),
        read_footprint=32 * sum(int(b.sectors_read.sum()) for b in buffers),
        write_footprint=32 * sum(int(b.sectors_written.sum()) for b in buffers),
        races=launch.hazards.races,
        warnings=launch.hazards.warnings,
    )
