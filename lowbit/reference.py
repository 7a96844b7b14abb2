"""The fp32 oracle: every operation in plain torch, slow and obvious.

Each function has the name and the arguments of the op whose meaning it defines; their types are in the schemas of
``lowbit/ops/``. All other backends are tested against this file: bytes and decoded weights bit for bit, products within
the bound derived in ``tests/cases.py``. It runs on any device that torch runs on, and does not check its arguments.
"""

import math

import torch

from . import format as fmt
from .format import WeightSpec


def quantize(weight: torch.Tensor, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(packed uint8, absmax)`` of a float weight of any shape; absmax as stored before double quantization.

    A block that holds NaN or inf gets a non-finite absmax, and arbitrary codes.
    """
    how = WeightSpec.parse(spec)
    weight = weight.detach().float()
    if how.format == "int8":
        return _quantize_int8(weight)
    if how.record.scales.encode is not None:
        absmax = how.record.scales.encode(_absmax(weight, how.block_size))
        return encode(weight, decode_scales(absmax, None, None, spec), spec), absmax
    return _quantize_codebook(weight, how)


def _absmax(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    blocks = _blocks(weight, block_size)
    return blocks.abs().amax(1) if blocks.numel() else blocks.new_zeros(0)


def _quantize_codebook(weight: torch.Tensor, how: WeightSpec) -> tuple[torch.Tensor, torch.Tensor]:
    flat, block_size = weight.reshape(-1), how.block_size
    numel = flat.numel()
    full = numel - numel % block_size
    midpoints, code_of_rank = (table.to(flat.device) for table in fmt.thresholds(how.format))

    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    # Full blocks multiply by the reciprocal, the short one divides: two different roundings, kept from bitsandbytes.
    scaled = (blocks * (1.0 / absmax.clamp(min=fmt.TINY_ABSMAX))[:, None]).clamp(-1, 1).reshape(-1)
    if full < numel:
        rest = flat[full:]
        rest_absmax = rest.abs().amax().clamp(min=fmt.TINY_ABSMAX)
        absmax = torch.cat([absmax, rest_absmax[None]])
        scaled = torch.cat([scaled, rest / rest_absmax])

    rank = torch.bucketize(scaled, midpoints)  # the number of midpoints t with x > t
    codes = code_of_rank[rank.clamp(max=15)]
    if numel % 2:
        codes = torch.cat([codes, code_of_rank[torch.bucketize(torch.zeros_like(scaled[:1]), midpoints)]])
    return (codes[0::2] << 4) | codes[1::2], absmax


def _quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = weight.reshape(fmt.row_shape(weight.shape))
    absmax = rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    # Infinite for a row of zeros (and below 3.7e-37): such a row gets codes 0, as in bitsandbytes on x86.
    scale = absmax.reciprocal() * fmt.INT8_MAX
    codes = torch.round(rows * torch.where(torch.isfinite(scale), scale, 0.0)[:, None])
    return codes.nan_to_num().to(torch.int8).view(torch.uint8).reshape(-1), absmax


def _blocks(values: torch.Tensor, block_size: int) -> torch.Tensor:
    """Flattened to [blocks, block_size], zeros after the last element."""
    flat = values.reshape(-1)
    blocks = fmt.block_count(flat.numel(), block_size)
    return torch.nn.functional.pad(flat, (0, blocks * block_size - flat.numel())).view(blocks, block_size)


def _sum_in_order(terms: torch.Tensor) -> torch.Tensor:
    """[blocks, n] to [blocks], n a multiple of 16: sixteen partial sums in fp32, then a tree, as the kernels do it."""
    partial = torch.zeros_like(terms[:, :16])
    for piece in terms.split(16, dim=1):
        partial = partial + piece
    while partial.shape[1] > 1:
        half = partial.shape[1] // 2
        partial = partial[:, :half] + partial[:, half:]
    return partial[:, 0]


def search_scales(weight: torch.Tensor, importance: torch.Tensor | None, spec: str) -> torch.Tensor:
    """The signed scale of each block, fp32 [b], with the least squared error among absmax * SCALE_FACTORS.

    Each element's squared error is weighted by ``importance`` [columns] of its column, unless that is zero for a whole
    block. A block whose absmax is below 1e-38 or above 3e38 keeps it; one with NaN or inf gets a non-finite scale.
    """
    how = WeightSpec.parse(spec)
    columns = weight.shape[-1] if weight.dim() else 1
    blocks = _blocks(weight.detach().float(), how.block_size)
    absmax = _absmax(weight.detach().float(), how.block_size)
    values = blocks * (1.0 / absmax)[:, None]
    weights = torch.ones_like(blocks)
    if importance is not None and blocks.numel():
        weights = _blocks(importance.float().repeat(weight.numel() // columns), how.block_size)
        weights = torch.where((weights > 0).any(1, keepdim=True), weights, 1.0)

    midpoints, code_of_rank = (table.to(weight.device) for table in fmt.thresholds(how.format))
    ordered = fmt.codebook(how.format, weight.device)[code_of_rank.int()]
    best, least = torch.ones_like(absmax), torch.full_like(absmax, float("inf"))
    for factor in torch.tensor(fmt.SCALE_FACTORS, dtype=torch.float32, device=weight.device):
        rank = torch.bucketize(values * (1.0 / factor), midpoints)
        error = values - ordered[rank.clamp(max=15)] * factor
        total = _sum_in_order(error * error * weights)
        better = total < least
        best, least = torch.where(better, factor, best), torch.where(better, total, least)
    searched = (absmax >= fmt.TINY_ABSMAX) & (absmax <= fmt.LARGEST_SEARCHED)
    return torch.where(searched, absmax * best, absmax)


def encode(weight: torch.Tensor, scales: torch.Tensor, spec: str) -> torch.Tensor:
    """packed uint8 [ceil(n/2)]: the code nearest to each element times fl(1 / scale), for given fp32 scales [b].

    Where |scale| is below 1e-38 (its inverse could overflow) that of zero.
    """
    how, numel = WeightSpec.parse(spec), weight.numel()
    midpoints, code_of_rank = (table.to(weight.device) for table in fmt.thresholds(how.format))
    inverse = torch.where(scales.abs() >= fmt.TINY_ABSMAX, 1.0 / scales, 0.0)
    scaled = (_blocks(weight.detach().float(), how.block_size) * inverse[:, None]).reshape(-1)
    scaled = torch.cat([scaled[:numel], scaled.new_zeros(numel % 2)])
    codes = code_of_rank[torch.bucketize(scaled, midpoints).clamp(max=15)]
    return (codes[0::2] << 4) | codes[1::2]


def quantize_scales(absmax: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Double quantization of absmax fp32 [b]: ``(codes uint8 [b], group_scales fp32 [ceil(b/256)])``."""
    blocks = absmax.numel()
    groups = fmt.block_count(blocks, fmt.GROUP_SIZE)
    values = torch.nn.functional.pad(absmax - offset, (0, groups * fmt.GROUP_SIZE - blocks))
    values = values.view(groups, fmt.GROUP_SIZE)
    group_scales = values.abs().amax(dim=1)
    scaled = (values * (1.0 / group_scales)[:, None]).clamp(-1, 1)
    # bitsandbytes rounds to one of 65536 positions first; the two products must round apart (no FMA).
    position = (scaled + 1.0) * 32767.5 + 0.5
    position = torch.where(torch.isnan(position), 0.0, position).to(torch.int64)
    codes = fmt.SCALE_CODE_TABLE.to(absmax.device)[position]
    codes[group_scales == 0] = 0
    return codes.reshape(-1)[:blocks].contiguous(), group_scales


def decode_scales(absmax, group_scales, offset, spec, first_block=0) -> torch.Tensor:
    """The fp32 scale of each block or row, flat: ``absmax`` itself, or its codes decoded.

    ``first_block``: which block of the whole weight, whose ``group_scales`` these are, absmax begins with.
    """
    how, absmax = WeightSpec.parse(spec), absmax.reshape(-1)
    if how.double_quant:
        entries = fmt.scale_map(absmax.device)[absmax.int()]
        group = torch.arange(first_block, first_block + absmax.numel(), device=absmax.device) // fmt.GROUP_SIZE
        return entries * group_scales[group] + offset
    decode = how.record.scales.decode
    return absmax if decode is None else decode(absmax)


def decode_codes(packed: torch.Tensor, spec: str) -> torch.Tensor:
    """The value of each code in units of its scale, fp32, flat; of an odd number of weights also the code that pads."""
    record, packed = WeightSpec.parse(spec).record, packed.reshape(-1)
    if record.codebook is None:
        return packed.view(torch.int8).float()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1) if record.bits == 4 else packed
    return fmt.codebook(record.name, packed.device)[codes.int()]


