"""Predictions for the CUDA kernels of lowbit and bitsandbytes: the fastest of the paths that each allows."""

from codegen.cuda_counts import LOOPS
from codegen.instruction_costs import Counted
from roofline import Gpu, Prediction, Work, dense_product, least_time, one_after_another

#: Blocks of 64, double-quantized: 4 bits, 8 bits per block, 32 bits per 256 blocks.
WEIGHT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def of_loop(gpu: Gpu, entry: Counted, m: int, n: int, k: int) -> Prediction:
    """The work of a kernel that reads W once per ``entry.rows`` rows of x, or writes it in 16 bits (``rows`` is 0)."""
    weights = n * k
    moved = weights * WEIGHT_BYTES + (2 * m * (n + k) if entry.rows else 2 * weights)
    row_tiles = -(-m // entry.rows) if entry.rows else 1
    read, again, blocks = weights * row_tiles, 0.0, 0
    if entry.columns:
        # Every tile of columns reads x, in whole tiles of rows, and every tile of rows W.
        column_tiles = -(-n // entry.columns)
        again = 2 * entry.rows * row_tiles * k * (column_tiles - 1) + (row_tiles - 1) * weights * WEIGHT_BYTES
        blocks = 0 if entry.splits_k else row_tiles * column_tiles
    resident = min(entry.resident, -(-blocks // gpu.processors)) if blocks else entry.resident
    work = Work(
        moved,
        read * entry.instructions / 32,
        read * entry.cycles,
        read * entry.macs,
        l2_bytes=again,
        blocks=blocks,
        warps=entry.warps * resident,
    )
    return least_time(gpu, f"{entry.rows} rows" if entry.rows else "dequantize", work)


def predict(gpu: Gpu, entries: tuple[Counted, ...], operation: str, m: int, n: int, k: int) -> Prediction | None:
    """The fastest path of one library's ``entries``; None if they lack what :data:`LOOPS` lists for the operation.

    dequantize does not read m.
    """
    paths = [of_loop(gpu, entry, m, n, k) for entry in entries if entry.operation == operation]
    libraries = {entry.library for entry in entries}
    if not paths and any(loop.operation == operation and loop.library in libraries for loop in LOOPS):
        return None
    if operation != "dequantize":
        for decoded in (of_loop(gpu, entry, 0, n, k) for entry in entries if entry.operation == "dequantize"):
            paths.append(one_after_another("dequantize, cuBLAS", [decoded, dense_product(gpu, m, n, k)]))
    return min(paths, key=lambda path: path.microseconds, default=None)
