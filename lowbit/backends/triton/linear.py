"""linear: x W^T + scaling t B^T + bias on the packed weight, and the same after decoding W where that is faster."""

import torch
import triton
import triton.language as tl
from torch.nn import functional

from . import PORTABLE, autotune, shapes_forward
from .constants import scale_map
from .factors import rounded_factors
from .gpu import gpu_of
from .grid import ceil_div, expert_of_tile, next_power_of_2, row_tile_count, tile_position
from .launch import launch
from .operands import (
    check_dimensions,
    check_size,
    checked,
    lora_factors,
    optional,
    rows_of_floats,
    weight_of,
)
from .shapes import Problem, rows_of
from .splits import add_splits
from .tiles_forward import add_lora, contract_four_bits, contract_int8, store_tile


@triton.jit(do_not_specialize=["m", "row_tiles"])  # they change from call to call
def linear_kernel(
    x,
    packed,
    absmax,
    group_scales,
    offset,
    scale_map,
    expert_ends,
    experts,
    bias,
    t,
    lora_b,
    y,
    scaling,
    m,
    n,
    k,
    rank,
    row_tiles,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    PORTABLE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    COPIES: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A tile of y, or of its share over a part of k.

    ``packed``: int8 [n, k] in that format. WHOLE: k is a multiple of PRODUCTS * BK, as it is for all others.
    ``expert_ends``: None, or the weight is a stack of matrices, lora_b and bias too (``grouped.py``).
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    program, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    row_tile, column_tile = tile_position(program, row_tiles, tl.cdiv(n, BN))
    columns = column_tile * BN + tl.arange(0, BN)
    # Tiles at the edge read the first row instead of what is not there, and store nothing of it.
    w_row = tl.where(columns < n, columns, 0).to(tl.int64)
    first_row, row_end = row_tile * BM, m
    if expert_ends is not None:
        expert, first_row, row_end = expert_of_tile(row_tile, expert_ends, experts, m, BM, EXPERTS)
        if expert >= experts:
            return
        w_row += expert.to(tl.int64) * n
    rows = first_row + tl.arange(0, BM)
    x_row = tl.where(rows < row_end, rows, first_row).to(tl.int64)
    x_rows = x + x_row[:, None] * k
    if FORMAT == "int8":
        w_rows, scale = packed + w_row[:, None] * k, absmax + w_row
        total = contract_int8(x_rows, w_rows, scale, k, split, DTYPE, BM, BN, BK, SPLITS, WEIGHT_FIRST, PRODUCTS, WHOLE)
    else:
        total = contract_four_bits(
            x_rows,
            # k is a multiple of 32: written so that the compiler knows rows of packed codes to begin at 16 bytes.
            packed + w_row[:, None] * (k // 32 * 16),
            w_row * (k // BLOCK_SIZE),
            absmax,
            group_scales,
            offset,
            scale_map,
            k,
            split,
            FORMAT,
            BLOCK_SIZE,
            DOUBLE_QUANT,
            DTYPE,
            PORTABLE,
            BM,
            BN,
            BK,
            SPLITS,
            COPIES,
            WEIGHT_FIRST,
            PRODUCTS,
        )
    if t is not None:
        summed = tl.where(split == 0, rank, 0)
        total = add_lora(total, t, x_row, lora_b, w_row, scaling, rank, summed, DTYPE == tl.float32)
    if bias is not None:
        in_first = w_row * 0 + split == 0  # for each column
        total += tl.load(bias + w_row, mask=in_first, other=0.0).to(tl.float32)[None, :]
    store_tile(y, total, rows, row_end, columns, m, n, split)


def copies_of_scales(config: shapes_forward.Config) -> int:
    """So many that there are as many scales as threads, of which NVIDIA has 32 in a warp."""
    return max(1, 32 * config.warps // config.bn)


def fused(
    config, x, packed, absmax, group_scales, offset, format, block_size, bias, t, lora_b, scaling, y, expert_ends=None
):
    """Launches the kernels for x [m, k] and y [m, n] as ``config`` has it; all of the operands contiguous.

    With ``expert_ends`` [experts] the rows of x are sorted by expert, whose matrices are those of a stack.
    """
    (m, k), n = x.shape, y.shape[1]
    experts = 1 if expert_ends is None else expert_ends.numel()
    row_tiles = ceil_div(m, config.bm) if expert_ends is None else row_tile_count(m, experts, config.bm)
    out = y if config.splits == 1 else x.new_empty([config.splits, m, n], dtype=torch.float32)
    is_int8 = format == "int8"
    launch(
        linear_kernel,
        (row_tiles * ceil_div(n, config.bn) * config.splits,),
        x,
        packed.view(torch.int8) if is_int8 else packed,
        absmax,
        group_scales,
        offset,
        None if group_scales is None else scale_map(x.device),
        expert_ends,
        experts,
        bias,
        t,
        lora_b,
        out,
        float(scaling),
        m,
        n,
        k,
        0 if t is None else t.shape[1],
        row_tiles,
        FORMAT=format,
        BLOCK_SIZE=1 if is_int8 else block_size,
        DOUBLE_QUANT=group_scales is not None,
        PORTABLE=PORTABLE,
        EXPERTS=next_power_of_2(experts),
        BM=config.bm,
        BN=config.bn,
        BK=config.bk,
        SPLITS=config.splits,
        COPIES=copies_of_scales(config),
        WEIGHT_FIRST=config.weight_first,
        PRODUCTS=config.products,
        WHOLE=k % (config.products * config.bk) == 0,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if config.splits > 1:
        add_splits(out, y)


def _decoded(x, packed, absmax, group_scales, offset, format, block_size, n, bias, t, lora_b, scaling):
    """torch's product of x [m, k] and the decoded weight; LoRA's product first, which torch then adds in its sums."""
    addend = None if bias is None else bias.to(x.dtype)
    if t is not None:
        factors = rounded_factors(t, lora_b.view(n, t.shape[1]), x.dtype, scaling)
        addend = functional.linear(*factors, addend)
    weight = torch.ops.lowbit_triton.dequantize.default(
        packed, absmax, group_scales, offset, format, block_size, [n, x.shape[1]], x.dtype
    )
    if addend is None or addend.dim() == 1:
        return functional.linear(x, weight, addend)
    return torch.addmm(addend, x, weight.T)


def linear(
    x, packed, absmax, group_scales, offset, format, block_size, out_features, bias, t, lora_b, scaling
) -> torch.Tensor:
    m, n = rows_of_floats("x", x), out_features
    check_size("out_features", n)
    k = int(x.shape[-1])  # a number, where torch.compile has a symbol: a weight's sizes choose its kernel
    leading = list(x.shape[:-1])
    weight = weight_of((n, k), x, packed, absmax, group_scales, offset, format, block_size)
    bias = optional("bias", bias, n, x)
    t, lora_b = lora_factors(("t", "lora_b"), t, lora_b, m, n, x)
    x = x.reshape(m, k).contiguous()
    gpu = gpu_of(x.device)
    problem = Problem(rows_of(m, x.dtype), n, k, x.dtype, format, block_size)
    if m == 0 or n == 0:
        return x.new_empty([*leading, n])
    if shapes_forward.decodes_first(problem, gpu):
        return _decoded(x, *weight, n, bias, t, lora_b, scaling).view(*leading, n)
    y = x.new_empty([m, n])
    arguments = (x, *weight, bias, t, lora_b, scaling, y)
    run = lambda config: fused(config, *arguments)  # noqa: E731
    run(autotune.chosen("linear", problem, gpu, shapes_forward.linear_configs(problem, gpu), run))
    return y.view(*leading, n)


#: On a GPU nothing is faster than the exact product.
linear_approximate = linear


def lora_linear(
    x, packed, absmax, group_scales, offset, format, block_size, out_features, bias, lora_a, lora_b, scaling
) -> tuple[torch.Tensor, torch.Tensor]:
    rows_of_floats("x", x)
    check_dimensions("lora_a", lora_a, 2)
    t = functional.linear(x.float(), checked("lora_a", lora_a, lora_a.shape[0] * x.shape[-1], x).float())
    weight = (packed, absmax, group_scales, offset, format, block_size)
    return linear(x, *weight, out_features, bias, t, lora_b, scaling), t