def dequantize(packed, absmax, group_scales, offset, spec, shape, dtype) -> torch.Tensor:
    """The decoded weight: fp32 product of codebook value and block scale, rounded once to ``dtype``."""
    how, numel = WeightSpec.parse(spec), math.prod(shape)
    values, scales = decode_codes(packed, spec)[:numel], decode_scales(absmax, group_scales, offset, spec)
    if how.record.scales.per_row:
        values = values.reshape(fmt.row_shape(shape)) * scales[:, None] * (1 / fmt.INT8_MAX)
    else:
        values = values * scales[torch.arange(numel, device=packed.device) // how.block_size]
    return values.to(dtype).reshape(shape)


def dequantize_out(packed, absmax, group_scales, offset, spec, out) -> None:
    """Writes what :func:`dequantize` returns into ``out``, of its shape and dtype."""
    out.copy_(dequantize(packed, absmax, group_scales, offset, spec, list(out.shape), out.dtype))


def linear(x, packed, absmax, group_scales, offset, spec, out_features, bias, t, lora_b, scaling) -> torch.Tensor:
    """``x W^T + scaling * t lora_b^T + bias`` in fp32, rounded once to x's dtype; x [..., K] -> [..., N]."""
    shape = [out_features, x.shape[-1]]
    weight = dequantize(packed, absmax, group_scales, offset, spec, shape, torch.float32)
    return dense_linear(x, weight, bias, t, lora_b, scaling)


def dense_linear(x, weight, bias, t, lora_b, scaling) -> torch.Tensor:
    """``linear`` for a decoded weight, fp32 [N, K]."""
    y = x.float() @ weight.T
    if t is not None:
        y = y + scaling * (t.float() @ lora_b.float().T)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def linear_approximate(
    x, packed, absmax, group_scales, offset, spec, out_features, bias, t, lora_b, scaling
) -> torch.Tensor:
    """``linear`` with activations in int8, one scale per 64 of a row, and the codebook in multiples of 1 / 127.

    Exact where there is nothing to approximate with: int8 weights, in_features that are not a multiple of 64.
    """
    in_features, how = x.shape[-1], WeightSpec.parse(spec)
    if how.format == "int8" or in_features % 64 or in_features == 0:
        return linear(x, packed, absmax, group_scales, offset, spec, out_features, bias, t, lora_b, scaling)
    chunks = x.float().unflatten(-1, (-1, 64))
    largest = chunks.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127.0) / largest  # 127 / largest would be a reciprocal and a product
    in_range = inverse <= torch.finfo(torch.float32).max
    rounded = torch.where(in_range, (chunks * inverse).round(), 0.0)
    scales = torch.where(in_range, largest / 127, (chunks * 0.0).sum(-1, keepdim=True))

    scaled = decode_codes(packed, spec) * 127
    block = torch.arange(scaled.numel(), device=packed.device) // how.block_size
    weight = (scaled + scaled.sign() * 0.5).trunc() / 127 * decode_scales(absmax, group_scales, offset, spec)[block]
    rounded_x = (rounded * scales).flatten(-2)
    return dense_linear(rounded_x, weight.view(out_features, in_features), bias, t, lora_b, scaling).to(x.dtype)


