"""Which configuration of ``linear_grad_input`` runs, for one matrix and for a stack, and whether W is decoded first.

instructions: counted in machine code, tests/test_triton_grad_input_budget.py. Figures of GPUs as in
``shapes_forward.py``.
"""

import dataclasses
import functools
import math

import torch

from .gpu import Gpu
from .shapes import Problem, Work, best_first, has_whole_blocks, rows_each, with_rows


@dataclasses.dataclass(frozen=True)
class Config:
    """A tile of tile_m rows of grad by ``bytes`` bytes of a row of W, summed over tile_n rows of W at a time, over one
    of ``splits`` parts of them.
    """

    tile_m: int
    tile_n: int
    bytes: int
    warps: int
    stages: int
    splits: int = 1


def split_rows(config: Config, n: int) -> int:
    """How many rows of W (of n) a split sums over: whole steps."""
    return math.ceil(math.ceil(n / config.tile_n) / config.splits) * config.tile_n


def _has_wgmma(gpu: Gpu) -> bool:
    """sm_90's, and what Triton makes of it for sm_100: tcgen05."""
    return 90 <= gpu.capability < 120


# As for linear: decoding first costs 1.3 ps for each weight of an H100, and 0.0025 for each row. The kernel takes 10
# instructions for 128 rows with wgmma, 0.0045 ps for each row at 60% of the issue slots: they meet at 650 rows, at half
# of that for 4096 x 4096, whose tiles fill half of the GPU. On an A100, 2.2 + 0.0064 ps, against 12 instructions for 64
# rows, 0.016 ps for each: 230 rows.
MOST_ROWS = 256

# Decoding into fp32 takes 2.5 ps and its product 0.03 for each row; the kernel 42 instructions for 32 rows, 0.07 ps for
# each at 65% of the issue slots.
MOST_FMA_ROWS = 64


def decodes_first(problem: Problem, gpu: Gpu) -> bool:
    """Whether W is decoded into memory before the product, torch's own."""
    p = problem
    if p.n == 0 or not has_whole_blocks(p) or 0 < gpu.capability < 80:  # no m16n8k16, no bf16
        return True
    return p.m > (MOST_FMA_ROWS if p.dtype == torch.float32 else MOST_ROWS)


def row_bytes(problem: Problem) -> int:
    """Bytes of a row of W."""
    return problem.k if problem.format == "int8" else problem.k // 2


def _tiles(problem: Problem, gpu: Gpu) -> list[Config]:
    """The tiles that can be right for a number of rows, without splits.

    16 bits: 64 rows of W at a time, in pieces of 128 bytes. Up to 32 rows of grad, where reading and decoding W is the
    work, four warps: a lane's 4 bytes of a row come with one load, 8.0 to 8.8 instructions a weight on sm_80. More rows
    take eight warps, with 2 bytes to a lane: 64 rows at 11.7 instructions a weight, of which one is an HMMA, 8 cycles
    of an A100's tensor core. wgmma keeps no grad in registers: 128 rows fit without a spill, 10.0 instructions for 8
    cycles of an H100's tensor core, where 64 rows are 9.9 for 4. (On sm_80 128 rows spill.) Narrow matrices take pieces
    of 64 bytes, the least that four warps divide.

    fp32 multiplies with FMAs, whose operands go through shared memory: small tiles. So does anything but an NVIDIA GPU,
    where codes are decoded by selections, in fp32: gfx1100 spills with larger ones.
    """
    p, m = problem, rows_each(problem)
    narrow = row_bytes(p) <= 64
    if p.dtype == torch.float32:  # on sm_80 ptxas spills registers of few rows, and of narrow ones, with 32 rows of W
        small = not gpu.capability or narrow or m <= 16
        return [Config(16, 16, 64, 4, 2) if small else Config(32, 32, 64, 4, 2)]
    sizes = [rows for rows in (16, 32, 64, 128) if rows == 16 or rows < 2 * m]
    if not gpu.capability:
        return [Config(rows, 32, 64, 4, 2) for rows in sizes if rows <= 64]
    if row_bytes(p) % 16:  # int8 of odd widths: copies of few bytes want registers
        return [Config(rows, 64, 64, 4, 3) for rows in sizes if rows in (16, 64)]
    if narrow:
        return [Config(rows, 64, 64, 4, 3) for rows in sizes if rows <= 64]
    # int8 has half as many columns in so many bytes: 4 warps then take 6.5 instructions with wgmma, where 8 take 7.9.
    # sm_120 spills with 8, sm_80 with 4.
    few_warps = p.format == "int8" and gpu.capability >= 90
    return [
        Config(rows, 64, 128, 4 if rows <= 32 or few_warps else 8, 3) for rows in sizes if rows <= 64 or _has_wgmma(gpu)
    ]


def _columns(config: Config, problem: Problem) -> int:
    return config.bytes * (1 if problem.format == "int8" else 2)


def step_bytes(config: Config, problem: Problem) -> int:
    """Of grad and W, for tile_n rows of W."""
    return config.tile_n * (config.tile_m * problem.dtype.itemsize + config.bytes)


def shared_bytes(config: Config, problem: Problem) -> int:
    """An upper bound on a program's shared memory: grad and codes in every stage, and W decoded in one.

    (Which FMAs and tcgen05 read from there.)
    """
    decoded = config.tile_n * _columns(config, problem) * problem.dtype.itemsize
    return config.stages * step_bytes(config, problem) + decoded + 4096


def instructions(config: Config, problem: Problem, gpu: Gpu) -> float:
    """About how many a program's warps issue, in all, for a step of tile_n rows of W."""
    columns = _columns(config, problem)
    weights = config.tile_n * columns / 32
    if problem.dtype == torch.float32:
        return (19 + 0.7 * config.tile_m) * weights
    decoding = 5.1 if problem.format == "int8" else 7.6
    if config.tile_m >= 64 and _has_wgmma(gpu):
        return (decoding + 2) * weights
    # Every warp reads all of grad for its own columns, of which 8 warps have half as many.
    return (decoding + 0.03 * config.tile_m * 256 / columns * (2 if config.tile_m >= 64 else 1)) * weights


def work_of(config: Config, problem: Problem, gpu: Gpu) -> Work:
    """What predicted_cycles has to know of a configuration."""
    p = problem
    row_tiles = with_rows(p) * math.ceil(rows_each(p) / config.tile_m)
    return Work(
        programs=row_tiles * math.ceil(p.k / _columns(config, p)) * config.splits,
        steps=split_rows(config, p.n) // config.tile_n,
        instructions=instructions(config, p, gpu),
        warps=config.warps,
        stages=config.stages,
        step_bytes=step_bytes(config, p),
        registers=255 if config.tile_m >= 64 and config.warps == 4 else 168,
        shared_bytes=shared_bytes(config, p),
        workspace=config.splits * p.m * p.k if config.splits > 1 else 0,
    )


@functools.lru_cache(maxsize=4096)
def grad_input_configs(problem: Problem, gpu: Gpu) -> tuple[Config, ...]:
    """``best_first`` of them."""
    steps_of = lambda tile: math.ceil(problem.n / tile.tile_n)  # noqa: E731
    may_split = lambda tile: tile.tile_m < 128  # of 128 rows no register is left for it  # noqa: E731
    return best_first(_tiles(problem, gpu), steps_of, may_split, work_of, problem, gpu)
