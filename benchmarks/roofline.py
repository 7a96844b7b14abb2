"""GPUs, and how long one should take for a piece of work.

What a kernel takes is the longest of four, after a ramp in which its first blocks start and its last ones end:

- DRAM: bytes that are read and written once, at the bandwidth that large copies reach;
- L2: bytes that blocks read and write there, those of DRAM included;
- L1/shared: what goes through the data path of L1 and shared memory;
- issue + tensor: instructions at the share of the issue slots that the resident warps fill, and then the products. The
  machine code of every kernel that is counted here decodes between its products, in the warps that ask for them; so the
  two add. published.py compares the rule with published times.

The last three wait for the last wave of blocks, where the number of blocks is known.
"""

from dataclasses import dataclass

TITLE = "PREDICTION from counted instructions, not a measurement"
#: Microseconds from a launch on an idle GPU until its blocks run, with their end; of a launch behind another.
FIRST_LAUNCH, NEXT_LAUNCH = 2.0, 1.0
#: The share of the issue slots that loops of loads, decoding and products fill, at most; and for each resident warp of
#: a multiprocessor where there are few: one warp of a scheduler's issues in every fourth or fifth cycle, since most
#: instructions need the result of one before.
MOST_ISSUED, ISSUED_PER_WARP = 0.6, 0.22 / 4


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    ``bandwidth`` and ``peak`` are what is reached: 90% of the data sheet's bandwidth (an H200 copies 4.3 of 4.8 TB/s),
    80% of its dense rate. ``l2_bandwidth`` is that of reads: 5.5 TB/s on an H100 (Chips and Cheese, "Nvidia's H100",
    2023), scaled by clock and multiprocessors elsewhere. ``mma``: 16-bit FMAs per cycle and multiprocessor that
    mma.sync reaches with fp32 sums; on Hopper 62% of the peak (Luo et al., "Benchmarking and Dissecting the Nvidia
    Hopper GPU Architecture via Microbenchmarking", 2024). The B200's peak needs tcgen05; its mma.sync is assumed to be
    the A100's.
    """

    name: str
    arch: str
    processors: int
    clock: float  # GHz
    bandwidth: float  # GB/s
    peak: float  # TFLOP/s, bf16 with fp32 sums
    mma: float
    l2: int  # MB
    l2_bandwidth: float  # GB/s


GPUS = (
    Gpu("A100 80GB", "sm_80", 108, 1.41, 1835, 250, 1024, 40, 3500),
    Gpu("H100 SXM", "sm_90", 132, 1.83, 3000, 790, 1270, 50, 5500),
    Gpu("H200", "sm_90", 132, 1.83, 4300, 790, 1270, 50, 5500),
    Gpu("B200", "sm_100", 148, 1.85, 7200, 1800, 1024, 126, 9000),
    Gpu("RTX 4090", "sm_89", 128, 2.52, 930, 160, 256, 72, 5000),
)


@dataclass(frozen=True)
class Work:
    """What all programs of a kernel do together."""

    bytes: float  # of DRAM
    instructions: float = 0.0  # that warps issue
    cycles: float = 0.0  # of a multiprocessor's L1/shared data path
    macs: float = 0.0  # of mma.sync
    peak_macs: float = 0.0  # of wgmma, tcgen05 and dense products, which reach the peak
    l2_bytes: float = 0.0  # read again by other blocks, besides ``bytes``
    blocks: int = 0  # that share the work evenly; 0: as many as fill the GPU
    warps: int = 64  # resident on a multiprocessor


@dataclass(frozen=True)
class Prediction:
    """Microseconds with those of the launches, what bounds them, and the kernel or the steps that take them."""

    microseconds: float
    bound: str
    path: str


def last_wave(gpu: Gpu, blocks: int) -> float:
    """How much longer the work takes than if it were spread over all multiprocessors evenly."""
    return 1.0 if blocks == 0 else -(-blocks // gpu.processors) * gpu.processors / blocks


def least_time(gpu: Gpu, path: str, work: Work) -> Prediction:
    """One launch. A multiprocessor issues the instructions of 4 warps in a cycle."""
    cycles_per_second = gpu.processors * gpu.clock * 1e9
    issue = work.instructions / (4 * cycles_per_second) / min(MOST_ISSUED, work.warps * ISSUED_PER_WARP)
    tensor = work.macs / (gpu.mma * cycles_per_second) + work.peak_macs / (gpu.peak / 2 * 1e12)
    waves = last_wave(gpu, work.blocks)
    seconds = {
        "DRAM": work.bytes / (gpu.bandwidth * 1e9),
        "L2": waves * (work.bytes + work.l2_bytes) / (gpu.l2_bandwidth * 1e9),
        "L1/shared": waves * work.cycles / cycles_per_second,
        "issue + tensor": waves * (issue + tensor),
    }
    bound = max(seconds, key=seconds.get)
    return Prediction(FIRST_LAUNCH + seconds[bound] * 1e6, bound, path)


def one_after_another(path: str, steps: list[Prediction]) -> Prediction:
    """The sum of the steps' times, with the bound of the longest step."""
    longest = max(steps, key=lambda step: step.microseconds)
    total = sum(step.microseconds for step in steps) - (len(steps) - 1) * (FIRST_LAUNCH - NEXT_LAUNCH)
    return Prediction(total, longest.bound, path)


def dense_product(gpu: Gpu, m: int, n: int, k: int) -> Prediction:
    """cuBLAS on a decoded weight, in tiles of 128 x 128; where they do not fill the GPU, k is split."""
    blocks = -(-m // 128) * -(-n // 128)
    work = Work(
        2 * n * k + 2 * m * (n + k), peak_macs=-(-m // 64) * 64 * n * k, blocks=blocks if blocks > gpu.processors else 0
    )
    return least_time(gpu, "cuBLAS", work)
