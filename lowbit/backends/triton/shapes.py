"""What choices of configurations have in common: the sizes they depend on, and the model of costs that orders them.

``shapes_forward.py`` and ``shapes_backward.py`` choose, for one matrix and for a stack. Nothing is measured here.
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from .gpu import Gpu, shared_bytes_of


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product with W [n, k] of m rows (``rows_of``), forward or backward; or with a stack of ``experts`` such W, of
    which each has about as many of the rows (0: no stack). ``format``: of W, in blocks of ``block_size`` but for int8.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    format: str
    block_size: int
    experts: int = 0


#: Numbers of rows between which a choice may change; all above the last are one. No more than these, because
#: torch.compile makes a graph for each, of which it allows 8 (and one row is another for it).
_ROWS = {torch.float32: (1, 4, 16, 64), torch.float16: (8, 16, 32, 64, 256, 512)}
_ROWS[torch.bfloat16] = _ROWS[torch.float16]


def rows_of(m: int, dtype: torch.dtype) -> int:
    """m rounded up to one of few numbers. By comparisons: where torch.compile has a symbol for m, a graph then serves
    all numbers in between.
    """
    for rows in _ROWS[dtype]:
        if m <= rows:
            return rows
    return 2 * _ROWS[dtype][-1]


def has_whole_blocks(problem: Problem) -> bool:
    """Whether no block crosses rows of W."""
    return problem.format == "int8" or problem.k % problem.block_size == 0


def with_rows(problem: Problem) -> int:
    """The number of matrices that have rows, if these are spread evenly."""
    return min(max(problem.experts, 1), problem.m)


def rows_each(problem: Problem) -> int:
    """Rows of each matrix that has any."""
    return math.ceil(problem.m / max(with_rows(problem), 1))


@dataclasses.dataclass(frozen=True)
class Work:
    """What a configuration makes of a problem: ``programs`` of ``warps``, each with a loop of ``steps``."""

    programs: int
    steps: int
    instructions: float  # that a program's warps issue in a step, in all
    warps: int
    stages: int
    step_bytes: int  # that a program copies from the L2 cache in a step
    registers: int  # of a thread
    shared_bytes: int  # of a program, at most
    workspace: int = 0  # fp32 sums of all splits


def predicted_cycles(work: Work, problem: Problem, gpu: Gpu) -> float:
    """Of a multiprocessor: a lower bound that orders configurations, not a prediction of time."""
    resident = max(1, min(65536 // (32 * work.warps * work.registers), shared_bytes_of(gpu) // work.shared_bytes))
    waves = math.ceil(work.programs / (gpu.processors * resident))
    together = min(resident, math.ceil(work.programs / gpu.processors))
    issue = together * work.instructions / 4
    copying = together * work.step_bytes / 32  # of 24 (H100) to 47 (A100) bytes a cycle
    latency = 1200 / max(work.stages - 1, 1)  # of DRAM under load, hidden by so many steps on their way
    cycles = waves * (work.steps * max(issue, copying, latency) + 2500)
    if work.workspace:
        cycles += 4000 + 8 * work.workspace / (14 * gpu.processors)  # a launch, and the workspace twice
    weights = with_rows(problem) * problem.n * problem.k
    code_bytes = 1 if problem.format == "int8" else 0.52
    return max(cycles, weights * code_bytes / (14 * gpu.processors))  # 14 bytes a cycle for each multiprocessor


def splits_of(steps: int) -> tuple[int, ...]:
    """Into how many parts a contraction of so many steps may go: a program with 4 steps still fills its pipeline."""
    return tuple(splits for splits in (1, 2, 4, 8, 16) if splits == 1 or steps >= 4 * splits)


def best_first(tiles: list, steps_of: Callable, may_split: Callable, work_of: Callable, problem: Problem, gpu: Gpu):
    """Up to 8 configurations, the best by :func:`predicted_cycles` first; never empty.

    They are the ``tiles`` that the GPU has shared memory for, each in every number of parts that its steps allow.
    """
    found = []
    for tile in tiles:
        for splits in splits_of(steps_of(tile)) if may_split(tile) else (1,):
            config = dataclasses.replace(tile, splits=splits)
            work = work_of(config, problem, gpu)
            if work.shared_bytes <= shared_bytes_of(gpu):
                found.append((predicted_cycles(work, problem, gpu), config))
    return tuple(config for _, config in sorted(found, key=lambda each: each[0]))[:8]


def splits_to_fill(programs: int, steps: int, gpu: Gpu) -> int:
    """The fewest such parts that give every multiprocessor two programs, so that one loads while the other waits."""
    allowed = splits_of(steps)
    return next((splits for splits in allowed if programs * splits >= 2 * gpu.processors), allowed[-1])
