"""linear_grad_input: grad W + grad_t lora_a, from the packed bytes; the tile itself is in ``tiles_backward.py``."""

import math

import torch
import triton
import triton.language as tl

from ... import reference
from . import PORTABLE
from .constants import scale_map
from .dequantize import dequantize
from .grid import tile_position
from .launch import launch
from .rounding import DTYPES, round_to
from .shapes_backward import capability, grad_input_shape, processors
from .splits import SUM_TILE, sum_splits_kernel
from .tiles_backward import add_lora, columns_per_byte, contract_rows, in_columns


@triton.jit
def grad_input_kernel(
    grad,
    grad_stride,
    packed,
    absmax,
    group_scales,
    offset,
    scale_map,
    grad_t,
    grad_t_row,
    grad_t_column,
    lora_a,
    lora_a_row,
    lora_a_column,
    out,
    rows,
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
    LORA: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BYTES: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One tile of ``out`` [splits, rows, in_features]: the sum over the rows of W in one split, LoRA in the first."""
    split = tl.program_id(1)
    row_tile, column_tile = tile_position(tl.program_id(0), tl.cdiv(rows, TILE_M), tl.cdiv(row_bytes, BYTES))
    m = row_tile.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    valid = tl.where(m < rows, m, 0)  # what is read there is not written
    first = split * split_rows
    high_sum, low_sum = contract_rows(
        grad,
        valid,
        grad_stride,
        packed,
        absmax,
        group_scales,
        offset,
        scale_map,
        0,
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
    if LORA:
        high_sum, low_sum = add_lora(
            high_sum,
            low_sum,
            valid,
            grad_t,
            grad_t_row,
            grad_t_column,
            lora_a,
            lora_a_row,
            lora_a_column,
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
    mask = (m[:, None] < rows) & (k[None, :] < in_features)
    tl.store(out + at, round_to(tile_sum, out.dtype.element_ty), mask=mask)


def linear_grad_input(
    grad, packed, absmax, group_scales, offset, format, block_size, in_features, grad_t=None, lora_a=None
) -> torch.Tensor:
    out_features, rows = grad.shape[-1], math.prod(grad.shape[:-1])
    out = grad.new_empty([*grad.shape[:-1], in_features])
    if out.numel() == 0:
        return out
    if format != "int8" and in_features % block_size:
        shape = [out_features, in_features]
        weight = dequantize(packed, absmax, group_scales, offset, format, block_size, shape, torch.float32)
        return reference.dense_grad_input(grad, weight, grad_t, lora_a)
    grad = grad.reshape(rows, out_features)
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    grad_t = None if grad_t is None else grad_t.reshape(rows, grad_t.shape[-1])
    row_bytes = in_features if format == "int8" else in_features // 2
    shape = grad_input_shape(
        rows, out_features, row_bytes, grad.dtype, processors(grad.device), capability(grad.device)
    )
    partial = out
    if shape.splits > 1:
        partial = grad.new_empty([shape.splits, rows, in_features], dtype=torch.float32)
    launch(
        grad_input_kernel,
        (triton.cdiv(rows, shape.tile_m) * triton.cdiv(row_bytes, shape.bytes), shape.splits),
        grad,
        grad.stride(0),
        packed,
        absmax,
        group_scales,
        offset,
        scale_map(packed.device),
        grad_t,
        *((0, 0) if grad_t is None else grad_t.stride()),
        lora_a,
        *((0, 0) if lora_a is None else lora_a.stride()),
        partial,
        rows,
        out_features,
        in_features,
        row_bytes,
        1 if format == "int8" else in_features // block_size,
        0 if lora_a is None else lora_a.shape[0],
        shape.split_rows,
        FORMAT=format,
        BLOCK_SIZE=1 if format == "int8" else block_size,
        DOUBLE_QUANT=group_scales is not None,
        DTYPE=DTYPES[grad.dtype],
        PORTABLE=PORTABLE,
        LORA=grad_t is not None,
        TILE_M=shape.tile_m,
        TILE_N=shape.tile_n,
        BYTES=shape.bytes,
        WARPS=shape.warps,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    if shape.splits > 1:
        launch(
            sum_splits_kernel,
            (triton.cdiv(out.numel(), SUM_TILE),),
            partial,
            None,
            out,
            in_features,
            out.numel(),
            SPLITS=shape.splits,
            TILE=SUM_TILE,
            num_warps=4,
        )
    return out
