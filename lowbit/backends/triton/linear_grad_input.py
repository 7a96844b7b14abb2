"""linear_grad_input: grad W + grad_t lora_a on the packed weight, and the same after decoding W where that is faster.

The tile itself is in ``tiles_backward.py``.
"""

import torch
import triton
import triton.language as tl

from . import PORTABLE, autotune, shapes_backward
from .constants import scale_map
from .factors import rounded_factors
from .gpu import gpu_of
from .grid import ceil_div, expert_of_tile, next_power_of_2, row_tile_count, tile_position
from .launch import launch
from .operands import check_size, lora_factors, rows_of_floats, weight_of
from .rounding import DTYPES, round_to
from .shapes import Problem, rows_of
from .splits import add_splits
from .tiles_backward import add_lora, columns_per_byte, contract_rows, in_columns


@triton.jit(do_not_specialize=["rows", "row_tiles"])  # they change from call to call
def grad_input_kernel(
    grad,
    grad_stride,
    packed,
    absmax,
    group_scales,
    offset,
    scale_map,
    expert_ends,
    experts,
    grad_t,
    lora_a,
    out,
    rows,
    row_tiles,
    out_features,
    in_features,
    row_bytes,
    row_blocks,
    rank,
    split_rows,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    DTYPE: tl.constexpr,
    PORTABLE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BYTES: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One tile of ``out`` [splits, rows, in_features]: the sum over the rows of W in one split, LoRA in the first.

    ``expert_ends``: None, or the weight is a stack of matrices, lora_a too (``grouped.py``).
    """
    split = tl.program_id(1)
    row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, tl.cdiv(row_bytes, BYTES))
    first_row, row_end, matrix_row = row_tile.to(tl.int64) * TILE_M, rows, 0
    if expert_ends is not None:
        expert, first_row, row_end = expert_of_tile(row_tile, expert_ends, experts, rows, TILE_M, EXPERTS)
        if expert >= experts:
            return
        matrix_row = expert.to(tl.int64) * out_features
        if lora_a is not None:
            lora_a += expert.to(tl.int64) * rank * in_features
    m = first_row + tl.arange(0, TILE_M)
    valid = tl.where(m < row_end, m, first_row)  # what is read there is not written
    first = split * split_rows
    high_sum, low_sum = contract_rows(
        grad,
        valid,
        grad_stride,
        packed + matrix_row * row_bytes,
        absmax,
        group_scales,
        offset,
        scale_map,
        matrix_row * row_blocks,
        first,
        tl.minimum(first + split_rows, out_features),
        out_features,
        row_bytes,
        row_blocks,
        column_tile,
        FORMAT,
        BLOCK_SIZE,
        DOUBLE_QUANT,
        DTYPE,
        PORTABLE,
        TILE_M,
        TILE_N,
        BYTES,
        WARPS,
    )
    if grad_t is not None:
        high_sum, low_sum = add_lora(
            high_sum,
            low_sum,
            grad_t,
            valid,
            lora_a,
            rank,
            tl.where(split == 0, rank, 0),
            in_features,
            column_tile,
            FORMAT,
            DTYPE,
            BYTES,
            WARPS,
            16,
        )
    tile_sum = in_columns(high_sum, low_sum, FORMAT, TILE_M, BYTES, WARPS)
    COLUMNS: tl.constexpr = BYTES * columns_per_byte(FORMAT)
    k = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    at = (split.to(tl.int64) * rows + m[:, None]) * in_features + k[None, :]
    mask = (m[:, None] < row_end) & (k[None, :] < in_features)
    tl.store(out + at, round_to(tile_sum, out.dtype.element_ty), mask=mask)


def fused(
    config, grad, packed, absmax, group_scales, offset, format, block_size, grad_t, lora_a, out, expert_ends=None
):
    """Launches the kernels for grad [m, n] and out [m, k] as ``config`` has it.

    All operands are contiguous, but that rows of grad may have any stride. With ``expert_ends`` [experts] the rows are
    sorted by expert, whose matrices are those of a stack.
    """
    (m, n), k = grad.shape, out.shape[1]
    experts = 1 if expert_ends is None else expert_ends.numel()
    row_tiles = ceil_div(m, config.tile_m) if expert_ends is None else row_tile_count(m, experts, config.tile_m)
    partial = out if config.splits == 1 else out.new_empty([config.splits, m, k], dtype=torch.float32)
    is_int8 = format == "int8"
    row_bytes = k if is_int8 else k // 2
    launch(
        grad_input_kernel,
        (row_tiles * ceil_div(row_bytes, config.bytes), config.splits),
        grad,
        grad.stride(0),
        packed,
        absmax,
        group_scales,
        offset,
        None if group_scales is None else scale_map(packed.device),
        expert_ends,
        experts,
        grad_t,
        lora_a,
        partial,
        m,
        row_tiles,
        n,
        k,
        row_bytes,
        1 if is_int8 else k // block_size,
        0 if grad_t is None else grad_t.shape[1],
        shapes_backward.split_rows(config, n),
        FORMAT=format,
        BLOCK_SIZE=1 if is_int8 else block_size,
        DOUBLE_QUANT=group_scales is not None,
        DTYPE=DTYPES[grad.dtype],
        PORTABLE=PORTABLE,
        EXPERTS=next_power_of_2(experts),
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        BYTES=config.bytes,
        WARPS=config.warps,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if config.splits > 1:
        add_splits(partial, out)


def _decoded(grad, packed, absmax, group_scales, offset, format, block_size, grad_t, lora_a, k):
    """torch's product of grad [m, n] and the decoded weight, and LoRA's, which it adds in its sums."""
    weight = torch.ops.lowbit_triton.dequantize.default(
        packed, absmax, group_scales, offset, format, block_size, [grad.shape[1], k], grad.dtype
    )
    if grad_t is None:
        return grad @ weight
    grad_t, a_columns = rounded_factors(grad_t, lora_a.view(grad_t.shape[1], k).T, grad.dtype)
    return torch.addmm(grad_t @ a_columns.T, grad, weight)


def linear_grad_input(
    grad, packed, absmax, group_scales, offset, format, block_size, in_features, grad_t=None, lora_a=None
) -> torch.Tensor:
    m, k = rows_of_floats("grad", grad), in_features
    check_size("in_features", k)
    n, leading = int(grad.shape[-1]), list(grad.shape[:-1])  # n: as k in linear
    weight = weight_of((n, k), grad, packed, absmax, group_scales, offset, format, block_size)
    grad_t, lora_a = lora_factors(("grad_t", "lora_a"), grad_t, lora_a, m, k, grad)
    if m == 0 or k == 0:
        return grad.new_empty([*leading, k])
    grad = grad.reshape(m, n)
    gpu = gpu_of(grad.device)
    problem = Problem(rows_of(m, grad.dtype), n, k, grad.dtype, format, block_size)
    if shapes_backward.decodes_first(problem, gpu):
        return _decoded(grad, *weight, grad_t, lora_a, k).view(*leading, k)
    out = grad.new_empty([m, k])
    arguments = (grad if grad.stride(1) == 1 else grad.contiguous(), *weight, grad_t, lora_a, out)
    run = lambda config: fused(config, *arguments)  # noqa: E731
    run(autotune.chosen("linear_grad_input", problem, gpu, shapes_backward.grad_input_configs(problem, gpu), run))
    return out.view(*leading, k)
