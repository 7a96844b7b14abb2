"""What lowbit's Triton kernels cost, counted in the machine code of what the backend launches.

A product's kernel is counted by its main loop, and by LoRA's beside it; a kernel without a loop as a whole, with what
it does once and the rare branches of divisions.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .instruction_costs import data_path_cycles, mma_macs
from .machine_code import Kernel, count
from .triton_code import Launch, compiled, machine_code, specialized


@dataclass(frozen=True)
class Tile:
    """What a program multiplies in one round of its main loop: rows of x by so many rows and columns of W."""

    rows: int
    out_features: int
    in_features: int
    backward: bool = False  # sums over rows of W, not over columns

    def rounds(self, n: int, k: int) -> int:
        """Of all programs, for one tile of rows of x and a W of n rows and k columns, however its sums are split."""
        return -(-n // self.out_features) * -(-k // self.in_features)

    def outputs(self, n: int, k: int) -> int:
        """Tiles of the result, for one tile of rows of x."""
        return -(-k // self.in_features) if self.backward else -(-n // self.out_features)


def _forward(constants: dict) -> Tile:
    return Tile(constants["TILE_M"], constants["TILE_N"], constants["PRODUCTS"] * constants["TILE_K"])


def _backward(constants: dict) -> Tile:
    return Tile(constants["TILE_M"], constants["TILE_N"], constants["TILE_K"], True)


#: By kernel its tile, as a function of the launch's arguments. Kernels that are not here have no loop.
_TILES: dict[str, Callable[[dict], Tile]] = {
    "linear_kernel": _forward,
    "grad_input_kernel": _backward,
}


@dataclass(frozen=True)
class Body:
    """What one execution of some instructions costs, by all warps of a program."""

    instructions: int
    cycles: float  # of the L1/shared data path
    macs: float  # of mma.sync
    peak_macs: float = 0.0  # of wgmma and tcgen05


@dataclass(frozen=True)
class Costs:
    """Of a launch's kernel: one round of its main loop, or (``tile`` is None) a whole program."""

    kernel: str
    warps: int
    tile: Tile | None
    body: Body
    lora: Body | None = None  # a step of LoRA's loop, which follows the main one


def _body(instructions: list[str], warps: int, peak_macs: float = 0.0) -> Body:
    path, macs = data_path_cycles(instructions), mma_macs(instructions)
    return Body(warps * len(instructions), warps * path, warps * macs, peak_macs)


def _wide_products(body: list[str]) -> int:
    """Instructions of wgmma (Hopper) and tcgen05 (Blackwell)."""
    return count(body, "HGMMA") + count(body, "UTCHMMA")


def _loops(kernel: Kernel) -> list[list[str]]:
    """Without what only looks like one: code behind the kernel's end, where it waits, that jumps back."""
    return [body for body in kernel.loops() if not count(body, "EXIT")]


def costs_of(kernel: Kernel, warps: int, tile: Tile | None) -> Costs:
    """The costs in a kernel's machine code; an error where its loops are not those that its tile is of."""
    loops = _loops(kernel)
    if tile is None:
        if loops:
            raise ValueError(f"{kernel.name} for {kernel.arch}: a loop, and no tile in _TILES that says of what")
        whole = [text for _, text in kernel.instructions]
        return Costs(kernel.name, warps, None, _body([text for text in whole if not text.startswith("NOP")], warps))
    multiplying = [body for body in loops if mma_macs(body) or _wide_products(body)]
    # Only the main loop copies ahead into shared memory.
    main = [body for body in multiplying if count(body, "LDGSTS")]
    lora = [body for body in multiplying if not count(body, "LDGSTS")]
    if len(main) != 1 or len(lora) > 1:
        found = f"{len(main)} main loops and {len(lora)} of LoRA"
        raise ValueError(f"{kernel.name} for {kernel.arch}: {found}, expected 1 and at most 1")
    # An instruction of tcgen05 does not say how large its product is; those of one kernel are all alike.
    macs = tile.rows * tile.out_features * tile.in_features
    wide = _wide_products(main[0])
    of_lora = _body(lora[0], warps, wide and macs * _wide_products(lora[0]) / wide) if lora else None
    return Costs(kernel.name, warps, tile, _body(main[0], warps, macs if wide else 0.0), of_lora)


def _key(launch: Launch, arch: str) -> str:
    """What a launch is compiled for: the same machine code for the same key."""
    return repr((launch.kernel.__name__, arch, specialized(launch), sorted(launch.compiler_options.items())))


_COSTS: dict[str, Costs] = {}


def _compile_and_count(launch: Launch, arch: str) -> Costs:
    kernel, _ = compiled(launch, arch)
    with tempfile.TemporaryDirectory() as folder:
        code = machine_code(kernel, arch, Path(folder))
    name = kernel.metadata.name
    return costs_of(code, kernel.metadata.num_warps, _TILES[name](launch.values) if name in _TILES else None)


def count_all(launches: Iterable[Launch], arch: str) -> None:
    """Compile what :func:`costs` will be asked for.

    One kernel at a time: Triton parses each with Python's ``ast``, which in Python 3.11 may fail where several threads
    do ("AST constructor recursion depth mismatch").
    """
    for launch in launches:
        if (key := _key(launch, arch)) not in _COSTS:
            _COSTS[key] = _compile_and_count(launch, arch)


def costs(launch: Launch, arch: str) -> Costs:
    """Of a launch's kernel on ``arch``, "sm_90" say; compiled once."""
    count_all([launch], arch)
    return _COSTS[_key(launch, arch)]
