"""The public functions: arguments checked here, work done by the ops of the chosen backend."""

import math
import weakref

import torch
import torch.nn.functional as F

from . import backends, ops
from . import format as fmt
from .search import check_importance, search
from .tensor import FLOAT_DTYPES, QuantizedTensor, check_block_size, check_float_dtype, check_format


def quantize(
    weight: torch.Tensor,
    *,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    scale: str = "absmax",
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Store ``weight`` in 4 bits: blocks of ``block_size`` elements of the row-major weight share one scale.

    In "int8" it takes 8 bits instead, and one fp32 scale a row (along the last dimension); block_size and double_quant
    are then ignored.

    Args:
        weight: float32, float16 or bfloat16, any shape; finite.
        format: "nf4", "fp4" or "int8".
        block_size: power of two, 32 to 4096.
        double_quant: store the scales in 8 bits (0.516 bytes a weight at block size 64; 0.563 without).
        scale: "absmax", the largest magnitude of each block, or "search": the signed scale among 36 around +-absmax
            that minimises the block's squared error; codes are chosen again for what double quantization makes of it.
            Any reader decodes it. Slower to quantize; the products are the same.
        importance: with "search", one number of at least 0 per input column (the last dimension): the squared errors'
            weights. The mean square of that activation over a few calibration batches is a good choice.

    Raises:
        TypeError: ``weight`` is not a tensor, or not of those dtypes.
        ValueError: another argument is out of range, or ``weight`` holds NaN or inf.

    Source: Dettmers et al., "QLoRA", 2023 (arXiv 2305.14314), and for int8 "LLM.int8()", 2022 (arXiv 2208.07339);
    the bytes are bitsandbytes 0.50's.
    """
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight: expected a torch.Tensor, got {type(weight).__name__}")
    check_float_dtype("weight", weight.dtype)
    check_format(format)
    if format == "int8":
        block_size, double_quant = fmt.row_shape(weight.shape)[1], False
    else:
        check_block_size(block_size)
    if scale not in ("absmax", "search"):
        raise ValueError(f"scale: expected 'absmax' or 'search', got {scale!r}")
    if scale == "search" and format == "int8":
        raise ValueError("scale: expected 'absmax' for format 'int8', whose scales are not searched, got 'search'")
    if importance is not None:
        if scale != "search":
            raise ValueError(f"importance: expected scale='search' with it, got scale={scale!r}")
        check_importance(importance, weight)

    op = getattr(torch.ops, backends.namespace_for(weight.device.type, backends.selected))
    weight = weight.detach()
    encode = None
    if scale == "search":
        absmax, encode = search(op, weight, importance, format, block_size)
    else:
        packed, absmax = op.quantize.default(weight, format, block_size)
    offset = absmax.mean(dtype=torch.float64) if double_quant and absmax.numel() else None
    # The kernels let NaN and inf through to absmax, and the mean does: finding them costs no pass over the weight.
    if not weight.is_meta and absmax.numel():
        _check_finite(absmax.amax() if offset is None else offset, weight)
    group_scales = None
    if double_quant:
        offset = absmax.new_zeros(()) if offset is None else offset.float()
        absmax, group_scales = op.quantize_scales.default(absmax, offset)
    if encode is not None:
        packed = encode(absmax, group_scales, offset)
    return QuantizedTensor(
        packed,
        absmax,
        group_scales,
        offset,
        shape=weight.shape,
        dtype=weight.dtype,
        format=format,
        block_size=block_size,
    )


def _check_finite(summary: torch.Tensor, weight: torch.Tensor) -> None:
    """ValueError unless ``summary`` is finite, which it is where all of ``weight`` is."""
    if math.isfinite(summary.item()):
        return
    flat = weight.reshape(-1)
    bad = (~torch.isfinite(flat)).nonzero()
    first = int(bad[0])
    raise ValueError(
        f"weight: expected finite values, got {bad.numel()} NaN or inf (the first is {flat[first].item()} at flat "
        f"index {first})"
    )


def dequantize(
    q: QuantizedTensor, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The decoded weight, in ``dtype`` (default: that of ``out``, or else ``q.dtype``).

    Args:
        q: the weight.
        dtype: float32, float16 or bfloat16.
        out: where to write and what to return: contiguous, of q's shape and device, and of ``dtype`` where that is
            given.

    Raises:
        TypeError: an argument of the wrong type, or another dtype.
        ValueError: ``out`` does not fit q, is not contiguous, or requires gradients.
    """
    _check_quantized(q)
    return q.dequantize(dtype, out=out)


def linear(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None, *, precision: str = "exact"
) -> torch.Tensor:
    """``x W^T + bias`` with W stored in 4 bits; differentiable in x and bias.

    ``precision="int8"`` computes approximately, for inference: activations rounded to int8 with one scale per 64 of a
    row, the codebook to multiples of 1 / 127, integer products. The error of y is about 1% of its norm where
    activations are normally distributed, more where a few of each 64 are far larger than the rest. It is faster for a
    few rows of x; for many the exact product is. int8 weights and in_features that are not a multiple of 64 stay exact,
    and so does everything on a GPU, where nothing is faster than the exact kernels.

    Args:
        x: [..., in_features], float32, float16 or bfloat16; any leading dimensions, also zero rows.
        q: the weight, [out_features, in_features].
        bias: [out_features] or None.
        precision: "exact" (products in fp32) or "int8".

    Returns:
        [..., out_features] in x's dtype (under autocast, in the autocast dtype); accumulated in fp32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, an unknown precision, or "int8" where a gradient is wanted.
    """
    _check_linear(x, q, bias)
    if precision != "exact":
        _check_precision(precision, x, bias)
    device_type = x.device.type
    if not _autocasts(device_type):
        return _linear(device_type, x, q, bias, precision=precision)
    x = x.to(torch.get_autocast_dtype(device_type))
    with torch.autocast(device_type, enabled=False):
        return _linear(device_type, x, q, bias, precision=precision)


def lora_linear(
    x: torch.Tensor,
    q: QuantizedTensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    precision: str = "exact",
) -> torch.Tensor:
    """``x W^T + scaling * (dropout(x) A^T) B^T + bias``; differentiable in x, bias, lora_a and lora_b.

    t = dropout(x) A^T is computed once and enters the product with W as ``rank`` more columns of the contraction.

    Args:
        x: [..., in_features], float32, float16 or bfloat16.
        q: the frozen weight, [out_features, in_features].
        lora_a: [rank, in_features].
        lora_b: [out_features, rank].
        scaling: lora_alpha / rank, or lora_alpha / sqrt(rank).
        bias: [out_features] or None.
        dropout_p: probability of zeroing an element of the x that enters LoRA, in [0, 1); only where ``training``.
        precision: "exact" or "int8", as in :func:`linear`; LoRA's part is exact in both.

    Returns:
        [..., out_features] in x's dtype (under autocast, in the autocast dtype). With fp32 LoRA weights t is fp32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, ``dropout_p`` out of range, an unknown precision, or "int8"
            where a gradient is wanted.

    Source: Hu et al., "LoRA", 2021 (arXiv 2106.09685).
    """
    _check_lora_linear(x, q, lora_a, lora_b, bias, dropout_p)
    if precision != "exact":
        _check_precision(precision, x, bias, lora_a, lora_b)
    device_type = x.device.type
    if not _autocasts(device_type):
        return _lora_linear(device_type, x, q, lora_a, lora_b, scaling, bias, dropout_p, training, precision)
    x = x.to(torch.get_autocast_dtype(device_type))
    # Autocast would lower fp32 LoRA weights, and t with them, to 16 bits.
    with torch.autocast(device_type, enabled=False):
        return _lora_linear(device_type, x, q, lora_a, lora_b, scaling, bias, dropout_p, training, precision)


def _autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # which raises for "meta"


def _lora_linear(device_type, x, q, lora_a, lora_b, scaling, bias, dropout_p, training, precision) -> torch.Tensor:
    drops = training and dropout_p > 0
    if not drops and precision == "exact":
        namespace = backends.namespace_for_product(device_type, x, q.format, backends.selected)
        weight = (*q.parts(), q.format, q.block_size, q.shape[0])
        y = ops.lora_linear(namespace, x, weight, bias, lora_a, lora_b, float(scaling))
        if y is not None:
            return y
    t = _lora_down(F.dropout(x, dropout_p, True) if drops else x, lora_a)
    return _linear(device_type, x, q, bias, t, lora_b, float(scaling), precision)


def _linear(device_type, x, q, bias, t=None, lora_b=None, scaling=1.0, precision="exact") -> torch.Tensor:
    namespace = backends.namespace_for_product(device_type, x, q.format, backends.selected)
    arguments = (x, *q.parts(), q.format, q.block_size, q.shape[0], bias, t, lora_b, scaling)
    if precision == "exact":
        return ops.linear(namespace, *arguments)
    return ops.linear_approximate(namespace, *arguments)


def _lora_down(x: torch.Tensor, lora_a: torch.Tensor) -> torch.Tensor:
    """t = x A^T in the wider of the two dtypes; on a CPU in fp32 (see ``ops.product_dtype``)."""
    if x.dtype == lora_a.dtype == ops.product_dtype(x, lora_a):
        return F.linear(x, lora_a)
    return _MixedLoraDown.apply(x, lora_a)


class _MixedLoraDown(torch.autograd.Function):
    """x A^T computed in another dtype than x's or A's; unlike F.linear on casts, it saves x in x's own dtype."""

    @staticmethod
    def forward(ctx, x, lora_a):
        ctx.save_for_backward(x, lora_a)
        return ops.lora_down(x, lora_a)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, lora_a = ctx.saved_tensors
        return ops.lora_down_gradients(grad, x, lora_a, *ctx.needs_input_grad)


def _check_quantized(q: QuantizedTensor) -> None:
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"q: expected a lowbit.QuantizedTensor (see lowbit.quantize), got {type(q).__name__}")


