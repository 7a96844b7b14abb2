"""linear_grad_input: grad W + grad_t lora_a on the packed weight, and the same after decoding W where that is faster.

The product is made transposed, W^T grad^T: W is the tensor cores' A operand, which they take from registers (wgmma
on sm_90 as well as mma.sync), and warps divide its columns among themselves, so that each weight is decoded once.
A's rows are columns of W, and their order is free. The two nibbles of a byte therefore go to two accumulators, even
columns and odd ones, joined at the end. Within each, rows are numbered so that a lane's columns are neighbours in
memory (``_to_lanes``): one load from shared memory brings them, after 16-byte copies to there. Decoded weights stay
in registers. Triton moves what lies in bytes with 3.5 byte permutations for each 4 bytes, where 2 would do.

A weight's scale changes along the sum: it cannot wait for the end of it. It goes into the decoded weight, by two
packed FMAs for two weights, with the scale as a sum of two 16-bit numbers: one instruction a weight. Scaling in fp32
would take 2.5 (unpack, multiply, pack), a table of fp32 values 3.4; scaling grad instead takes as many as there are
rows of grad for each 1/(columns in a block), and a tile within one block of columns.
"""

import torch
import triton
import triton.language as tl

from . import PORTABLE, autotune, shapes
from .decode import DTYPES, INT8_UNIT, codes_per_byte, decode_codes, decode_scaled, decode_scales, round_to
from .launch import launch
from .operands import Weight, check_size, lora_factors, rows_of_floats, weight_of
from .products import add_lora, add_shares, decoded_product, dot, expert_of_tile, rest_of, shares_of, tile_position
from .shapes import ceil_div, gpu_of, next_power_of_2, row_tile_count

#: Components of LoRA's rank in a step.
_RANKS = tl.constexpr(16)


@triton.jit
def _to_lanes(tile, WARPS: tl.constexpr):
    """Return [rows, BYTES] with its columns in the order of the sums.

    In the A operand of mma.sync and wgmma lane 4 g + q of a warp holds rows g and g + 8 of each 16: row number bits
    (from the highest) are (repetition, warp, half, g), of which repetition and half are one lane's.
    """
    REPEATS: tl.constexpr = tile.shape[1] // (16 * WARPS)
    lanes = tl.permute(tl.reshape(tile, (tile.shape[0], WARPS, 8, REPEATS, 2)), (0, 3, 1, 4, 2))
    return tl.reshape(lanes, tile.shape)


@triton.jit
def _from_lanes(tile, WARPS: tl.constexpr):
    """Return the inverse of :func:`_to_lanes`."""
    REPEATS: tl.constexpr = tile.shape[1] // (16 * WARPS)
    lanes = tl.permute(tl.reshape(tile, (tile.shape[0], REPEATS, WARPS, 2, 8)), (0, 2, 4, 1, 3))
    return tl.reshape(lanes, tile.shape)


