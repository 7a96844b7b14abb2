"""linear: x W^T + scaling t B^T + bias on the packed weight, and the same after decoding W where that is faster."""

import math

import torch
import triton
import triton.language as tl
from torch.nn import functional

from ... import format as fmt
from . import INTERPRETED, PORTABLE, autotune, shapes
from .constants import scale_map
from .decode import decode_codes, load_scales, scales_of
from .grid import tile_position
from .launch import is_traced, launch
from .rounding import in_two_bf16, round_to
from .splits import SUM_TILE, sum_splits_kernel

_INTERPRETED = tl.constexpr(INTERPRETED)
_INT8_UNIT = tl.constexpr(1 / fmt.INT8_MAX)


@triton.jit
def _dot(a, b, total):
    """total + a b^T, summed in fp32. Triton's interpreter would multiply the bits of bf16 as integers."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b.T, total, input_precision="ieee")


@triton.jit
def _tile_of(program, m, n, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr):
    """(tile of rows, tile of columns, share of k) of a program."""
    row_tile, column_tile = tile_position(program // SPLITS, tl.cdiv(m, BM), tl.cdiv(n, BN))
    return row_tile, column_tile, program % SPLITS


@triton.jit
def _lora(acc, t, lora_b, scaling, rows, columns, m, n, rank, summed, EXACT: tl.constexpr):
    """acc + scaling t B^T over the first ``summed`` of ``rank`` columns.

    On tensor cores each factor is two bf16; low times low is left out (2^-16 of a product).
    """
    sums = tl.zeros(acc.shape, tl.float32)
    for first in tl.range(0, summed, 16, num_stages=1):
        r = first + tl.arange(0, 16)
        row_mask = (rows < m)[:, None] & (r < rank)[None, :]
        column_mask = (columns < n)[:, None] & (r < rank)[None, :]
        a = tl.load(t + rows.to(tl.int64)[:, None] * rank + r[None, :], mask=row_mask, other=0.0).to(tl.float32)
        b = tl.load(lora_b + columns.to(tl.int64)[:, None] * rank + r[None, :], mask=column_mask, other=0.0)
        b = b.to(tl.float32)
        if EXACT:
            sums = _dot(a, b, sums)
        else:
            a_high, a_low, a_finite = in_two_bf16(a)
            b_high, b_low, b_finite = in_two_bf16(b)
            sums = _dot(a_low, b_finite, sums)
            sums = _dot(a_finite, b_low, sums)
            sums = _dot(a_high, b_high, sums)
    return acc + scaling * sums


@triton.jit
def _finish(acc, bias, y, rows, columns, split, m, n, SPLITS: tl.constexpr):
    """Stores a tile, with its bias and rounded, or as a share of the sums in the workspace [SPLITS, m, n]."""
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    row = split.to(tl.int64) * m + rows
    if bias is not None and SPLITS == 1:
        acc += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * n + columns[None, :], round_to(acc, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])  # it changes from call to call
def linear_kernel(
    x,
    packed,
    absmax,
    group_scales,
    offset,
    scale_map,
    bias,
    t,
    lora_b,
    y,
    scaling,
    m,
    n,
    k,
    rank,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    PORTABLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    COPIES: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):
    """A tile of y, or of its share over a part of k. k is a multiple of BLOCK_SIZE, that of BK.

    The codebook's values meet x on tensor cores; the sums over BK columns, all of one block, are scaled in fp32. W is
    the right operand: on mma.sync the bytes go from shared memory to the registers which the decoded pairs have to be
    in. (Joining them is no work: a byte's two codes are neighbours in k.)
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    EXACT: tl.constexpr = DTYPE == tl.float32
    row_tile, column_tile, split = _tile_of(tl.program_id(0), m, n, BM, BN, SPLITS)
    rows, columns = row_tile * BM + tl.arange(0, BM), column_tile * BN + tl.arange(0, BN)
    # Tiles at the edge read the first row instead of what is not there, and store nothing of it.
    x_row = tl.where(rows < m, rows, 0).to(tl.int64)
    w_row = tl.where(columns < n, columns, 0).to(tl.int64)
    # k is a multiple of 32: written so that the compiler knows rows of packed codes to begin at 16 bytes.
    x_rows = x + x_row[:, None] * k + tl.arange(0, BK)[None, :]
    w_rows = packed + w_row[:, None] * (k // 32 * 16) + tl.arange(0, BK // 2)[None, :]

    steps = tl.cdiv(k // BK, SPLITS)
    begin = split * steps * BK
    end = min(begin + steps * BK, k)
    # Scales of fewer columns than there are threads: COPIES of each, or the compiler would have every thread decode
    # those of all of its sums, instead of one that it passes on.
    block = tl.broadcast_to((w_row * (k // BLOCK_SIZE))[:, None], (BN, COPIES))
    has_scale = tl.broadcast_to((columns < n)[:, None], (BN, COPIES))
    at_first = min(begin, k - BK)  # a last part of k can be empty
    stored, group_scale = load_scales(absmax, group_scales, block + at_first // BLOCK_SIZE, has_scale, DOUBLE_QUANT)
    acc = tl.zeros((BN, BM) if WEIGHT_FIRST else (BM, BN), tl.float32)
    for at in range(begin, end, BK):
        codes = tl.load(w_rows + at // 2)
        values = tl.load(x_rows + at)
        scale = tl.max(scales_of(stored, group_scale, offset, scale_map, DOUBLE_QUANT), axis=1)
        # A step ahead: nothing else would hide their way from memory.
        following = min(at + BK, end - BK)
        stored, group_scale = load_scales(
            absmax, group_scales, block + following // BLOCK_SIZE, has_scale, DOUBLE_QUANT
        )
        high, low = decode_codes(codes, FORMAT, DTYPE, PORTABLE)
        weight = tl.reshape(tl.join(high, low), (BN, BK))
        if WEIGHT_FIRST:
            sums = _dot(weight, values, tl.zeros((BN, BM), tl.float32))
            acc = tl.fma(sums, tl.broadcast_to(scale[:, None], (BN, BM)), acc)
        else:
            sums = _dot(values, weight, tl.zeros((BM, BN), tl.float32))
            acc = tl.fma(sums, tl.broadcast_to(scale[None, :], (BM, BN)), acc)
    if WEIGHT_FIRST:
        acc = acc.T

    if t is not None:
        own_rank = tl.where(split == 0, rank, 0)
        acc = _lora(acc, t, lora_b, scaling, rows, columns, m, n, rank, own_rank, EXACT)
    _finish(acc, bias, y, rows, columns, split, m, n, SPLITS)


@triton.jit(do_not_specialize=["m"])
def linear_int8_kernel(
    x,
    codes,
    absmax,
    bias,
    t,
    lora_b,
    y,
    scaling,
    m,
    n,
    k,
    rank,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The same for int8 codes [n, k], which x's 16 bits hold exactly; the sums are scaled by row at the end.

    WHOLE: k is a multiple of BK.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    EXACT: tl.constexpr = DTYPE == tl.float32
    row_tile, column_tile, split = _tile_of(tl.program_id(0), m, n, BM, BN, SPLITS)
    rows, columns = row_tile * BM + tl.arange(0, BM), column_tile * BN + tl.arange(0, BN)
    x_row = tl.where(rows < m, rows, 0).to(tl.int64)
    w_row = tl.where(columns < n, columns, 0).to(tl.int64)
    x_rows = x + x_row[:, None] * k + tl.arange(0, BK)[None, :]
    w_rows = codes + w_row[:, None] * k + tl.arange(0, BK)[None, :]

    steps = tl.cdiv(tl.cdiv(k, BK), SPLITS)
    begin = split * steps * BK
    acc = tl.zeros((BN, BM) if WEIGHT_FIRST else (BM, BN), tl.float32)
    for at in range(begin, min(begin + steps * BK, k), BK):
        if WHOLE:
            weight = tl.load(w_rows + at)
            values = tl.load(x_rows + at)
        else:
            inside = (at + tl.arange(0, BK) < k)[None, :]
            weight = tl.load(w_rows + at, mask=inside, other=0)
            values = tl.load(x_rows + at, mask=inside, other=0.0)
        weight = weight.to(tl.float32).to(DTYPE)
        acc = _dot(weight, values, acc) if WEIGHT_FIRST else _dot(values, weight, acc)
    if WEIGHT_FIRST:
        acc = acc.T
    scale = tl.load(absmax + columns, mask=columns < n, other=0.0) * _INT8_UNIT
    acc = acc * scale[None, :]
    if t is not None:
        own_rank = tl.where(split == 0, rank, 0)
        acc = _lora(acc, t, lora_b, scaling, rows, columns, m, n, rank, own_rank, EXACT)
    _finish(acc, bias, y, rows, columns, split, m, n, SPLITS)


def capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA GPU, an A100's where there is none; None on other GPUs."""
    if device.type == "xpu" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def copies_of_scales(config: shapes.Config) -> int:
    """So many that there are as many scales as threads, of which NVIDIA has 32 in a warp."""
    return max(1, 32 * config.warps // config.bn)


def _fused(config, x, packed, absmax, group_scales, offset, format, block_size, bias, t, lora_b, scaling, y):
    """Launches the kernels for x [m, k] and y [m, n] as ``config`` has it."""
    (m, k), n = x.shape, y.shape[1]
    rank = 0 if t is None else t.shape[1]
    out = y if config.splits == 1 else x.new_empty([config.splits, m, n], dtype=torch.float32)
    grid = (triton.cdiv(m, config.bm) * triton.cdiv(n, config.bn) * config.splits,)
    options = {
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "SPLITS": config.splits,
        "WEIGHT_FIRST": config.weight_first,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    # A tensor of which a kernel reads nothing is none.
    bias_there = bias if config.splits == 1 else None
    tail = (bias_there, t, lora_b, out, scaling, m, n, k, rank)
    if format == "int8":
        codes = packed.view(torch.int8)
        launch(linear_int8_kernel, grid, x, codes, absmax, *tail, WHOLE=k % config.bk == 0, **options)
    else:
        launch(
            linear_kernel,
            grid,
            x,
            packed,
            absmax,
            group_scales,
            offset,
            scale_map(x.device),
            *tail,
            FORMAT=format,
            BLOCK_SIZE=block_size,
            DOUBLE_QUANT=group_scales is not None,
            PORTABLE=PORTABLE,
            COPIES=copies_of_scales(config),
            **options,
        )
    if config.splits > 1:
        grid = (triton.cdiv(m * n, SUM_TILE),)
        arguments = (out, bias, y, n, m * n)
        launch(sum_splits_kernel, grid, *arguments, SPLITS=config.splits, TILE=SUM_TILE, num_warps=4)


def _decoded(x, packed, absmax, group_scales, offset, format, block_size, n, bias, t, lora_b, scaling):
    """torch's product of x [m, k] and the decoded weight; LoRA's product first, which torch then adds in its sums."""
    addend = None if bias is None else bias.to(x.dtype)
    if t is not None:
        # A large scaling multiplies lora_b, which is small, and not t, whose size is x's and which fp16 would not hold.
        of_t, of_b = (1.0, scaling) if abs(scaling) > 1 else (scaling, 1.0)
        t, lora_b = ((factor.float() * by).to(x.dtype) for factor, by in ((t, of_t), (lora_b, of_b)))
        addend = functional.linear(t, lora_b, addend)
    weight = torch.ops.lowbit_triton.dequantize.default(
        packed, absmax, group_scales, offset, format, block_size, [n, x.shape[1]], x.dtype
    )
    if addend is None or addend.dim() == 1:
        return functional.linear(x, weight, addend)
    return torch.addmm(addend, x, weight.T)


def linear(
    x, packed, absmax, group_scales, offset, format, block_size, out_features, bias, t, lora_b, scaling
) -> torch.Tensor:
    k, n = x.shape[-1], out_features
    leading = list(x.shape[:-1])
    m = math.prod(leading)
    x = x.reshape(m, k).contiguous()
    weight = (packed.contiguous(), absmax.contiguous(), group_scales, offset, format, block_size)
    if t is not None and t.shape[-1] == 0:
        t = lora_b = None
    if t is not None:
        t, lora_b = t.reshape(m, t.shape[-1]).contiguous(), lora_b.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    gpu = shapes.gpu_of(x.device, capability(x.device))
    problem = shapes.Problem(shapes.rows_of(m), n, k, x.dtype, format, block_size)
    if m == 0 or n == 0:
        return x.new_empty([*leading, n])
    if shapes.decodes_first(problem, gpu):
        return _decoded(x, *weight, n, bias, t, lora_b, scaling).view(*leading, n)
    y = x.new_empty([m, n])
    arguments = (x, *weight, bias, t, lora_b, scaling, y)
    config = shapes.linear_config(problem, gpu)
    if autotune.WANTED and not is_traced():
        candidates = shapes.linear_configs(problem, gpu)
        config = autotune.best("linear", problem, gpu, candidates, lambda each: _fused(each, *arguments))
    _fused(config, *arguments)
    return y.view(*leading, n)


def lora_linear(
    x, packed, absmax, group_scales, offset, format, block_size, out_features, bias, lora_a, lora_b, scaling
) -> tuple[torch.Tensor, torch.Tensor]:
    t = functional.linear(x.float(), lora_a.float())
    weight = (packed, absmax, group_scales, offset, format, block_size)
    return linear(x, *weight, out_features, bias, t, lora_b, scaling), t