def linear_grad_input(
    grad, packed, absmax, group_scales, offset, spec, in_features, grad_t=None, lora_a=None
) -> torch.Tensor:
    """``grad W + grad_t lora_a`` in fp32, rounded once to grad's dtype; [..., N] (and [..., rank]) -> [..., K]."""
    shape = [grad.shape[-1], in_features]
    weight = dequantize(packed, absmax, group_scales, offset, spec, shape, torch.float32)
    return dense_grad_input(grad, weight, grad_t, lora_a)


def dense_grad_input(
    grad: torch.Tensor, weight: torch.Tensor, grad_t: torch.Tensor | None, lora_a: torch.Tensor | None
) -> torch.Tensor:
    """``linear_grad_input`` for a decoded weight, fp32 [N, K]."""
    grad_x = grad.float() @ weight
    if grad_t is not None:
        grad_x = grad_x + grad_t.float() @ lora_a.float()
    return grad_x.to(grad.dtype)


def lora_down(x: torch.Tensor, factor: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * x factor^T`` in fp32; x [..., K], factor [rank, K] -> [..., rank]."""
    return scale * (x.float() @ factor.float().T)


def lora_up(
    t: torch.Tensor, factor: torch.Tensor, bias: torch.Tensor | None, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """``scale * t factor^T + bias`` in fp32, rounded once to ``dtype``; t [..., rank], factor [N, rank] -> [..., N]."""
    y = scale * (t.float() @ factor.float().T)
    return (y if bias is None else y + bias.float()).to(dtype)


def lora_outer(wide: torch.Tensor, low: torch.Tensor, scale: float, is_transposed: bool) -> torch.Tensor:
    """``scale * wide^T low``, summed over rows, in fp32 [W, rank], or its transpose; low in fp32."""
    a, b = wide.reshape(-1, wide.shape[-1]).float(), low.reshape(-1, low.shape[-1])
    return scale * (b.T @ a if is_transposed else a.T @ b)


def expert_rows(expert_ends: torch.Tensor) -> list[slice]:
    """The rows of each expert: they begin where the one's before end."""
    ends = expert_ends.tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def grouped_linear(
    x, packed, absmax, group_scales, offset, spec, expert_ends, out_features, bias, t, lora_b, scaling
) -> torch.Tensor:
    """``linear`` of each expert's rows of x [T, K] with its matrix of the stack [E, N, K]; -> [T, N].

    expert_ends int32 [E]: where the rows of each expert end, the last one at T. bias [E, N], t [T, r], lora_b
    [E, N, r].
    """
    shape = [expert_ends.numel(), out_features, x.shape[-1]]
    weight = dequantize(packed, absmax, group_scales, offset, spec, shape, torch.float32)
    y = x.new_zeros([x.shape[0], out_features])
    for expert, at in enumerate(expert_rows(expert_ends)):
        of_expert = (None if bias is None else bias[expert], *((None, None) if t is None else (t[at], lora_b[expert])))
        y[at] = dense_linear(x[at], weight[expert], *of_expert, scaling)
    return y


def grouped_linear_grad_input(
    grad, packed, absmax, group_scales, offset, spec, expert_ends, in_features, grad_t=None, lora_a=None
) -> torch.Tensor:
    """``linear_grad_input`` by expert: grad [T, N] (and grad_t [T, r], lora_a [E, r, K]) -> [T, K]."""
    shape = [expert_ends.numel(), grad.shape[-1], in_features]
    weight = dequantize(packed, absmax, group_scales, offset, spec, shape, torch.float32)
    grad_x = grad.new_zeros([grad.shape[0], in_features])
    for expert, at in enumerate(expert_rows(expert_ends)):
        lora = (None, None) if grad_t is None else (grad_t[at], lora_a[expert])
        grad_x[at] = dense_grad_input(grad[at], weight[expert], *lora)
    return grad_x


def grouped_matmul(
    x: torch.Tensor, matrices: torch.Tensor, expert_ends: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``x M^T`` of each expert's rows of x [T, K] with its matrix of [E, P, K]; -> [T, P] in ``dtype``."""
    y = x.new_zeros([x.shape[0], matrices.shape[1]], dtype=dtype)
    for expert, at in enumerate(expert_rows(expert_ends)):
        y[at] = x[at].float() @ matrices[expert].float().T
    return y


def grouped_outer(a: torch.Tensor, b: torch.Tensor, expert_ends: torch.Tensor) -> torch.Tensor:
    """``a^T b`` of each expert's rows of a [T, P] and b [T, Q]; -> fp32 [E, P, Q]."""
    y = a.new_zeros([expert_ends.numel(), a.shape[1], b.shape[1]], dtype=torch.float32)
    for expert, at in enumerate(expert_rows(expert_ends)):
        y[expert] = a[at].float().T @ b[at].float()
    return y