@triton.jit
def _over_columns(scale, BYTES: tl.constexpr, WARPS: tl.constexpr):
    """Return [rows, blocks] repeated for each byte of the blocks, in the order of the sums."""
    ROWS: tl.constexpr = scale.shape[0]
    BLOCKS: tl.constexpr = scale.shape[1]
    scale = tl.broadcast_to(scale[:, :, None], (ROWS, BLOCKS, BYTES // BLOCKS))
    return _to_lanes(tl.reshape(scale, (ROWS, BYTES)), WARPS)


@triton.jit
def _scaled_weight(
    codes, scale, FORMAT: tl.constexpr, DTYPE: tl.constexpr, PORTABLE: tl.constexpr, WARPS: tl.constexpr
):
    """Return (W of the high nibbles, W of the low ones) in DTYPE, of codes [TILE_N, BYTES] and scale [TILE_N, blocks].

    Codes of a byte give the same W twice.
    """
    BYTES: tl.constexpr = codes.shape[1]
    codes = _to_lanes(codes, WARPS)
    if codes_per_byte(FORMAT) == 1:
        scale = _over_columns(scale * INT8_UNIT, BYTES, WARPS)
        weight = round_to(codes.to(tl.float32) * scale, DTYPE)
        return weight, weight
    elif PORTABLE or DTYPE == tl.float32:
        high, low = decode_codes(codes, FORMAT, tl.float32, PORTABLE)
        scale = _over_columns(scale, BYTES, WARPS)
        return round_to(high * scale, DTYPE), round_to(low * scale, DTYPE)
    else:
        scale_high = round_to(scale, DTYPE)
        scale_low = rest_of(scale, scale_high).to(DTYPE)
        scale_high, scale_low = _over_columns(scale_high, BYTES, WARPS), _over_columns(scale_low, BYTES, WARPS)
        return decode_scaled(codes, scale_high, scale_low, FORMAT, DTYPE)


@triton.jit
def _load_lora_a(lora_a, column, k, rank, r, WARPS: tl.constexpr):
    mask = (r[:, None] < rank) & (column[None, :] < k)
    a = tl.load(lora_a + r[:, None].to(tl.int64) * k + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return _to_lanes(a, WARPS)


@triton.jit(do_not_specialize=["m", "row_tiles"])  # they change from call to call
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
    m,
    row_tiles,
    n,
    k,
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
    TILE_K: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Write one tile of ``out`` [splits, m, k]: the sum over the rows of W in one split. The first split adds LoRA.

    ``expert_ends``: None, or the weight is a stack of matrices, lora_a too (``grouped.py``).
    """
    CODES: tl.constexpr = codes_per_byte(FORMAT)
    BYTES: tl.constexpr = TILE_K // CODES
    BLOCKS: tl.constexpr = TILE_K // BLOCK_SIZE if CODES == 2 and TILE_K > BLOCK_SIZE else 1
    split = tl.program_id(1)
    row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, tl.cdiv(row_bytes, BYTES))
    first_row, row_end, matrix_row = row_tile.to(tl.int64) * TILE_M, m, 0
    if expert_ends is not None:
        expert, first_row, row_end = expert_of_tile(row_tile, expert_ends, experts, m, TILE_M, EXPERTS)
        if expert >= experts:
            return
        matrix_row = expert.to(tl.int64) * n
        if lora_a is not None:
            lora_a += expert.to(tl.int64) * rank * k
    rows = first_row + tl.arange(0, TILE_M)
    grad_rows = tl.where(rows < row_end, rows, first_row)  # what is read there is not written
    packed += matrix_row * row_bytes
    scales, matrix_block = (absmax, group_scales, offset, scale_map), matrix_row * row_blocks
    first = split * split_rows
    end = tl.minimum(first + split_rows, n)

    # W^T grad^T: one sum for even columns and one for odd ones. Codes of a byte have all columns in the first.
    high_sum = tl.zeros((BYTES, TILE_M), tl.float32)
    low_sum = tl.zeros((BYTES, TILE_M), tl.float32)
    column_byte = column_tile * BYTES + tl.arange(0, BYTES)
    first_block = 0 if CODES == 1 else column_tile * BYTES * 2 // BLOCK_SIZE
    block = first_block + tl.arange(0, BLOCKS)
    for start in range(first, end, TILE_N):
        w_row = start + tl.arange(0, TILE_N)
        w_row64 = w_row.to(tl.int64)
        # Masked rows and columns weigh 0, whatever they hold.
        mask = (w_row[:, None] < n) & (column_byte[None, :] < row_bytes)
        codes = tl.load(packed + w_row64[:, None] * row_bytes + column_byte[None, :], mask=mask, other=0)
        operand = grad + grad_rows[:, None] * grad_stride + w_row[None, :]
        operand = tl.load(operand, mask=w_row[None, :] < n, other=0.0)
        w_block = matrix_block + w_row64[:, None] * row_blocks + block[None, :]
        mask = (w_row[:, None] < n) & (block[None, :] < row_blocks)
        scale = decode_scales(scales, w_block, mask, DOUBLE_QUANT)
        high, low = _scaled_weight(codes, scale, FORMAT, DTYPE, PORTABLE, WARPS)
        high_sum = dot(high, operand, high_sum, True)
        if CODES == 2:
            low_sum = dot(low, operand, low_sum, True)
    if grad_t is not None:
        column = (column_tile * BYTES + tl.arange(0, BYTES)) * CODES
        for start in tl.range(0, tl.where(split == 0, rank, 0), _RANKS, num_stages=1):
            r = start + tl.arange(0, _RANKS)
            t = tl.load(grad_t + grad_rows[:, None] * rank + r[None, :], mask=r[None, :] < rank, other=0.0)
            t = t.to(tl.float32)
            high_sum = add_lora(_load_lora_a(lora_a, column, k, rank, r, WARPS), t, high_sum, DTYPE, True)
            if CODES == 2:
                low_sum = add_lora(_load_lora_a(lora_a, column + 1, k, rank, r, WARPS), t, low_sum, DTYPE, True)
    total = _from_lanes(tl.trans(high_sum), WARPS)
    if CODES == 2:
        total = tl.reshape(tl.join(total, _from_lanes(tl.trans(low_sum), WARPS)), (TILE_M, TILE_K))
    columns = column_tile * TILE_K + tl.arange(0, TILE_K)
    at = (split.to(tl.int64) * m + rows[:, None]) * k + columns[None, :]
    mask = (rows[:, None] < row_end) & (columns[None, :] < k)
    tl.store(out + at, round_to(total, out.dtype.element_ty), mask=mask)


def fused(config: shapes.Config, grad, weight: Weight, grad_t, lora_a, out, expert_ends=None) -> None:
    """Launch the kernels for grad [m, n] and out [m, k] as ``config`` has it.

    All operands are contiguous, but that rows of grad may have any stride. With ``expert_ends`` [experts] the rows are
    sorted by expert, whose matrices are those of a stack.
    """
    (m, n), k, c, spec = grad.shape, out.shape[1], config, weight.spec
    experts = 0 if expert_ends is None else expert_ends.numel()
    row_tiles, shares = row_tile_count(m, experts, c.tile_m), shares_of(out, c.splits)
    row_blocks = k // spec.block_size if spec.block_size else 1
    launch(
        grad_input_kernel,
        (row_tiles * ceil_div(k, c.tile_k), c.splits),
        *(grad, grad.stride(0), *weight.operands(), expert_ends, max(experts, 1), grad_t, lora_a, shares),
        *(m, row_tiles, n, k, k * spec.record.bits // 8, row_blocks),
        *(0 if grad_t is None else grad_t.shape[1], shapes.split_rows(c, n)),
        **weight.constants(),
        DTYPE=DTYPES[grad.dtype],
        PORTABLE=PORTABLE,
        EXPERTS=next_power_of_2(experts),
        TILE_M=c.tile_m,
        TILE_N=c.tile_n,
        TILE_K=c.tile_k,
        WARPS=c.warps,
        num_warps=c.warps,
        num_stages=c.stages,
    )
    add_shares(shares, out)


def linear_grad_input(
    grad, packed, absmax, group_scales, offset, spec, in_features, grad_t=None, lora_a=None
) -> torch.Tensor:
    m, k = rows_of_floats("grad", grad), in_features
    check_size("in_features", k)
    n, leading = int(grad.shape[-1]), list(grad.shape[:-1])  # n: as k in linear
    weight = weight_of((n, k), grad, packed, absmax, group_scales, offset, spec)
    grad_t, lora_a = lora_factors(("grad_t", "lora_a"), grad_t, lora_a, m, k, grad)
    if m == 0 or k == 0:
        return grad.new_empty([*leading, k])
    grad, gpu = grad.reshape(m, n), gpu_of(grad.device)
    problem = shapes.Problem("linear_grad_input", shapes.rows_of(m, grad.dtype), n, k, grad.dtype, weight.spec)
    if shapes.decodes_first(problem, gpu):
        up = None if grad_t is None else lora_a.view(grad_t.shape[1], k).T
        return decoded_product(grad, weight, [n, k], False, grad_t, up).view(*leading, k)
    grad, out = grad if grad.stride(1) == 1 else grad.contiguous(), grad.new_empty([m, k])
    autotune.run_best(problem, gpu, lambda config: fused(config, grad, weight, grad_t, lora_a, out))
    return out.view(*leading, k)
