"""Times that others measured and published, beside what roofline.py predicts for the same kernels.

    python benchmarks/predict_gpu.py --check

Marlin's main loop was counted in its source (IST-DASLab/marlin, 2f6d7c1, compiled for sm_90 by nvcc 13.0; channel-wise
scales): a warp's 1084 instructions for 8192 weights and 16 rows; its 128 registers and shared memory leave one block of
8 warps to a multiprocessor. vLLM's, which was timed, descends from it. bitsandbytes' are those of its wheel.

Not found: absolute times of bitsandbytes' fused kernels on an H100 (its pull request 1949 shows them as pictures). What
it does state is up to how many rows they are faster there than decoding first (backends/cuda/ops.py): 16 to 64, by the
number of columns. These predictions say 128 to 220: they are too good for those kernels by a factor of about two.
"""

from dataclasses import dataclass

from codegen import cuda_counts
from predict_cuda import of_loop
from roofline import GPUS, Gpu, Prediction, Work, dense_product, least_time, one_after_another


@dataclass(frozen=True)
class Published:
    """``microseconds`` of ``kernel`` on ``gpu`` for m rows and W [n, k]. A B300 is predicted as a B200."""

    kernel: str
    gpu: str
    m: int
    n: int
    k: int
    microseconds: float
    source: str


def _of_tflops(m: int, n: int, k: int, tflops: float) -> float:
    return 2 * m * n * k / tflops / 1e6


_HUMMING = "https://github.com/inclusionAI/humming/pull/2"
_NESTED = "https://github.com/bitsandbytes-foundation/bitsandbytes/pull/2051"
MARLIN, BITSANDBYTES, DENSE = "Marlin", "bitsandbytes, dequantize, then torch", "torch fp16"
TIMES = (
    *(
        Published(MARLIN, "H100 SXM", m, 8192, 8192, _of_tflops(m, 8192, 8192, tflops), _HUMMING)
        for m, tflops in ((1, 4.98), (2, 10.02), (4, 19.85))
    ),
    *(
        Published(DENSE, "H100 SXM", m, 8192, 8192, _of_tflops(m, 8192, 8192, tflops), _HUMMING)
        for m, tflops in ((1, 2.30), (2, 4.63), (4, 9.26))
    ),
    Published(BITSANDBYTES, "B200", 32, 4096, 4096, 32.9, _NESTED),
    Published(BITSANDBYTES, "B200", 32, 11008, 4096, 68.8, _NESTED),
)


def predicted(gpu: Gpu, published: Published) -> Prediction | None:
    """None where bitsandbytes' wheel is not installed."""
    m, n, k = published.m, published.n, published.k
    if published.kernel == MARLIN:
        work = Work(n * k / 2 + 2 * m * (n + k), instructions=n * k * 1084 / 8192, macs=16 * n * k, warps=8)
        return least_time(gpu, MARLIN, work)
    if published.kernel == DENSE:
        return dense_product(gpu, m, n, k)
    loop = next(loop for loop in cuda_counts.LOOPS if (loop.operation, loop.library) == ("dequantize", "bitsandbytes"))
    found = (cuda_counts.counted(loop, kernel) for kernel in cuda_counts.kernels_of(loop.source, gpu.arch))
    entry = next(filter(None, found), None)
    if entry is None:
        return None
    return one_after_another(BITSANDBYTES, [of_loop(gpu, entry, 0, n, k), dense_product(gpu, m, n, k)])


def comparison() -> list[tuple[Published, Prediction, float]]:
    """Each published time that can be predicted here, its prediction, and predicted over published."""
    rows = []
    for each in TIMES:
        gpu = next(gpu for gpu in GPUS if gpu.name == each.gpu)
        if (prediction := predicted(gpu, each)) is not None:
            rows.append((each, prediction, prediction.microseconds / each.microseconds))
    return rows
