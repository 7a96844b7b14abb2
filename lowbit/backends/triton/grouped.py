"""The products of a mixture of experts: grouped_linear and grouped_linear_grad_input, one launch each.

Tokens are sorted by expert, and ``expert_ends`` stays on the GPU: programs look up there which expert their tile of
rows belongs to (``grid.py``), and those beyond the last tile end at once. An expert without tokens has no tile: its
weight is never read.
"""

import torch
import triton
import triton.language as tl

from . import PORTABLE
from .constants import scale_map
from .dequantize import dequantize
from .grid import expert_of_tile, row_tile_count, tile_position
from .grouped_products import grouped_matmul
from .launch import launch
from .rounding import DTYPES, round_to
from .shapes_backward import GradInputShape, capability, grad_input_tile
from .tiles_backward import add_lora, columns_per_byte, contract_rows, in_columns
from .tiles_forward import add_lora_forward, contract_columns


@triton.jit(do_not_specialize=["tokens", "row_tiles"])
def grouped_linear_kernel(
    x,
    x_stride,
    packed,
    absmax,
    group_scales,
    offset,
    scale_map,
    expert_ends,
    experts,
    tokens,
    bias,
    t,
    t_row,
    t_column,
    lora_b,
    lora_b_expert,
    lora_b_row,
    lora_b_column,
    y,
    row_tiles,
    out_features,
    in_features,
    row_bytes,
    row_blocks,
    rank,
    scaling,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    DTYPE: tl.constexpr,
    PORTABLE: tl.constexpr,
    BIAS: tl.constexpr,
    LORA: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """y [tokens, out_features], TILE_M tokens of one expert by TILE_N columns."""
    row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, tl.cdiv(out_features, TILE_N))
    expert, begin, end = expert_of_tile(row_tile, expert_ends, experts, tokens, TILE_M, EXPERTS)
    if expert < experts:
        m = begin + tl.arange(0, TILE_M)
        rows = tl.where(m < end, m, begin)  # what is read there is not written
        n = column_tile.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
        valid = tl.where(n < out_features, n, 0)
        matrix = expert.to(tl.int64) * out_features
        total = contract_columns(
            x,
            rows,
            x_stride,
            packed + matrix * row_bytes,
            absmax,
            group_scales,
            offset,
            scale_map,
            matrix * row_blocks,
            valid,
            in_features,
            row_bytes,
            row_blocks,
            FORMAT,
            BLOCK_SIZE,
            DOUBLE_QUANT,
            DTYPE,
            PORTABLE,
            TILE_M,
            TILE_N,
            TILE_K,
        )
        if LORA:
            matrix_b = lora_b + expert.to(tl.int64) * lora_b_expert
            total = add_lora_forward(
                total,
                rows,
                valid,
                t,
                t_row,
                t_column,
                matrix_b,
                lora_b_row,
                lora_b_column,
                rank,
                scaling,
                DTYPE,
                16,
            )
        if BIAS:
            total += tl.load(bias + matrix + valid).to(tl.float32)[:, None]
        mask = (m[:, None] < end) & (n[None, :] < out_features)
        tl.store(y + m[:, None] * out_features + n[None, :], round_to(tl.trans(total), DTYPE), mask=mask)


