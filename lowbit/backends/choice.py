"""CUDA or Triton: which of the two computes a product on an NVIDIA GPU that has both.

The figures are per weight (of n k, which scales all of them alike) and for an H100: 3.35 TB/s of DRAM, 0.30 ps per
byte; 132 multiprocessors that issue 128 lanes' instructions in a cycle of 1.7 GHz, 0.035 ps per instruction; 800 TFLOPS
in wgmma, 0.0025 ps per row, of which mma.sync reaches about 0.6, 0.0042 ps. Instructions are those that the budget
tests count (docs/performance.md). None of it has been timed on a GPU.
"""

import torch

#: Rows of x above which Hopper's wgmma pays. The CUDA kernels have mma.sync only. At 64 rows they take 0.15 (DRAM) +
#: 0.17 (4.9 instructions) + 0.27 (mma.sync) = 0.59 ps, and Triton's about as long: 7 instructions, of which its
#: pipelines issue 60% of the possible, are 0.41, besides 0.15. At 128 rows mma.sync alone takes 0.54 ps, 0.86 in all;
#: Triton's tile of 128 rows takes 9 instructions, 0.53, in which its 0.32 of wgmma hide.
ROWS_FOR_WGMMA = 64

#: Rows of x above which Triton's tensor cores pay for int8. The CUDA kernel multiplies int8 by FMAs, 2.2 instructions
#: or 0.08 ps for each row, and decodes first from 17 rows on, 1.5 ps. Triton's tiles of 16 rows take 3.7 instructions
#: in all, 0.13, which hide in the 0.30 that DRAM takes.
ROWS_FOR_INT8 = 4

#: Up to here Triton's kernel multiplies by packed codes. For more rows both decode into memory first and take torch's
#: product. (The CUDA half does from 257 rows on, and so does Triton where that is faster: on an A100 and a B200. On an
#: H100 it is 1.3 ps before 0.0025 for each row, 2.6 at 512, where Triton's 0.004 for each row are 2.0.)
MOST_ROWS = 512


def triton_is_faster(rows: int, dtype: torch.dtype, format: str, capability: tuple[int, int]) -> bool:
    """Whether ``linear`` on ``rows`` rows of ``dtype`` should be Triton's, for a weight in ``format``.

    int8 wherever there are tensor cores that Triton compiles for. Four bits on Hopper (9.0) and data-center Blackwell
    (10.x), whose tensor cores give their rate to wgmma and tcgen05 only: mma.sync gets 0.6 of it on the one, on the
    other that of earlier generations. Everywhere else (Ampere, Ada, 12.0) mma.sync is all there is, and the CUDA
    kernels issue fewer instructions around it. Few rows are bound by DRAM, where theirs are written for 16-byte loads
    and the least instructions; fp32 does not go to tensor cores.
    """
    if dtype == torch.float32 or capability < (8, 0):
        return False
    if format == "int8":
        return ROWS_FOR_INT8 < rows <= MOST_ROWS
    return capability[0] in (9, 10) and ROWS_FOR_WGMMA < rows <= MOST_ROWS
