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


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """An NVIDIA GPU's compute capability; None for another device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


def grad_input_tile(m: int, row_bytes: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> GradInputShape:
    """The tile for m rows of grad.

    16 bits: 64 rows of W at a time, in pieces of 128 bytes. Up to 32 rows of grad, where reading and decoding W is the
    work, four warps: a lane's 4 bytes of a row come with one load, 7.7 to 8.8 instructions a weight on sm_80. More rows
    take eight warps, with 2 bytes to a lane: 64 rows at 12.4 instructions a weight (11.8 where scales are
    double-quantized: those Triton decodes once for all lanes), of which one is an HMMA, 8 cycles of an A100's tensor
    core. wgmma (sm_90, sm_100) keeps no grad in registers: 128 rows fit without a spill, 10.4 instructions for 8 cycles
    of an H100's tensor core, where 64 rows would be as many for 4. (On sm_80 128 rows spill.) Narrow matrices take
    pieces of 64 bytes, the least that four warps divide.

    fp32 multiplies with FMAs, whose operands go through shared memory: small tiles. So does anything but an NVIDIA GPU,
    where codes are decoded by selections, in fp32: gfx1100 spills with larger ones.
    """
    if capability is None:
        if dtype == torch.float32:
            return GradInputShape(16, 16, 64, 4, 2)
        return GradInputShape(16 if m <= 16 else 32 if m <= 32 else 64, 32, 64, 4, 2)
    if dtype == torch.float32:  # on sm_80 ptxas spills registers of few rows, and of narrow ones, with 32 rows of W
        small = m <= 16 or row_bytes <= 64
        return GradInputShape(16, 16, 64, 4, 2) if small else GradInputShape(32, 32, 64, 4, 2)
    if row_bytes <= 64:
        return GradInputShape(16 if m <= 16 else 32 if m <= 32 else 64, 64, 64, 4, 3)
    if m <= 32:
        return GradInputShape(16 if m <= 16 else 32, 64, 128, 4, 3)
    wgmma = (9, 0) <= capability < (12, 0)
    return GradInputShape(128 if m > 64 and wgmma else 64, 64, 128, 8, 3)


def grad_input_shape(
    m: int, n: int, row_bytes: int, dtype: torch.dtype, count: int, capability: tuple[int, int] | None
) -> GradInputShape:
    """The tile, and splits of the sum over n where there are fewer tiles than 2 for each of ``count`` processors.

    Two programs on each keep loads in flight while one waits. Each split writes its tile in fp32 and a second kernel
    reads it: a split sums over 4 tile_n rows of W or more, whose packed bytes and grad are worth that for few rows of
    grad, and 16 splits are enough.
    """
    shape = grad_input_tile(m, row_bytes, dtype, capability)
    tiles = _ceil_div(m, shape.tile_m) * _ceil_div(row_bytes, shape.bytes)
    steps = _ceil_div(n, shape.tile_n)
    splits = max(1, min(2 * count // max(tiles, 1), steps // 4, 16))
    split_steps = _ceil_div(steps, splits)
    return dataclasses.replace(
        shape, splits=max(1, _ceil_div(steps, max(split_steps, 1))), split_rows=split_steps * shape.tile_n
    )
