"""linear: x W^T + scaling t B^T + bias on the packed weight, and the same after decoding W where that is faster.

The codebook's values meet x on tensor cores; the sums over TILE_K columns, all of one block, are scaled in fp32. W is
the right operand: on mma.sync the bytes go from shared memory to the registers which the decoded pairs have to be in.
(Joining them is no work: a byte's two codes are neighbours in k.)
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional

from . import PORTABLE, autotune, shapes
from .decode import INT8_UNIT, codes_per_byte, decode_codes, load_scales, round_to, scales_of
from .launch import launch
from .operands import Weight, check_dimensions, check_size, checked, lora_factors, optional, rows_of_floats, weight_of
from .products import add_lora, add_shares, decoded_product, dot, expert_of_tile, shares_of, tile_position
from .shapes import ceil_div, gpu_of, next_power_of_2, row_tile_count


@triton.jit
def _add_tile(values, weight, total, WEIGHT_FIRST: tl.constexpr):
    """Return total + values W^T, or its transpose if W is the left operand."""
    return dot(weight, values, total) if WEIGHT_FIRST else dot(values, weight, total)


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
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    SPLITS: tl.constexpr,
    COPIES: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Write a tile of y [m, n], or of its share over a part of k in y [SPLITS, m, n].

    WHOLE: k is a multiple of PRODUCTS * TILE_K, as it is for all formats but int8. BLOCK_SIZE is a multiple of TILE_K.
    PRODUCTS of 2: Triton gives each warp rows of W of its own only where it sees a second product; with one it lets two
    warps decode the same weights. ``expert_ends``: None, or the weight is a stack of matrices, lora_b and bias too
    (``grouped.py``).
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    STEP: tl.constexpr = PRODUCTS * TILE_K
    program, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    row_tile, column_tile = tile_position(program, row_tiles, tl.cdiv(n, TILE_N))
    columns = column_tile * TILE_N + tl.arange(0, TILE_N)
    # Tiles at the edge read the first row instead of what is not there, and store nothing of it.
    w_row = tl.where(columns < n, columns, 0).to(tl.int64)
    first_row, row_end = row_tile * TILE_M, m
    if expert_ends is not None:
        expert, first_row, row_end = expert_of_tile(row_tile, expert_ends, experts, m, TILE_M, EXPERTS)
        if expert >= experts:
            return
        w_row += expert.to(tl.int64) * n
    rows = first_row + tl.arange(0, TILE_M)
    x_row = tl.where(rows < row_end, rows, first_row).to(tl.int64)
    x_rows = x + x_row[:, None] * k
    if codes_per_byte(FORMAT) == 1:
        # x's 16 bits hold int8 codes exactly. The sums are scaled by row at the end.
        w_rows, scale = packed + w_row[:, None] * k, absmax + w_row
        x_rows += tl.arange(0, TILE_K)[None, :]
        w_rows += tl.arange(0, TILE_K)[None, :]
        steps = tl.cdiv(tl.cdiv(k, STEP), SPLITS)
        begin = split * steps * STEP
        total = tl.zeros((TILE_N, TILE_M) if WEIGHT_FIRST else (TILE_M, TILE_N), tl.float32)
        for first in range(begin, min(begin + steps * STEP, k), STEP):
            for product in tl.static_range(PRODUCTS):
                at = first + product * TILE_K
                if WHOLE:
                    weight = tl.load(w_rows + at)
                    values = tl.load(x_rows + at)
                else:
                    inside = (at + tl.arange(0, TILE_K) < k)[None, :]
                    weight = tl.load(w_rows + at, mask=inside, other=0)
                    values = tl.load(x_rows + at, mask=inside, other=0.0)
                total = _add_tile(values, weight.to(tl.float32).to(DTYPE), total, WEIGHT_FIRST)
        total = (total.T if WEIGHT_FIRST else total) * (tl.load(scale) * INT8_UNIT)[None, :]
    else:
        # k is a multiple of 32: written so that the compiler knows rows of packed codes to begin at 16 bytes.
        w_rows = packed + w_row[:, None] * (k // 32 * 16) + tl.arange(0, TILE_K // 2)[None, :]
        x_rows += tl.arange(0, TILE_K)[None, :]
        steps = tl.cdiv(k // STEP, SPLITS)
        begin = split * steps * STEP
        end = min(begin + steps * STEP, k)
        # There are COPIES of each scale where a tile has fewer columns than threads. Else the compiler has every thread
        # decode the scales of all of its sums, instead of one that it passes on.
        scales = (absmax, group_scales, offset, scale_map)
        block = tl.broadcast_to((w_row * (k // BLOCK_SIZE))[:, None], (TILE_N, COPIES))
        all_there = block >= 0
        at_first = min(begin, k - TILE_K)  # a last part of k can be empty
        stored, group_scale = load_scales(scales, block + at_first // BLOCK_SIZE, all_there, DOUBLE_QUANT)
        total = tl.zeros((TILE_N, TILE_M) if WEIGHT_FIRST else (TILE_M, TILE_N), tl.float32)
        for first in range(begin, end, STEP):
            for product in tl.static_range(PRODUCTS):
                at = first + product * TILE_K
                codes = tl.load(w_rows + at // 2)
                values = tl.load(x_rows + at)
                scale = tl.max(scales_of(stored, group_scale, scales, DOUBLE_QUANT), axis=1)
                # They are loaded a step ahead: nothing else would hide their way from memory.
                following = block + min(at + TILE_K, end - TILE_K) // BLOCK_SIZE
                stored, group_scale = load_scales(scales, following, all_there, DOUBLE_QUANT)
                high, low = decode_codes(codes, FORMAT, DTYPE, PORTABLE)
                weight = tl.reshape(tl.join(high, low), (TILE_N, TILE_K))
                sums = _add_tile(values, weight, tl.zeros(total.shape, tl.float32), WEIGHT_FIRST)
                scale = scale[:, None] if WEIGHT_FIRST else scale[None, :]
                total = tl.fma(sums, tl.broadcast_to(scale, total.shape), total)
        total = total.T if WEIGHT_FIRST else total
    if t is not None:
        sums = tl.zeros(total.shape, tl.float32)
        for first in tl.range(0, tl.where(split == 0, rank, 0), 16, num_stages=1):  # the first split adds it
            r = first + tl.arange(0, 16)
            mask = (r < rank)[None, :]
            a = tl.load(t + x_row[:, None] * rank + r[None, :], mask=mask, other=0.0).to(tl.float32)
            b = tl.load(lora_b + w_row[:, None] * rank + r[None, :], mask=mask, other=0.0).to(tl.float32)
            sums = add_lora(a, b, sums, DTYPE, False)
        total += scaling * sums
    if bias is not None:
        in_first = w_row * 0 + split == 0  # for each column
        total += tl.load(bias + w_row, mask=in_first, other=0.0).to(tl.float32)[None, :]
    mask = (rows < row_end)[:, None] & (columns < n)[None, :]
    y_row = split.to(tl.int64) * m + rows
    tl.store(y + y_row[:, None] * n + columns[None, :], round_to(total, y.dtype.element_ty), mask=mask)


def fused(config: shapes.Config, x, weight: Weight, bias, t, lora_b, scaling, y, expert_ends=None) -> None:
    """Launch the kernels for x [m, k] and y [m, n] as ``config`` has it; all of the operands contiguous.

    With ``expert_ends`` [experts] the rows of x are sorted by expert, whose matrices are those of a stack.
    """
    (m, k), n, c = x.shape, y.shape[1], config
    experts = 0 if expert_ends is None else expert_ends.numel()
    row_tiles, shares = row_tile_count(m, experts, c.tile_m), shares_of(y, c.splits)
    launch(
        linear_kernel,
        (row_tiles * ceil_div(n, c.tile_n) * c.splits,),
        *(x, *weight.operands(), expert_ends, max(experts, 1), bias, t, lora_b, shares, float(scaling)),
        *(m, n, k, 0 if t is None else t.shape[1], row_tiles),
        **weight.constants(),
        PORTABLE=PORTABLE,
        EXPERTS=next_power_of_2(experts),
        TILE_M=c.tile_m,
        TILE_N=c.tile_n,
        TILE_K=c.tile_k,
        SPLITS=c.splits,
        # As many scales as threads, of which NVIDIA has 32 in a warp.
        COPIES=max(1, 32 * c.warps // c.tile_n),
        WEIGHT_FIRST=c.weight_first,
        PRODUCTS=c.products,
        WHOLE=k % (c.products * c.tile_k) == 0,
        num_warps=c.warps,
        num_stages=c.stages,
    )
    add_shares(shares, y)


def linear(x, packed, absmax, group_scales, offset, spec, out_features, bias, t, lora_b, scaling) -> torch.Tensor:
    m, n = rows_of_floats("x", x), out_features
    check_size("out_features", n)
    k = int(x.shape[-1])  # a number, where torch.compile has a symbol: a weight's sizes choose its kernel
    leading = list(x.shape[:-1])
    weight = weight_of((n, k), x, packed, absmax, group_scales, offset, spec)
    bias = optional("bias", bias, n, x)
    t, lora_b = lora_factors(("t", "lora_b"), t, lora_b, m, n, x)
    x = x.reshape(m, k).contiguous()
    if m == 0 or n == 0:
        return x.new_empty([*leading, n])
    problem, gpu = shapes.Problem("linear", shapes.rows_of(m, x.dtype), n, k, x.dtype, weight.spec), gpu_of(x.device)
    if shapes.decodes_first(problem, gpu):
        up = None if t is None else lora_b.view(n, t.shape[1])
        return decoded_product(x, weight, [n, k], True, t, up, scaling, bias).view(*leading, n)
    y = x.new_empty([m, n])
    autotune.run_best(problem, gpu, lambda config: fused(config, x, weight, bias, t, lora_b, scaling, y))
    return y.view(*leading, n)


#: On a GPU nothing is faster than the exact product.
linear_approximate = linear


def lora_linear(
    x, packed, absmax, group_scales, offset, spec, out_features, bias, lora_a, lora_b, scaling
) -> tuple[torch.Tensor, torch.Tensor]:
    rows_of_floats("x", x)
    check_dimensions("lora_a", lora_a, 2)
    lora_a = checked("lora_a", lora_a, lora_a.shape[0] * x.shape[-1], x)
    dtype = torch.float32 if x.device.type == "cpu" else torch.promote_types(x.dtype, lora_a.dtype)
    t = functional.linear(x.to(dtype), lora_a.to(dtype))
    return linear(x, packed, absmax, group_scales, offset, spec, out_features, bias, t, lora_b, scaling), t
