"""The products of a mixture of experts, one launch each: with packed weights, and with dense matrices for LoRA.

Tokens are sorted by expert, and ``expert_ends`` stays on the GPU: programs look up there which expert their tile of
rows belongs to (``products.py``), and those beyond the last tile end at once. An expert without tokens has no tile: its
weight is never read. grouped_linear and grouped_linear_grad_input run the kernels of ``linear.py`` and
``linear_grad_input.py``.

grouped_matmul and grouped_outer take factors of one 16-bit dtype to tensor cores as they are. Any others are multiplied
in fp32, with FMAs: LoRA's ranks make these products small, and its fp32 parameters want fp32 gradients.
"""

import torch
import triton
import triton.language as tl

from . import autotune, linear, linear_grad_input, shapes
from .decode import DTYPES, round_to
from .dequantize import dequantize
from .launch import launch
from .operands import (
    check_dimensions,
    check_float,
    check_size,
    expert_ends_of,
    lora_factors,
    optional,
    rows_of_floats,
    weight_of,
    wrong,
)
from .products import add_shares, dot, expert_of_tile, shares_of, tile_position
from .shapes import ceil_div, gpu_of, next_power_of_2


def grouped_linear(
    x, packed, absmax, group_scales, offset, spec, expert_ends, out_features, bias, t, lora_b, scaling
) -> torch.Tensor:
    m, experts = rows_of_floats("x", x), expert_ends.numel()
    check_dimensions("x", x, 2)
    check_size("out_features", out_features)
    n, k = out_features, x.shape[1]
    weight = weight_of((experts, n, k), x, packed, absmax, group_scales, offset, spec)
    bias = optional("bias", bias, experts * n, x)
    t, lora_b = lora_factors(("t", "lora_b"), t, lora_b, m, experts * n, x)
    ends = expert_ends_of(expert_ends, m, x)
    y = x.new_empty([m, n])
    if y.numel() == 0:
        return y
    problem = shapes.Problem("linear", next_power_of_2(m), n, k, x.dtype, weight.spec, experts)
    if k == 0 or not problem.has_whole_blocks:
        y = grouped_matmul(x, dequantize(*weight.arguments(), (experts, n, k), torch.float32), ends)
        if t is not None:
            y += scaling * grouped_matmul(t, lora_b.view(experts, n, -1), ends)
        if bias is not None:
            of_row = torch.searchsorted(ends, torch.arange(m, device=ends.device), right=True).clamp(max=experts - 1)
            y += bias.view(experts, n)[of_row]
        return y.to(x.dtype)
    x = x.contiguous()
    run = lambda config: linear.fused(config, x, weight, bias, t, lora_b, scaling, y, ends)  # noqa: E731
    autotune.run_best(problem, gpu_of(x.device), run)
    return y


def grouped_linear_grad_input(
    grad, packed, absmax, group_scales, offset, spec, expert_ends, in_features, grad_t=None, lora_a=None
) -> torch.Tensor:
    m, experts = rows_of_floats("grad", grad), expert_ends.numel()
    check_dimensions("grad", grad, 2)
    check_size("in_features", in_features)
    n, k = grad.shape[1], in_features
    weight = weight_of((experts, n, k), grad, packed, absmax, group_scales, offset, spec)
    grad_t, lora_a = lora_factors(("grad_t", "lora_a"), grad_t, lora_a, m, experts * k, grad)
    ends = expert_ends_of(expert_ends, m, grad)
    out = grad.new_empty([m, k])
    if out.numel() == 0:
        return out
    problem = shapes.Problem("linear_grad_input", next_power_of_2(m), n, k, grad.dtype, weight.spec, experts)
    if not problem.has_whole_blocks:
        decoded = dequantize(*weight.arguments(), (experts, n, k), torch.float32)
        out = grouped_matmul(grad, decoded.transpose(1, 2), ends)
        if grad_t is not None:
            out += grouped_matmul(grad_t, lora_a.view(experts, -1, k).transpose(1, 2), ends)
        return out.to(grad.dtype)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    run = lambda config: linear_grad_input.fused(config, grad, weight, grad_t, lora_a, out, ends)  # noqa: E731
    autotune.run_best(problem, gpu_of(grad.device), run)
    return out


