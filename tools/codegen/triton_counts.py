"""What lowbit's Triton kernels cost, counted in the machine code of what the backend launches.

A product's kernel is counted by its main loop and LoRA's loop. A kernel without a loop is counted whole, with what it
does once and the rare branches of divisions.
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
    """What a program multiplies in one round of its main loop: rows of x, and rows and columns of W."""

    rows: int
    out_features: int
    in_features: int
    backward: bool = False  # sums over rows of W, not over columns

    def rounds(self, n: int, k: int) -> int:
        """Rounds of all programs together for one tile of rows of x and a W [n, k], however its sums are split."""
        return -(-n // self.out_features) * -(-k // self.in_features)

    def outputs(self, n: int, k: int) -> int:
        """How many tiles the result has for one tile of rows of x."""
        return -(-k // self.in_features) if self.backward else -(-n // self.out_features)


def _forward(constants: dict) -> Tile:
    return Tile(constants["TILE_M"], constants["TILE_N"], constants["PRODUCTS"] * constants["TILE_K"])


def _backward(constants: dict) -> Tile:
    return Tile(constants["TILE_M"], constants["TILE_N"], constants["TILE_K"], True)


#: The tile of each kernel, as a function of the launch's arguments. Kernels that are not listed have no loop.
_TILES: dict[str, Callable[[dict], Tile]] = {
    "linear_kernel": _forward,
    "grad_input_kernel": _backward,
}


@dataclass(frozen=True)
class Body:
    """What one execution of some instructions by all warps of a program costs."""

    instructions: int
    cycles: float  # of the L1/shared data path
    macs: float  # of mma.sync
    peak_macs: float = 0.0  # of wgmma and tcgen05


@dataclass(frozen=True)
class Costs:
    """Costs of a launch's kernel: of one round of its main loop, or of a whole program if ``tile`` is None."""

    kernel: str
    warps: int
    tile: Tile | None
    body: Body
    lora: Body | None = None  # a step of LoRA's loop, which follows the main one


def _body(instructions: list[str], warps: int, peak_macs: float = 0.0) -> Body:
    path, macs = data_path_cycles(instructions), mma_macs(instructions)
    return Body(warps * len(instructions), warps * path, warps * macs, peak_macs)


def _wide_products(body: list[str]) -> int:
    """The instructions of wgmma (Hopper) and tcgen05 (Blackwell)."""
    return count(body, "HGMMA") + count(body, "UTCHMMA")


def _loops(kernel: Kernel) -> list[list[str]]:
    """The loops of a kernel. Code behind its end, where it waits and jumps back, is none."""
    return [body for body in kernel.loops() if not count(body, "EXIT")]


def costs_of(kernel: Kernel, warps: int, tile: Tile | None) -> Costs:
    """The costs in a kernel's machine code. It is an error if its loops are not those that its tile describes."""
    loops = _loops(kernel)
    if tile is None:
        if loops:
            raise ValueError(f"{kernel.name} for {kernel.arch}: found a loop, but no tile for it in _TILES")
        whole = [text for _, text in kernel.instructions]
        return Costs(kernel.name, warps, None, _body([text for text in whole if not text.startswith("NOP")], warps))
    multiplying = [body for body in loops if mma_macs(body) or _wide_products(body)]
    # Only the main loop copies ahead into shared memory.
    main = [body for body in multiplying if count(body, "LDGSTS")]
    lora = [body for body in multiplying if not count(body, "LDGSTS")]
    if len(main) != 1 or len(lora) > 1:
        found = f"{len(main)} main loops and {len(lora)} of LoRA"
        raise ValueError(f"{kernel.name} for {kernel.arch}: {found}, expected 1 and at most 1")
    # An instruction of tcgen05 does not state the size of its product, but all of one kernel have the same size.
    macs = tile.rows * tile.out_features * tile.in_features
    wide = _wide_products(main[0])
    of_lora = _body(lora[0], warps, wide and macs * _wide_products(lora[0]) / wide) if lora else None
    return Costs(kernel.name, warps, tile, _body(main[0], warps, macs if wide else 0.0), of_lora)


def _key(launch: Launch, arch: str) -> str:
    """What a launch is compiled for. Equal keys mean equal machine code."""
    return repr((launch.kernel.__name__, arch, specialized(launch), sorted(launch.compiler_options.items())))


_COSTS: dict[str, Costs] = {}


def _compile_and_count(launch: Launch, arch: str) -> Costs:
    kernel, _ = compiled(launch, arch)
    with tempfile.TemporaryDirectory() as folder:
        code = machine_code(kernel, arch, Path(folder))
    name = kernel.metadata.name
    return costs_of(code, kernel.metadata.num_warps, _TILES[name](launch.values) if name in _TILES else None)


def count_all(launches: Iterable[Launch], arch: str) -> None:
    """Compile what :func:`costs` will be asked for, one kernel at a time.

    Triton parses kernels with Python's ``ast``, which in Python 3.11 may fail in several threads ("AST constructor
    recursion depth mismatch").
    """
    for launch in launches:
        if (key := _key(launch, arch)) not in _COSTS:
            _COSTS[key] = _compile_and_count(launch, arch)


def costs(launch: Launch, arch: str) -> Costs:
    """The costs of a launch's kernel on ``arch``, such as "sm_90". The kernel is compiled once."""
    count_all([launch], arch)
    return _COSTS[_key(launch, arch)]
