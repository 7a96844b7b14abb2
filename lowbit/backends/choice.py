"""CUDA or Triton: which of the two computes a product on an NVIDIA GPU that has both.

The figures are per weight (of n k, which scales all of them alike) and for an H100: 3.35 TB/s of DRAM, 0.30 ps per
byte; 132 multiprocessors that issue 128 lanes' instructions in a cycle of 1.7 GHz, 0.035 ps per instruction; 800 TFLOPS
in wgmma, 0.0025 ps per row, of which mma.sync reaches about 0.6, 0.0042 ps. Instructions are those that the budget
tests count (docs/performance.md). None of it has been timed on a GPU. On Hopper nothing is Triton's until it has been:
there its tile of 128 rows gives a product with 4096^2 weights 64 blocks for 132 multiprocessors, and decodes and
multiplies in turns; at 512 rows that should take 60 us where decoding first takes 40. :func:`lowbit.use_backend`
chooses it all the same.
"""

import torch

#: Rows of x above which a B200's tcgen05 pays. The CUDA kernels have mma.sync only. At 64 rows they take as long as
#: Triton's: 7 instructions, of which its pipelines issue 60% of the possible. At 128 rows mma.sync alone takes longer
#: than the 9 instructions of Triton's tile, in which its products hide.
ROWS_FOR_TCGEN05 = 64

#: Rows of x above which Triton's tensor cores pay for int8. The CUDA kernel multiplies int8 by FMAs, 2.2 instructions
#: or 0.08 ps for each row, and decodes first from 17 rows on, 1.5 ps. Triton's tiles of 16 rows take 3.7 instructions
#: in all, 0.13, which hide in the 0.30 that DRAM takes.
ROWS_FOR_INT8 = 4

#: Up to here Triton's kernel multiplies by packed codes. For more rows both decode into memory first and take torch's
#: product. (Triton does so earlier where that is faster: on an A100 and a B200.)
MOST_ROWS = 512


def triton_is_faster(rows: int, dtype: torch.dtype, format: str, capability: tuple[int, int]) -> bool:
    """Whether ``linear`` on ``rows`` rows of ``dtype`` should be Triton's, for a weight in ``format``.

    int8 wherever there are tensor cores that Triton compiles for, but on Hopper (9.0). Four bits on data-center
    Blackwell (10.x), whose tensor cores give their rate to tcgen05 only: mma.sync gets that of earlier generations.
    Everywhere else (Ampere, Ada, 12.0) mma.sync is all there is, and the CUDA kernels issue fewer instructions around
    it. Few rows are bound by DRAM, where theirs are written for 16-byte loads and the least instructions; fp32 does not
    go to tensor cores.
    """
    if dtype == torch.float32 or capability < (8, 0) or capability[0] == 9:
        return False
    if format == "int8":
        return ROWS_FOR_INT8 < rows <= MOST_ROWS
    return capability[0] == 10 and ROWS_FOR_TCGEN05 < rows <= MOST_ROWS
