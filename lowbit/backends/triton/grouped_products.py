"""Products of each expert's rows with dense matrices, for LoRA and its gradients: grouped_matmul and grouped_outer.

Factors of one 16-bit dtype go to tensor cores as they are. Any others are multiplied in fp32, with FMAs: LoRA's ranks
make these products small, and its fp32 parameters want fp32 gradients.
"""

import torch
import triton
import triton.language as tl

from .gpu import gpu_of
from .grid import ceil_div, expert_of_tile, next_power_of_2, row_tile_count, tile_position
from .launch import launch
from .operands import check_dimensions, check_float, expert_ends_of, rows_of_floats, wrong
from .rounding import DTYPES
from .shapes import splits_to_fill
from .splits import add_splits
from .tiles_backward import transposed_dot


@triton.jit(do_not_specialize=["tokens", "row_tiles"])
def grouped_matmul_kernel(
    x,
    x_row,
    x_column,
    matrices,
    matrix_expert,
    matrix_row,
    matrix_column,
    expert_ends,
    experts,
    tokens,
    y,
    row_tiles,
    out_features,
    in_features,
    split_columns,
    DTYPE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """fp32 y [splits, tokens, out_features], TILE_M tokens of one expert by TILE_N columns.

    A split sums over ``split_columns`` of x, a multiple of TILE_K.
    """
    split = tl.program_id(1)
    row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, tl.cdiv(out_features, TILE_N))
    expert, begin, end = expert_of_tile(row_tile, expert_ends, experts, tokens, TILE_M, EXPERTS)
    if expert < experts:
        m = begin + tl.arange(0, TILE_M)
        n = column_tile.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
        matrix = matrices + expert.to(tl.int64) * matrix_expert
        total = tl.zeros((TILE_M, TILE_N), tl.float32)
        first = split * split_columns
        for start in range(first, tl.minimum(first + split_columns, in_features), TILE_K):
            k = start + tl.arange(0, TILE_K).to(tl.int64)
            a = tl.load(
                x + m[None, :] * x_row + k[:, None] * x_column,
                mask=(m[None, :] < end) & (k[:, None] < in_features),
                other=0.0,
            )
            b = tl.load(
                matrix + n[:, None] * matrix_row + k[None, :] * matrix_column,
                mask=(n[:, None] < out_features) & (k[None, :] < in_features),
                other=0.0,
            )
            total = transposed_dot(a.to(DTYPE), b.to(DTYPE), total)
        mask = (m[:, None] < end) & (n[None, :] < out_features)
        at = (split.to(tl.int64) * tokens + m[:, None]) * out_features + n[None, :]
        tl.store(y + at, total, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def grouped_outer_kernel(
    a,
    a_row,
    a_column,
    b,
    b_row,
    b_column,
    expert_ends,
    tokens,
    out,
    a_features,
    b_features,
    DTYPE: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """fp32 out [experts, a_features, b_features], one expert's TILE_P by TILE_Q; zero where it has no rows."""
    column_tiles = tl.cdiv(b_features, TILE_Q)
    tiles = tl.cdiv(a_features, TILE_P) * column_tiles
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    begin = tl.maximum(tl.load(expert_ends + expert - 1, mask=expert > 0, other=0), 0)
    end = tl.minimum(tl.load(expert_ends + expert), tokens)
    p = (tile // column_tiles).to(tl.int64) * TILE_P + tl.arange(0, TILE_P)
    q = (tile % column_tiles).to(tl.int64) * TILE_Q + tl.arange(0, TILE_Q)
    total = tl.zeros((TILE_P, TILE_Q), tl.float32)
    for start in range(begin, end, TILE_ROWS):
        m = start + tl.arange(0, TILE_ROWS).to(tl.int64)
        left = tl.load(
            a + m[:, None] * a_row + p[None, :] * a_column,
            mask=(m[:, None] < end) & (p[None, :] < a_features),
            other=0.0,
        )
        right = tl.load(
            b + m[None, :] * b_row + q[:, None] * b_column,
            mask=(m[None, :] < end) & (q[:, None] < b_features),
            other=0.0,
        )
        total = transposed_dot(left.to(DTYPE), right.to(DTYPE), total)
    at = (expert.to(tl.int64) * a_features + p[:, None]) * b_features + q[None, :]
    tl.store(out + at, total, mask=(p[:, None] < a_features) & (q[None, :] < b_features))


def _product_dtype(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    return a.dtype if a.dtype == b.dtype else torch.float32


def _tile_of(features: int, largest: int) -> int:
    return min(largest, max(16, next_power_of_2(features)))


def grouped_matmul(x, matrices, expert_ends) -> torch.Tensor:
    tokens, experts = rows_of_floats("x", x), expert_ends.numel()
    check_dimensions("x", x, 2)
    check_dimensions("matrices", matrices, 3)
    in_features, out_features = x.shape[1], matrices.shape[1]
    check_float("matrices", matrices.dtype)
    if matrices.shape != (experts, out_features, in_features) or matrices.device != x.device:
        expected = f"{experts} (experts) x out_features x {in_features} (x's) on {x.device}"
        raise wrong("matrices", expected, f"{tuple(matrices.shape)} on {matrices.device}")
    expert_ends = expert_ends_of(expert_ends, tokens, x)
    y = x.new_empty([tokens, out_features], dtype=torch.float32)
    if y.numel() == 0:
        return y
    dtype = _product_dtype(x, matrices)
    # Few tokens to an expert: small tiles. fp32 operands pass through shared memory.
    tile_m = 16 if tokens <= 16 * experts or dtype == torch.float32 else 64
    tile_n, tile_k = _tile_of(out_features, 64), 32 if dtype == torch.float32 else 64
    row_tiles = row_tile_count(tokens, experts, tile_m)
    programs, steps = row_tiles * ceil_div(out_features, tile_n), ceil_div(in_features, tile_k)
    # LoRA's rank is one tile: a token's product with it is one program's for all of in_features, if it is not split.
    splits = splits_to_fill(programs, steps, gpu_of(x.device))
    partial = y if splits == 1 else x.new_empty([splits, tokens, out_features], dtype=torch.float32)
    launch(
        grouped_matmul_kernel,
        (programs, splits),
        x,
        *x.stride(),
        matrices,
        *matrices.stride(),
        expert_ends,
        experts,
        tokens,
        partial,
        row_tiles,
        out_features,
        in_features,
        ceil_div(steps, splits) * tile_k,
        DTYPE=DTYPES[dtype],
        EXPERTS=next_power_of_2(experts),
        TILE_M=tile_m,
        TILE_N=tile_n,
        TILE_K=tile_k,
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        add_splits(partial, y)
    return y


def grouped_outer(a, b, expert_ends) -> torch.Tensor:
    tokens, experts = rows_of_floats("a", a), expert_ends.numel()
    check_dimensions("a", a, 2)
    check_dimensions("b", b, 2)
    check_float("b", b.dtype)
    if b.shape[0] != tokens or b.device != a.device:
        raise wrong("b", f"{tokens} rows (a's) on {a.device}", f"{b.shape[0]} on {b.device}")
    a_features, b_features = a.shape[1], b.shape[1]
    expert_ends = expert_ends_of(expert_ends, tokens, a)
    out = a.new_empty([experts, a_features, b_features], dtype=torch.float32)
    dtype = _product_dtype(a, b)
    tile_p, tile_q = _tile_of(a_features, 64), _tile_of(b_features, 64)
    launch(
        grouped_outer_kernel,
        (experts * ceil_div(a_features, tile_p) * ceil_div(b_features, tile_q),),
        a,
        *a.stride(),
        b,
        *b.stride(),
        expert_ends,
        tokens,
        out,
        a_features,
        b_features,
        DTYPE=DTYPES[dtype],
        TILE_P=tile_p,
        TILE_Q=tile_q,
        TILE_ROWS=32,
        num_warps=4,
        num_stages=2,
    )
    return out