@triton.jit(do_not_specialize=["m", "row_tiles"])
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
    m,
    y,
    row_tiles,
    n,
    k,
    split_columns,
    DTYPE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Write y [splits, m, n], TILE_M rows of one expert by TILE_N columns; fp32 where there are several splits.

    A split sums over ``split_columns`` of x, a multiple of TILE_K.
    """
    split = tl.program_id(1)
    row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, tl.cdiv(n, TILE_N))
    expert, begin, end = expert_of_tile(row_tile, expert_ends, experts, m, TILE_M, EXPERTS)
    if expert < experts:
        rows = begin + tl.arange(0, TILE_M)
        columns = column_tile.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
        matrix = matrices + expert.to(tl.int64) * matrix_expert
        total = tl.zeros((TILE_M, TILE_N), tl.float32)
        first = split * split_columns
        for start in range(first, tl.minimum(first + split_columns, k), TILE_K):
            at = start + tl.arange(0, TILE_K).to(tl.int64)
            mask = (rows[None, :] < end) & (at[:, None] < k)
            a = tl.load(x + rows[None, :] * x_row + at[:, None] * x_column, mask=mask, other=0.0)
            mask = (columns[:, None] < n) & (at[None, :] < k)
            b = tl.load(matrix + columns[:, None] * matrix_row + at[None, :] * matrix_column, mask=mask, other=0.0)
            total = dot(a.to(DTYPE), b.to(DTYPE), total, True)
        mask = (rows[:, None] < end) & (columns[None, :] < n)
        at = (split.to(tl.int64) * m + rows[:, None]) * n + columns[None, :]
        tl.store(y + at, round_to(total, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def grouped_outer_kernel(
    a,
    a_row,
    a_column,
    b,
    b_row,
    b_column,
    expert_ends,
    m,
    out,
    n,
    k,
    DTYPE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Write fp32 out [experts, n, k], one expert's TILE_N by TILE_K; zero where it has no rows."""
    column_tiles = tl.cdiv(k, TILE_K)
    tiles = tl.cdiv(n, TILE_N) * column_tiles
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    begin = tl.maximum(tl.load(expert_ends + expert - 1, mask=expert > 0, other=0), 0)
    end = tl.minimum(tl.load(expert_ends + expert), m)
    p = (tile // column_tiles).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    q = (tile % column_tiles).to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    total = tl.zeros((TILE_N, TILE_K), tl.float32)
    for start in range(begin, end, TILE_M):
        rows = start + tl.arange(0, TILE_M).to(tl.int64)
        mask = (rows[:, None] < end) & (p[None, :] < n)
        left = tl.load(a + rows[:, None] * a_row + p[None, :] * a_column, mask=mask, other=0.0)
        mask = (rows[None, :] < end) & (q[:, None] < k)
        right = tl.load(b + rows[None, :] * b_row + q[:, None] * b_column, mask=mask, other=0.0)
        total = dot(left.to(DTYPE), right.to(DTYPE), total, True)
    at = (expert.to(tl.int64) * n + p[:, None]) * k + q[None, :]
    tl.store(out + at, total, mask=(p[:, None] < n) & (q[None, :] < k))


def _product_dtype(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    return a.dtype if a.dtype == b.dtype else torch.float32


def grouped_matmul(x, matrices, expert_ends, dtype=torch.float32) -> torch.Tensor:
    m, experts = rows_of_floats("x", x), expert_ends.numel()
    check_dimensions("x", x, 2)
    check_dimensions("matrices", matrices, 3)
    k, n = x.shape[1], matrices.shape[1]
    check_float("matrices", matrices.dtype)
    if matrices.shape != (experts, n, k) or matrices.device != x.device:
        expected = f"{experts} (experts) x out_features x {k} (x's) on {x.device}"
        raise wrong("matrices", expected, f"{tuple(matrices.shape)} on {matrices.device}")
    ends = expert_ends_of(expert_ends, m, x)
    check_float("dtype", dtype)
    y = x.new_empty([m, n], dtype=dtype)
    if y.numel() == 0:
        return y
    of_products = _product_dtype(x, matrices)
    c = shapes.grouped_matmul_config(m, n, k, experts, of_products, gpu_of(x.device))
    row_tiles, shares = shapes.row_tile_count(m, experts, c.tile_m), shares_of(y, c.splits)
    launch(
        grouped_matmul_kernel,
        (row_tiles * ceil_div(n, c.tile_n), c.splits),
        *(x, *x.stride(), matrices, *matrices.stride(), ends, experts, m, shares, row_tiles, n, k),
        ceil_div(ceil_div(k, c.tile_k), c.splits) * c.tile_k,
        DTYPE=DTYPES[of_products],
        EXPERTS=next_power_of_2(experts),
        TILE_M=c.tile_m,
        TILE_N=c.tile_n,
        TILE_K=c.tile_k,
        num_warps=c.warps,
        num_stages=c.stages,
    )
    add_shares(shares, y)
    return y


def grouped_outer(a, b, expert_ends) -> torch.Tensor:
    m, experts = rows_of_floats("a", a), expert_ends.numel()
    check_dimensions("a", a, 2)
    check_dimensions("b", b, 2)
    check_float("b", b.dtype)
    if b.shape[0] != m or b.device != a.device:
        raise wrong("b", f"{m} rows (a's) on {a.device}", f"{b.shape[0]} on {b.device}")
    n, k = a.shape[1], b.shape[1]
    out = a.new_empty([experts, n, k], dtype=torch.float32)
    c = shapes.grouped_outer_config(n, k)
    launch(
        grouped_outer_kernel,
        (experts * ceil_div(n, c.tile_n) * ceil_div(k, c.tile_k),),
        *(a, *a.stride(), b, *b.stride(), expert_ends_of(expert_ends, m, a), m, out, n, k),
        DTYPE=DTYPES[_product_dtype(a, b)],
        TILE_M=c.tile_m,
        TILE_N=c.tile_n,
        TILE_K=c.tile_k,
        num_warps=c.warps,
        num_stages=c.stages,
    )
    return out
