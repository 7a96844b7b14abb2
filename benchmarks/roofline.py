"""GPUs by their data sheets, and the least time in which one can do a piece of work."""

from dataclasses import dataclass

TITLE = "PREDICTION from counted instructions, not a measurement"


@dataclass(frozen=True)
class Gpu:
    """``mma``: 16-bit FMAs per cycle and multiprocessor that mma.sync reaches with fp32 sums. Sources: NVIDIA's data
    sheets (dense rates, boost clocks). mma.sync: on Hopper 62% of the peak (Luo et al., "Benchmarking and Dissecting
    the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024). The B200's peak needs tcgen05; its mma.sync is
    assumed to be the A100's."""

    name: str
    arch: str
    processors: int
    clock: float  # GHz
    bandwidth: float  # GB/s
    peak: float  # TFLOP/s, bf16 with fp32 sums
    mma: float
    l2: int  # MB


GPUS = (
    Gpu("A100 80GB", "sm_80", 108, 1.41, 2039, 312, 1024, 40),
    Gpu("H100 SXM", "sm_90", 132, 1.83, 3350, 989, 1270, 50),
    Gpu("H200", "sm_90", 132, 1.83, 4800, 989, 1270, 50),
    Gpu("B200", "sm_100", 148, 1.85, 8000, 2250, 1024, 126),
    Gpu("RTX 4090", "sm_89", 128, 2.52, 1008, 165, 256, 72),
)


@dataclass(frozen=True)
class Work:
    """What all programs of a kernel do together."""

    bytes: float  # of DRAM
    instructions: float = 0.0  # that warps issue
    cycles: float = 0.0  # of a multiprocessor's L1/shared data path
    macs: float = 0.0  # of mma.sync
    peak_macs: float = 0.0  # of wgmma, tcgen05 and dense products, which reach the peak


@dataclass(frozen=True)
class Prediction:
    """Microseconds, what bounds them, and the kernel or the steps that take them."""

    microseconds: float
    bound: str
    path: str


def least_time(gpu: Gpu, path: str, work: Work) -> Prediction:
    """The largest of four bounds. A multiprocessor issues the instructions of 4 warps in a cycle."""
    cycles_per_second = gpu.processors * gpu.clock * 1e9
    seconds = {
        "DRAM": work.bytes / (gpu.bandwidth * 1e9),
        "issue": work.instructions / (4 * cycles_per_second),
        "L1/shared": work.cycles / cycles_per_second,
        "tensor": work.macs / (gpu.mma * cycles_per_second) + work.peak_macs / (gpu.peak / 2 * 1e12),
    }
    bound = max(seconds, key=seconds.get)
    return Prediction(seconds[bound] * 1e6, bound, path)


def one_after_another(path: str, steps: list[Prediction]) -> Prediction:
    """The sum of the steps' times, with the bound of the longest step."""
    longest = max(steps, key=lambda step: step.microseconds)
    return Prediction(sum(step.microseconds for step in steps), longest.bound, path)


def dense_product(gpu: Gpu, m: int, n: int, k: int) -> Prediction:
    """The work of cuBLAS on a decoded weight."""
    return least_time(gpu, "cuBLAS", Work(2 * n * k + 2 * m * (n + k), peak_macs=m * n * k))
