"""Which configuration of ``linear`` runs, for one matrix and for a stack: functions of sizes and the GPU, for the host.

The figures are of an H100 (132 multiprocessors of 4 schedulers, 1.8 GHz, 3.35 TB/s); they scale alike on other GPUs,
which only have to be told apart where a choice would change. instructions: counted in machine code,
tests/test_triton_linear_budget.py.
"""

import dataclasses
import functools
import math

import torch

from .gpu import Gpu
from .shapes import Problem, Work, best_first, has_whole_blocks, rows_each, with_rows


@dataclasses.dataclass(frozen=True)
class Config:
    """A tile of ``bm`` rows of x and ``bn`` of W, ``bk`` columns at a time, over one of ``splits`` parts of k.

    ``weight_first``: W is the left operand. With mma.sync it costs fewer instructions for few rows of x, and allows 8
    of them. Not for wgmma, which would take single bytes of W from shared memory. ``products``: so many times bk
    columns in a step of the loop, of which k is a multiple then.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    weight_first: bool = False
    splits: int = 1
    products: int = 1


# fp32 arithmetic takes an FMA for each weight and row; decoding into fp32 moves 8.5 bytes, 2.5 ps for each weight of an
# H100, and its product runs at 60 TFLOPS, 0.03 ps for each row. The kernel takes 0.1 ps (2.5 instructions): 2.5 / 0.07.
# As the CUDA kernels, so that results of both agree in how they come about:
MOST_FMA_ROWS = 16

# Decoding first costs 4.5 bytes of DRAM for each weight, 1.3 ps, before a product at 800 TFLOPS: 0.0025 ps for each
# row. The kernel on 128 rows takes 9 instructions (sm_90, wgmma) for each weight, 0.0023 ps for each row if every issue
# slot were used, and about 0.004 at the 60% that Triton's pipelines reach: 1.3 / (0.004 - 0.002) = 650 rows. An A100
# takes 9.4 for 64 rows (sm_80, mma.sync), 0.0125 ps at 60%, against 2.2 + 0.0064 ps: 360 rows. A B200's DRAM decodes in
# 0.56 ps, and the kernel's 9 instructions are 0.0033 ps for each row against 0.0009: 230 rows. A GeForce has less DRAM
# for its tensor cores than an H100; AMD's GPUs decode by more instructions.
_MOST_ROWS = {80: 256, 100: 256, 103: 256, 0: 256}
MOST_ROWS = 512  # of the others


def decodes_first(problem: Problem, gpu: Gpu) -> bool:
    """Whether W is decoded into memory before the product, torch's own."""
    p = problem
    if p.k == 0 or not has_whole_blocks(p) or 0 < gpu.capability < 80:  # no m16n8k16, no bf16
        return True
    return p.m > (MOST_FMA_ROWS if p.dtype == torch.float32 else _MOST_ROWS.get(gpu.capability, MOST_ROWS))


