"""Which tiles a product grad W is made of: one function of its sizes and the GPU."""

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class GradInputShape:
    """A tile of tile_m rows of grad by ``bytes`` bytes of a row of W, summed over tile_n rows of W at a time.

    ``splits`` programs share the sum of a tile, in steps of ``split_rows`` rows of W (a multiple of tile_n).
    """

    tile_m: int
    tile_n: int
    bytes: int
    warps: int
    stages: int
    splits: int = 1
    split_rows: int = 0


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors (AMD: compute units) of a GPU; a small one's where there is none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).max_compute_units
    return 8


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def grad_input_tile(m: int, row_bytes: int, dtype: torch.dtype) -> GradInputShape:
    """The tile for m rows of grad.

    16 bits: up to 16 rows, where reading W is the work, a row of W in pieces of 128 bytes, 4 for each lane, 7.2
    instructions a weight on sm_80; up to 64 rows 32 rows of W, for the accumulators take 128 registers. From there on
    two groups of four warps: 128 rows, for which each weight is decoded once. Narrow matrices (and int8, a column a
    byte) take pieces of 64 bytes, the least that four warps divide.

    fp32 multiplies with FMAs, whose operands go through shared memory: small tiles.
    """
    if dtype == torch.float32:
        return GradInputShape(16 if m <= 16 else 64, 32, 64, 4, 2)
    wide = row_bytes > 64
    if m <= 16:
        return GradInputShape(16, 64, 128 if wide else 64, 4, 3)
    if m <= 128 or not wide:
        return GradInputShape(32 if m <= 32 else 64, 32, 128 if wide else 64, 4, 3)
    return GradInputShape(128, 32, 128, 8, 3)


def grad_input_shape(m: int, n: int, row_bytes: int, dtype: torch.dtype, count: int) -> GradInputShape:
    """The tile, and splits of the sum over n where there are fewer tiles than 2 for each of ``count`` processors.

    Two programs on each keep loads in flight while one waits. Each split writes its tile in fp32 and a second kernel
    reads it: a split sums over 4 tile_n rows of W or more, whose packed bytes and grad are worth that for few rows of
    grad, and 16 splits are enough.
    """
    shape = grad_input_tile(m, row_bytes, dtype)
    tiles = _ceil_div(m, shape.tile_m) * _ceil_div(row_bytes, shape.bytes)
    steps = _ceil_div(n, shape.tile_n)
    splits = max(1, min(2 * count // max(tiles, 1), steps // 4, 16))
    split_steps = _ceil_div(steps, splits)
    return dataclasses.replace(
        shape, splits=max(1, _ceil_div(steps, max(split_steps, 1))), split_rows=split_steps * shape.tile_n
    )