@triton.jit(do_not_specialize=["tokens", "row_tiles"])
def grouped_grad_input_kernel(
    grad,
    grad_stride,
    packed,
    absmax,
    group_scales,
    offset,
    scale_map,
    expert_ends,
    experts,
    tokens,
    grad_t,
    grad_t_row,
    grad_t_column,
    lora_a,
    lora_a_expert,
    lora_a_row,
    lora_a_column,
    out,
    row_tiles,
    out_features,
    in_features,
    row_bytes,
    row_blocks,
    rank,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    DTYPE: tl.constexpr,
    PORTABLE: tl.constexpr,
    LORA: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BYTES: tl.constexpr,
    WARPS: tl.constexpr,
):
    """out [tokens, in_features], TILE_M tokens of one expert by the columns in BYTES bytes."""
    row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, tl.cdiv(row_bytes, BYTES))
    expert, begin, end = expert_of_tile(row_tile, expert_ends, experts, tokens, TILE_M, EXPERTS)
    if expert < experts:
        m = begin + tl.arange(0, TILE_M)
        rows = tl.where(m < end, m, begin)  # what is read there is not written
        matrix = expert.to(tl.int64) * out_features
        high_sum, low_sum = contract_rows(
            grad,
            rows,
            grad_stride,
            packed + matrix * row_bytes,
            absmax,
            group_scales,
            offset,
            scale_map,
            matrix * row_blocks,
            0,
            out_features,
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
        if LORA:
            high_sum, low_sum = add_lora(
                high_sum,
                low_sum,
                rows,
                grad_t,
                grad_t_row,
                grad_t_column,
                lora_a + expert.to(tl.int64) * lora_a_expert,
                lora_a_row,
                lora_a_column,
                rank,
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
        mask = (m[:, None] < end) & (k[None, :] < in_features)
        tl.store(out + m[:, None] * in_features + k[None, :], round_to(tile_sum, DTYPE), mask=mask)


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _strides(tensor: torch.Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()


def _linear_tile(
    rows_per_expert: int, block_size: int, format: str, dtype: torch.dtype, capability: tuple[int, int] | None
) -> dict:
    """TILE_M, TILE_N, TILE_K, warps and stages of grouped_linear for so many rows of x to an expert.

    Warps divide the rows of W, of which each lane decodes its own. A tile of K lies in one block. Sums of one block
    and of all are both held: 64 rows of x by 128 of W take 2 * 32 registers of each of 256 threads.
    """
    tile_k = 64 if format == "int8" else min(block_size, 64)
    if capability is None:  # codes are decoded by selections, in fp32: gfx1100 spills with larger tiles
        rows = 16 if rows_per_expert <= 16 or dtype == torch.float32 else 32
        return dict(TILE_M=rows, TILE_N=32, TILE_K=min(tile_k, 32), num_warps=4, num_stages=2)
    if dtype == torch.float32:  # int8 on sm_90: with 64 rows of W ptxas spills six registers
        tile_n = 32 if format == "int8" else 64
        return dict(TILE_M=16, TILE_N=tile_n, TILE_K=min(tile_k, 32), num_warps=4, num_stages=2)
    if rows_per_expert <= 16:
        return dict(TILE_M=16, TILE_N=64, TILE_K=tile_k, num_warps=4, num_stages=4)
    if rows_per_expert <= 32:
        return dict(TILE_M=32, TILE_N=64, TILE_K=tile_k, num_warps=4, num_stages=2)
    stages = 2 if capability < (9, 0) else 3  # on sm_80 ptxas spills four registers with three
    return dict(TILE_M=64, TILE_N=128, TILE_K=tile_k, num_warps=8, num_stages=stages)


def _grad_input_tile(
    rows_per_expert: int, row_bytes: int, format: str, dtype: torch.dtype, capability: tuple[int, int] | None
) -> GradInputShape:
    """``grad_input_tile``, but for those that ptxas spills registers of, next to the search for the expert.

    They are the tile of 16 rows, int8's of 32, and FP4's of 128 (wgmma).
    """
    rows = max(33 if format == "int8" else 17, rows_per_expert)
    return grad_input_tile(min(rows, 64) if format == "fp4" else rows, row_bytes, dtype, capability)


def _expert_of_row(expert_ends: torch.Tensor, rows: int) -> torch.Tensor:
    found = torch.searchsorted(expert_ends, torch.arange(rows, device=expert_ends.device), right=True)
    return found.clamp(max=expert_ends.numel() - 1)


def grouped_linear(
    x,
    packed,
    absmax,
    group_scales,
    offset,
    format,
    block_size,
    expert_ends,
    out_features,
    bias,
    t,
    lora_b,
    scaling,
) -> torch.Tensor:
    (tokens, in_features), experts = x.shape, expert_ends.numel()
    y = x.new_empty([tokens, out_features])
    if y.numel() == 0:
        return y
    if format != "int8" and in_features % block_size:
        shape = [experts, out_features, in_features]
        weight = dequantize(packed, absmax, group_scales, offset, format, block_size, shape, torch.float32)
        y = grouped_matmul(x, weight, expert_ends)
        if t is not None:
            y += scaling * grouped_matmul(t, lora_b, expert_ends)
        if bias is not None:
            y += bias[_expert_of_row(expert_ends, tokens)]
        return y.to(x.dtype)
    x = _rows_contiguous(x)
    tile = _linear_tile(triton.cdiv(tokens, experts), block_size, format, x.dtype, capability(x.device))
    row_tiles = row_tile_count(tokens, experts, tile["TILE_M"])
    launch(
        grouped_linear_kernel,
        (row_tiles * triton.cdiv(out_features, tile["TILE_N"]),),
        x,
        x.stride(0),
        packed,
        absmax,
        group_scales,
        offset,
        scale_map(packed.device),
        expert_ends,
        experts,
        tokens,
        None if bias is None else bias.contiguous(),
        t,
        *_strides(t, 2),
        lora_b,
        *_strides(lora_b, 3),
        y,
        row_tiles,
        out_features,
        in_features,
        in_features if format == "int8" else in_features // 2,
        1 if format == "int8" else in_features // block_size,
        0 if t is None else t.shape[1],
        float(scaling),
        FORMAT=format,
        BLOCK_SIZE=1 if format == "int8" else block_size,
        DOUBLE_QUANT=group_scales is not None,
        DTYPE=DTYPES[x.dtype],
        PORTABLE=PORTABLE,
        BIAS=bias is not None,
        LORA=t is not None,
        EXPERTS=triton.next_power_of_2(experts),
        **tile,
    )
    return y


def grouped_linear_grad_input(
    grad, packed, absmax, group_scales, offset, format, block_size, expert_ends, in_features, grad_t=None, lora_a=None
) -> torch.Tensor:
    (tokens, out_features), experts = grad.shape, expert_ends.numel()
    out = grad.new_empty([tokens, in_features])
    if out.numel() == 0:
        return out
    if format != "int8" and in_features % block_size:
        shape = [experts, out_features, in_features]
        weight = dequantize(packed, absmax, group_scales, offset, format, block_size, shape, torch.float32)
        out = grouped_matmul(grad, weight.transpose(1, 2), expert_ends)
        if grad_t is not None:
            out += grouped_matmul(grad_t, lora_a.transpose(1, 2), expert_ends)
        return out.to(grad.dtype)
    grad = _rows_contiguous(grad)
    row_bytes = in_features if format == "int8" else in_features // 2
    tile = _grad_input_tile(triton.cdiv(tokens, experts), row_bytes, format, grad.dtype, capability(grad.device))
    row_tiles = row_tile_count(tokens, experts, tile.tile_m)
    launch(
        grouped_grad_input_kernel,
        (row_tiles * triton.cdiv(row_bytes, tile.bytes),),
        grad,
        grad.stride(0),
        packed,
        absmax,
        group_scales,
        offset,
        scale_map(packed.device),
        expert_ends,
        experts,
        tokens,
        grad_t,
        *_strides(grad_t, 2),
        lora_a,
        *_strides(lora_a, 3),
        out,
        row_tiles,
        out_features,
        in_features,
        row_bytes,
        1 if format == "int8" else in_features // block_size,
        0 if lora_a is None else lora_a.shape[1],
        FORMAT=format,
        BLOCK_SIZE=1 if format == "int8" else block_size,
        DOUBLE_QUANT=group_scales is not None,
        DTYPE=DTYPES[grad.dtype],
        PORTABLE=PORTABLE,
        LORA=grad_t is not None,
        EXPERTS=triton.next_power_of_2(experts),
        TILE_M=tile.tile_m,
        TILE_N=tile.tile_n,
        BYTES=tile.bytes,
        WARPS=tile.warps,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