def _tiles(problem: Problem, gpu: Gpu) -> list[Config]:
    """The tiles that can be right for a number of rows, without splits."""
    p, m = problem, rows_each(problem)
    fits_block = p.block_size if p.format != "int8" else 64
    wide, narrow = min(fits_block, 128), min(fits_block, 64)
    if p.dtype == torch.float32:
        if not gpu.capability:  # of few rows gfx942 makes more copies than it has registers for
            return [Config(4, 64, 32, 4, 2) if m <= 4 else Config(16, 32, 32, 4, 2)]
        # As many FMAs for a weight as the tile has rows: 5 instructions in all for 1 row, 11 for 4, 24 for 16.
        if m == 1:
            return [Config(1, 64, narrow, 2, 3)]
        return [Config(4 if m <= 4 else 16, 64, 32, 2, 3)]
    if not gpu.capability:
        # MFMA, WMMA and DPAS take 16 rows at least; LDS has room for two stages. A warp of 32 lanes spills where sums
        # of a block and of all take more than 64 registers.
        if m <= 32:
            return [Config(rows, 64, narrow, 4, 2) for rows in (16, 32) if rows == 16 or m > 16]
        return [Config(64, 64, narrow, 8, 2)] + [Config(128, 128, narrow, 8, 2)] * (gpu.lanes == 64 and m > 64)
    ragged = p.k % narrow != 0  # int8's: masks, and copies of a few bytes, want registers
    few_warps = 4 if ragged else 2
    if m <= 32:
        # 2 warps of 32 rows of W each read x from shared memory half as often as 4 of 16 do, and each thread decodes
        # the scale of one row. More than 16 rows of x in a tile: half the decoding. 128 columns take 4.3 instructions
        # for a weight where 64 take 5, but for sm_90 and later ptxas then spills; so it does for 8 rows of int8.
        columns = wide if gpu.capability < 90 else narrow
        rows = 8 if m <= 8 and p.format != "int8" else 16
        found = [Config(rows, 64, columns, few_warps, 4, True)]
        return found + [Config(32, 64, narrow, few_warps, 4, True)] * (m > 16)
    found = [Config(32, 64, narrow, few_warps, 4, True)]
    if 90 <= gpu.capability < 120 or p.k % (2 * narrow):  # wgmma, and tcgen05
        found.append(Config(64, 64, narrow, 4, 4))
    else:  # 9.4 instructions for a weight, where 64 rows as the left operand take 14
        found += [Config(64, 64, narrow, 4, 3, True, products=2), Config(64, 128, narrow, 8, 3, True, products=2)]
    # Sums of a block and those of all take 64 registers each for 8 warps, which is what there is. The search for an
    # expert's rows then has some left for wgmma's operands only, and not for int8's.
    if m > 64 and not ragged and (not p.experts or (gpu.capability == 90 and p.format != "int8")):
        found.append(Config(128, 128, narrow, 8, 3))
    return found


def step_bytes(config: Config, problem: Problem) -> int:
    """Of x and W, for all products of a step."""
    code_bits = 8 if problem.format == "int8" else 4
    return config.products * config.bk * (config.bm * problem.dtype.itemsize + config.bn * code_bits // 8)


def shared_bytes(config: Config, problem: Problem) -> int:
    """An upper bound on a program's shared memory: x and codes in every stage, and W decoded in one."""
    decoded = config.bn * config.bk * problem.dtype.itemsize
    return config.stages * step_bytes(config, problem) + decoded + 4096


def instructions(config: Config, problem: Problem, gpu: Gpu) -> float:
    """About how many a program's warps issue, in all, for bk columns of 16-bit x."""
    weights = config.bn * config.bk / 32  # of a lane, if one warp decoded them all
    decoding = 2.0 if problem.format == "int8" else 3.6
    scaling = config.bm * config.bn / 32
    if gpu.capability == 90 and config.bm >= 64:  # wgmma
        return decoding * weights + scaling + 110 * config.warps
    mma = config.bm / 8 * config.bn / 16 * config.bk / 16
    if config.weight_first:
        return decoding * weights + 2 * mma + scaling + 60 * config.warps
    # Two warps that share rows of W decode them both; operands of x move to where mma.sync wants them.
    return 2 * decoding * weights + 4 * mma + scaling + 60 * config.warps


def work_of(config: Config, problem: Problem, gpu: Gpu) -> Work:
    """What predicted_cycles has to know of a configuration."""
    p = problem
    row_tiles = with_rows(p) * math.ceil(rows_each(p) / config.bm)
    return Work(
        programs=row_tiles * math.ceil(p.n / config.bn) * config.splits,
        steps=math.ceil(p.k / (config.products * config.bk * config.splits)),
        instructions=config.products * instructions(config, p, gpu),
        warps=config.warps,
        stages=config.stages,
        step_bytes=step_bytes(config, p),
        registers=255 if config.bm >= 64 else 144,
        shared_bytes=shared_bytes(config, p),
        workspace=config.splits * p.m * p.n if config.splits > 1 else 0,
    )


@functools.lru_cache(maxsize=4096)
def linear_configs(problem: Problem, gpu: Gpu) -> tuple[Config, ...]:
    """``best_first`` of them."""
    steps_of = lambda tile: problem.k // (tile.products * tile.bk)  # noqa: E731
    # Of 128 rows mma.sync leaves no register for it.
    may_split = lambda tile: tile.bm < 128 or gpu.capability in (0, 90)  # noqa: E731
    return best_first(_tiles(problem, gpu), steps_of, may_split, work_of, problem, gpu)