def _check_operand(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        check_float_dtype(name, tensor.dtype)
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} (that of q), got {tensor.device}")


def _check_linear(x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None) -> None:
    _check_quantized(q)
    if len(q.shape) != 2:
        raise ValueError(f"q: expected a weight of 2 dimensions (out, in), got shape {tuple(q.shape)}")
    out_features, in_features = q.shape
    device = q.packed.device
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    shape = x.shape
    if not shape:
        raise ValueError(f"x: expected at least 1 dimension, the last of size {in_features}, got a scalar")
    if shape[-1] != in_features:
        shape = (*shape[:-1], in_features)
    _check_operand("x", x, shape, device)
    if bias is not None:
        _check_operand("bias", bias, (out_features,), device)


def _check_lora_linear(x, q, lora_a, lora_b, bias, dropout_p) -> None:
    # A layer passes the same parameters again and again: what fitted q before is known by identity. (Whoever puts data
    # of another shape into them meets the op's own checks.)
    fitting = None if torch.compiler.is_compiling() else getattr(q, "_fitting", None)
    if (
        fitting is not None
        and fitting[0]() is lora_a
        and fitting[1]() is lora_b
        and (bias is None or fitting[2]() is bias)
        and isinstance(x, torch.Tensor)
        and x.dtype in FLOAT_DTYPES
        and x.device == q.packed.device
        and x.dim()
        and x.shape[-1] == q.shape[1]
        and 0 <= dropout_p < 1
    ):
        return
    _check_linear(x, q, bias)
    _check_lora(q, lora_a, lora_b, dropout_p)
    if not torch.compiler.is_compiling():
        q._fitting = (weakref.ref(lora_a), weakref.ref(lora_b), weakref.ref(lora_b if bias is None else bias))


def _check_precision(precision: str, *operands: torch.Tensor | None) -> None:
    if precision not in ("exact", "int8"):
        raise ValueError(f"precision: expected 'exact' or 'int8', got {precision!r}")
    if torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands):
        raise ValueError("precision: 'int8' has no backward; use it under torch.no_grad(), or precision='exact'")


def _check_lora(q, lora_a, lora_b, dropout_p) -> None:
    out_features, in_features = q.shape
    device = q.packed.device
    if not isinstance(lora_a, torch.Tensor) or lora_a.dim() != 2:
        raise ValueError(f"lora_a: expected a tensor of shape (rank, {in_features}), got {_describe(lora_a)}")
    rank = lora_a.shape[0]
    if rank == 0:
        raise ValueError(f"lora_a: expected a rank of at least 1, got shape {tuple(lora_a.shape)}")
    _check_operand("lora_a", lora_a, (rank, in_features), device)
    _check_operand("lora_b", lora_b, (out_features, rank), device)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")


def _describe(value) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
