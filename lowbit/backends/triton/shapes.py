"""Every choice of a kernel's shape: functions of sizes and of the GPU. The host calls them; nothing is measured here.

The figures are of an H100 (132 multiprocessors of 4 schedulers, 1.8 GHz, 3.35 TB/s). They scale alike on other GPUs,
which are told apart only where a choice changes. Instructions are counted in machine code,
tests/test_triton_*_budget.py. In every name ``m`` counts rows of x, ``n`` rows of W and ``k`` columns of both.
"""

import dataclasses
import functools

import torch

from ...format import WeightSpec


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up. In Python, Triton's cdiv costs 5 us, and so does its next_power_of_2."""
    return -(-a // b)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least ``number`` and 1."""
    return 1 << max(number - 1, 0).bit_length()


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What choices depend on of a GPU.

    ``capability``: 10 major + minor on NVIDIA, else 0. ``processors``: multiprocessors; compute units on AMD, and on
    Intel. ``lanes``: threads of a warp.
    """

    capability: int
    processors: int
    lanes: int = 32

    @property
    def shared_bytes(self) -> int:
        """What a program may have of shared memory. Source: CUDA programming guide, table of compute capabilities."""
        if self.capability == 0:
            return 64 * 1024
        return {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(self.capability, 99) * 1024

    @property
    def has_wgmma(self) -> bool:
        """Whether it has sm_90's wgmma, or tcgen05, which Triton uses in its place for sm_100."""
        return 90 <= self.capability < 120


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that ``device`` is; an A100 where there is none (tests)."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        major, minor = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
        return Gpu(10 * major + minor, properties.multi_processor_count, getattr(properties, "warp_size", 32))
    if device.type == "xpu":
        return Gpu(0, torch.xpu.get_device_properties(device).max_compute_units)
    return Gpu(0, 108) if torch.version.hip else Gpu(80, 108)


#: Warps of every kernel that is not a product with W.
WARPS = 4
#: Elements that a program quantizes or encodes: a thread stores 16 bytes at a time, which are 32 codes.
QUANTIZE_TILE = 4096
#: Groups of 256 scales that a program encodes, 16 scales per thread.
GROUPS_TILE = 8
#: Blocks that a program searches, with four of each sixteen elements in a thread.
SEARCH_TILE = 32
#: Packed bytes that a program decodes: 16 in each load of a thread, and as many loads as leave room in the registers.
#: More of them share what a program does once (5.9 instructions per weight; with one load each 7.4).
DEQUANTIZE_TILE = {torch.float32: 4096, torch.float16: 8192, torch.bfloat16: 8192}
#: Elements of an int8 weight that a program quantizes or decodes at a time.
QUANTIZE_ROWS_TILE, DEQUANTIZE_ROWS_TILE = 4096, 8192
#: Elements of a product that a program sums over its splits.
SUM_TILE = 1024
#: Elements that a program of optimizer_step takes, 16 in each thread: so many codes are one access.
OPTIMIZER_TILE = 2048
#: Elements whose squares a program sums.
SUM_OF_SQUARES_TILE = 4096
#: Rows of a LoRA factor that a program rounds at a time. Where the rank is less than FACTOR_PROGRAMS, so many programs
#: keep enough loads on their way; more would each read all of the low factor.
FACTOR_TILE, FACTOR_PROGRAMS = 1024, 128


def rows_tile(columns: int, elements: int) -> tuple[int, int]:
    """Return (rows, columns) that a program takes of an int8 weight at a time: part of a long row, or several.

    ``elements``: of the tile, a power of two of at least 64.
    """
    width = min(elements, max(64, next_power_of_2(columns)))
    return elements // width, width


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product with W [n, k] that a configuration is chosen for.

    ``op``: "linear", which sums over k, or "linear_grad_input", which sums over n. ``m``: as from ``rows_of``. With
    ``experts`` the product is with a stack of so many W, each of which has about as many of the rows (0: no stack).
    """

    op: str
    m: int
    n: int
    k: int
    dtype: torch.dtype
    spec: WeightSpec
    experts: int = 0

    @property
    def is_forward(self) -> bool:
        return self.op == "linear"

    @property
    def has_whole_blocks(self) -> bool:
        """Whether no block crosses rows of W."""
        return self.spec.block_size is None or self.k % self.spec.block_size == 0

    @property
    def with_rows(self) -> int:
        """The number of matrices that have rows, if these are spread evenly."""
        return min(max(self.experts, 1), self.m)

    @property
    def rows_each(self) -> int:
        """Rows of each matrix that has any."""
        return ceil_div(self.m, max(self.with_rows, 1))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of W."""
        return self.k * self.spec.record.bits // 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of ``tile_m`` rows of x (or of its gradient) by ``tile_n`` rows and ``tile_k`` columns of W.

    A program sums over one of ``splits`` parts of k, or of n (``Problem.op``), in steps of one tile. Only for "linear":
    ``weight_first``: W is the left operand. With mma.sync it costs fewer instructions for few rows of x, and allows 8
    of them. Not for wgmma, which would take single bytes of W from shared memory. ``products``: so many tiles in a step
    of the loop, of which k is a multiple then.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    warps: int
    stages: int
    weight_first: bool = False
    splits: int = 1
    products: int = 1


#: Numbers of rows between which a choice may change; all above the last are one. No more than these, because
#: torch.compile makes a graph for each, of which it allows 8 (and one row is another for it).
_ROWS = {torch.float32: (1, 4, 16, 64), torch.float16: (8, 16, 32, 64, 256, 512)}
_ROWS[torch.bfloat16] = _ROWS[torch.float16]


def rows_of(m: int, dtype: torch.dtype) -> int:
    """Return m rounded up to one of few numbers. Comparisons find it: where torch.compile has a symbol for m, one graph
    serves all numbers in between.
    """
    for rows in _ROWS[dtype]:
        if m <= rows:
            return rows
    return 2 * _ROWS[dtype][-1]


# linear in fp32 takes an FMA for each weight and row; decoding into fp32 moves 8.5 bytes, 2.5 ps for each weight of an
# H100, and its product runs at 60 TFLOPS, 0.03 ps for each row. The kernel takes 0.1 ps (2.5 instructions): 2.5 / 0.07.
# 16 as the CUDA kernels, so that results of both agree in how they come about. The gradient's kernel takes 42
# instructions for 32 rows, 0.07 ps for each at 65% of the issue slots.
MOST_FMA_ROWS = {"linear": 16, "linear_grad_input": 64}

# linear in 16 bits: decoding first costs 4.5 bytes of DRAM for each weight, 1.3 ps, before a product at 800 TFLOPS,
# 0.0025 ps for each row. The kernel on 128 rows takes 9 instructions (sm_90, wgmma) for each weight, 0.0023 ps for each
# row if every issue slot were used, and about 0.004 at the 60% that Triton's pipelines reach: 1.3 / (0.004 - 0.002) =
# 650 rows. An A100 takes 9.4 for 64 rows (sm_80, mma.sync), 0.0125 ps at 60%, against 2.2 + 0.0064 ps: 360 rows. A
# B200's DRAM decodes in 0.56 ps, and the kernel's 9 instructions are 0.0033 ps for each row against 0.0009: 230 rows. A
# GeForce has less DRAM for its tensor cores than an H100; AMD's GPUs decode by more instructions.
# The gradient's kernel takes 10 instructions for 128 rows with wgmma, 0.0045 ps for each row at 60% of the issue slots:
# 650 rows, and half of that for 4096 x 4096, whose tiles fill half of the GPU. On an A100 12 instructions for 64 rows,
# 0.016 ps for each: 230 rows.
MOST_ROWS = {"linear": 512, "linear_grad_input": 256}
_MOST_LINEAR_ROWS = {80: 256, 100: 256, 103: 256, 0: 256}


def decodes_first(problem: Problem, gpu: Gpu) -> bool:
    """Whether W is decoded into memory before the product, torch's own."""
    p = problem
    if (p.k if p.is_forward else p.n) == 0 or not p.has_whole_blocks or 0 < gpu.capability < 80:  # no m16n8k16, no bf16
        return True
    if p.dtype == torch.float32:
        return p.m > MOST_FMA_ROWS[p.op]
    most = MOST_ROWS[p.op]
    return p.m > (_MOST_LINEAR_ROWS.get(gpu.capability, most) if p.is_forward else most)


def tiles(problem: Problem, gpu: Gpu) -> list[Config]:
    """Return the tiles that can be right for the problem's number of rows, without splits."""
    return _forward_tiles(problem, gpu) if problem.is_forward else _backward_tiles(problem, gpu)


def _forward_tiles(problem: Problem, gpu: Gpu) -> list[Config]:
    p, m, is_bytes = problem, problem.rows_each, problem.spec.record.bits == 8
    fits_block = p.spec.block_size or 64
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
        rows = 8 if m <= 8 and not is_bytes else 16
        found = [Config(rows, 64, columns, few_warps, 4, True)]
        return found + [Config(32, 64, narrow, few_warps, 4, True)] * (m > 16)
    found = [Config(32, 64, narrow, few_warps, 4, True)]
    if gpu.has_wgmma or p.k % (2 * narrow):
        found.append(Config(64, 64, narrow, 4, 4))
    else:  # 9.4 instructions for a weight, where 64 rows as the left operand take 14
        found += [Config(64, 64, narrow, 4, 3, True, products=2), Config(64, 128, narrow, 8, 3, True, products=2)]
    # Sums of a block and those of all take 64 registers each for 8 warps, which is what there is. The search for an
    # expert's rows then has some left for wgmma's operands only, and not for int8's.
    if m > 64 and not ragged and (not p.experts or (gpu.capability == 90 and not is_bytes)):
        found.append(Config(128, 128, narrow, 8, 3))
    return found


def _backward_tiles(problem: Problem, gpu: Gpu) -> list[Config]:
    """Return tiles for linear_grad_input.

    16 bits: 64 rows of W at a time, in pieces of 128 bytes. Up to 32 rows of grad, where reading and decoding W is
    the work, four warps: a lane's 4 bytes of a row come with one load, 8.0 to 8.8 instructions a weight on sm_80. More
    rows take eight warps, with 2 bytes to a lane: 64 rows at 11.7 instructions a weight, of which one is an HMMA, 8
    cycles of an A100's tensor core. wgmma keeps no grad in registers: 128 rows fit without a spill, 10.0 instructions
    for 8 cycles of an H100's tensor core, where 64 rows are 9.9 for 4. (On sm_80 128 rows spill.) Narrow matrices take
    pieces of 64 bytes, the least that four warps divide.

    fp32 multiplies with FMAs, whose operands go through shared memory: small tiles. So does anything but an NVIDIA GPU,
    where codes are decoded by selections, in fp32: gfx1100 spills with larger ones.
    """
    p, m, bits = problem, problem.rows_each, problem.spec.record.bits
    is_narrow, narrow, wide = p.row_bytes <= 64, 64 * 8 // bits, 128 * 8 // bits
    if p.dtype == torch.float32:  # on sm_80 ptxas spills registers of few rows, and of narrow ones, with 32 rows of W
        small = not gpu.capability or is_narrow or m <= 16
        return [Config(16, 16, narrow, 4, 2) if small else Config(32, 32, narrow, 4, 2)]
    sizes = [rows for rows in (16, 32, 64, 128) if rows == 16 or rows < 2 * m]
    if not gpu.capability:
        return [Config(rows, 32, narrow, 4, 2) for rows in sizes if rows <= 64]
    if p.row_bytes % 16:  # int8 of odd widths: copies of few bytes want registers
        return [Config(rows, 64, narrow, 4, 3) for rows in sizes if rows in (16, 64)]
    if is_narrow:
        return [Config(rows, 64, narrow, 4, 3) for rows in sizes if rows <= 64]
    # int8 has half as many columns in so many bytes: 4 warps then take 6.5 instructions with wgmma, where 8 take 7.9.
    # sm_120 spills with 8, sm_80 with 4.
    few_warps = bits == 8 and gpu.capability >= 90
    sizes = [rows for rows in sizes if rows <= 64 or gpu.has_wgmma]
    return [Config(rows, 64, wide, 4 if rows <= 32 or few_warps else 8, 3) for rows in sizes]


def steps_of(config: Config, problem: Problem) -> int:
    """Return the steps of the sum, in all splits together."""
    p = problem
    return ceil_div(p.k, config.products * config.tile_k) if p.is_forward else ceil_div(p.n, config.tile_n)


def split_rows(config: Config, n: int) -> int:
    """Return how many rows of W (of n) a split of linear_grad_input sums over: whole steps."""
    return ceil_div(ceil_div(n, config.tile_n), config.splits) * config.tile_n


def step_bytes(config: Config, problem: Problem) -> int:
    """Return the bytes of x and of W that a program copies from the L2 cache in a step."""
    summed = config.tile_k if problem.is_forward else config.tile_n
    of_x = config.tile_m * summed * problem.dtype.itemsize
    return config.products * (of_x + config.tile_n * config.tile_k * problem.spec.record.bits // 8)


def shared_bytes(config: Config, problem: Problem) -> int:
    """Return an upper bound on a program's shared memory: x and codes in every stage, and W decoded in one.

    FMAs, wgmma and tcgen05 read the decoded W from there.
    """
    decoded = config.tile_n * config.tile_k * problem.dtype.itemsize
    return config.stages * step_bytes(config, problem) + decoded + 4096


def instructions(config: Config, problem: Problem, gpu: Gpu) -> float:
    """Return about how many a program's warps issue in all for one tile of W; for linear of 16-bit x."""
    is_bytes = problem.spec.record.bits == 8
    weights = config.tile_n * config.tile_k / 32  # of a lane, if one warp decoded them all
    wide_products = config.tile_m >= 64 and gpu.has_wgmma
    if not problem.is_forward:
        if problem.dtype == torch.float32:
            return (19 + 0.7 * config.tile_m) * weights
        decoding = 5.1 if is_bytes else 7.6
        if wide_products:
            return (decoding + 2) * weights
        # Every warp reads all of grad for its own columns, of which 8 warps have half as many.
        reading = 0.03 * config.tile_m * 256 / config.tile_k * (2 if config.tile_m >= 64 else 1)
        return (decoding + reading) * weights
    decoding = 2.0 if is_bytes else 3.6
    scaling = config.tile_m * config.tile_n / 32
    if wide_products and gpu.capability == 90:
        return decoding * weights + scaling + 110 * config.warps
    mma = config.tile_m / 8 * config.tile_n / 16 * config.tile_k / 16
    if config.weight_first:
        return decoding * weights + 2 * mma + scaling + 60 * config.warps
    # Two warps that share rows of W decode them both; operands of x move to where mma.sync wants them.
    return 2 * decoding * weights + 4 * mma + scaling + 60 * config.warps


def _registers(config: Config, problem: Problem) -> int:
    """Return the registers of a thread."""
    if problem.is_forward:
        return 255 if config.tile_m >= 64 else 144
    return 255 if config.tile_m >= 64 and config.warps == 4 else 168


def predicted_cycles(config: Config, problem: Problem, gpu: Gpu) -> float:
    """Return cycles of a multiprocessor: a lower bound that orders configurations, not a prediction of time."""
    p, (width, tile) = problem, (problem.n, config.tile_n) if problem.is_forward else (problem.k, config.tile_k)
    programs = p.with_rows * ceil_div(p.rows_each, config.tile_m) * ceil_div(width, tile) * config.splits
    by_registers = 65536 // (32 * config.warps * _registers(config, p))
    resident = max(1, min(by_registers, gpu.shared_bytes // shared_bytes(config, p)))
    waves = ceil_div(programs, gpu.processors * resident)
    together = min(resident, ceil_div(programs, gpu.processors))
    issue = together * config.products * instructions(config, p, gpu) / 4
    copying = together * step_bytes(config, p) / 32  # of 24 (H100) to 47 (A100) bytes a cycle
    latency = 1200 / max(config.stages - 1, 1)  # of DRAM under load, hidden by so many steps on their way
    cycles = waves * (ceil_div(steps_of(config, p), config.splits) * max(issue, copying, latency) + 2500)
    if config.splits > 1:
        # A launch, and the fp32 sums of all splits, which pass through memory twice.
        cycles += 4000 + 8 * config.splits * p.m * width / (14 * gpu.processors)
    code_bytes = 1 if p.spec.record.bits == 8 else 0.52
    # 14 bytes a cycle for each multiprocessor
    return max(cycles, p.with_rows * p.n * p.k * code_bytes / (14 * gpu.processors))


def splits_of(steps: int) -> tuple[int, ...]:
    """Return into how many parts a sum of so many steps may go: a program with 4 steps still fills its pipeline."""
    return tuple(splits for splits in (1, 2, 4, 8, 16) if splits == 1 or steps >= 4 * splits)


@functools.lru_cache(maxsize=4096)
def configs(problem: Problem, gpu: Gpu) -> tuple[Config, ...]:
    """Return up to 8 configurations, the best by :func:`predicted_cycles` first; never empty.

    They are the :func:`tiles` that the GPU has shared memory for, each in every number of parts that its steps allow.
    """
    found = []
    for tile in tiles(problem, gpu):
        # A tile of 128 rows leaves no register for parts, but where linear has wgmma or is not NVIDIA's.
        may_split = tile.tile_m < 128 or (problem.is_forward and gpu.capability in (0, 90))
        for splits in splits_of(steps_of(tile, problem)) if may_split else (1,):
            config = dataclasses.replace(tile, splits=splits)
            if shared_bytes(config, problem) <= gpu.shared_bytes:
                found.append((predicted_cycles(config, problem, gpu), config))
    return tuple(config for _, config in sorted(found, key=lambda each: each[0]))[:8]


def _lora_tile(features: int) -> int:
    return min(64, max(16, next_power_of_2(features)))


def grouped_matmul_config(m: int, n: int, k: int, experts: int, dtype: torch.dtype, gpu: Gpu) -> Config:
    """Return the configuration of grouped_matmul: m rows by dense matrices [n, k], one of n and k being LoRA's rank."""
    is_fp32 = dtype == torch.float32  # whose operands pass through shared memory
    tile_m = 16 if m <= 16 * experts or is_fp32 else 64  # few rows to an expert: small tiles
    tile_n, tile_k = _lora_tile(n), 32 if is_fp32 else 64
    # The rank is one tile: a row's product with it is one program's for all of k, if it is not split. The fewest splits
    # that give every multiprocessor two programs, so that one loads while the other waits.
    programs, allowed = row_tile_count(m, experts, tile_m) * ceil_div(n, tile_n), splits_of(ceil_div(k, tile_k))
    splits = next((splits for splits in allowed if programs * splits >= 2 * gpu.processors), allowed[-1])
    return Config(tile_m, tile_n, tile_k, WARPS, 3, splits=splits)


def grouped_outer_config(n: int, k: int) -> Config:
    """Return the configuration of grouped_outer, whose results are [n, k]. A step sums over tile_m rows."""
    return Config(32, _lora_tile(n), _lora_tile(k), WARPS, 2)


def row_tile_count(m: int, experts: int, tile_m: int) -> int:
    """Return an upper bound on the tiles of rows: those of each expert are its own, and its last one may be short."""
    return min(ceil_div(m, tile_m) + experts, m) if experts else ceil_div(m, tile_m)
