"""The public functions: arguments checked here, work done by the ops of the chosen backend."""

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import backends
from . import format as fmt
from .format import FLOAT_DTYPES, check_float_dtype
from .ops import dense, lora
from .ops import linear as products
from .ops.record import op_of
from .tensor import QuantizedTensor


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
    check_quantized(q)
    return q.dequantize(dtype, out=out)


def linear(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None, *, precision: str = "exact"
) -> torch.Tensor:
    """``x W^T + bias`` with W stored in 4 bits; differentiable in x and bias.

    ``precision="int8"`` computes approximately, for inference: it rounds activations to int8 with one scale per 64 of a
    row, and the codebook to multiples of 1 / 127, and multiplies integers. The error of y is about 1% of its norm for
    normally distributed activations, and more where a few of each 64 are far larger than the rest. This is faster for
    a few rows of x, and on CPUs without AVX-512 slower than the exact product for many. Products stay exact with int8
    weights, where in_features is not a multiple of 64, and where the exact kernels are the fastest: on a GPU, on
    AVX-512 without VNNI, and with VNNI for more than 16 rows.

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
    weight = _checked_weight(q, x, bias)
    if precision != "exact":
        _check_precision(precision, x, bias)
    return outside_autocast(_linear, x, q, weight, bias, precision)


def linear_or_none(x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """:func:`linear`; None for a weight that has to be decoded: a transposed one, or one that begins inside a block."""
    weight = None if q.stored.transposed else QuantizedTensor.operands(q)
    if weight is None:
        return None
    _check_operands(q.stored.shape, weight, x, bias)
    return outside_autocast(_linear, x, q, weight, bias, "exact")


def lora_linear(
    x: torch.Tensor,
    q: torch.Tensor,
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
        q: the frozen weight, [out_features, in_features]; or a dense one, of x's dtype.
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
    if not isinstance(q, QuantizedTensor):
        return _dense_lora_linear(x, q, lora_a, lora_b, scaling, bias, dropout_p if training else 0.0, precision)
    weight = _checked_weight(q, x, bias)
    _check_lora(q.stored.shape, q.packed.device, lora_a, lora_b, dropout_p)
    if precision != "exact":
        _check_precision(precision, x, bias, lora_a, lora_b)
    dropout_p = dropout_p if training else 0.0
    # Autocast would lower fp32 LoRA weights, and t with them, to 16 bits.
    return outside_autocast(_lora_linear, x, q, weight, lora_a, lora_b, float(scaling), bias, dropout_p, precision)


def linear_plus_low_rank(
    x: torch.Tensor,
    weight: torch.Tensor,
    low_rank: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x W^T + t left^T + bias`` with ``(t, left) = low_rank(x)``: :func:`lora_linear` whose t is made in any way.

    x [..., in], weight [out, in], dense or quantized, t [..., r], left [out, r]. ``low_rank`` is called without
    autocast, with x in the dtype that is multiplied.
    """

    def product(x):
        t, left = low_rank(x)
        if operands is None:
            of_dtype = weight if weight.dtype == x.dtype else weight.to(x.dtype)
            return dense.lora_linear(lora.factor_namespace(x), x, of_dtype, None, left, 1.0, bias, t)
        return products.linear(_namespace(x, weight), x, operands, weight.stored.shape[0], bias, t, left)

    operands = _checked_weight(weight, x, bias) if isinstance(weight, QuantizedTensor) else None
    return outside_autocast(product, x)


def embedding(ids: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    """The decoded rows ``ids`` [...] of a weight [rows, features], in its dtype [..., features].

    Only these rows are decoded.

    Raises:
        IndexError: an id is out of range.
    """
    layout, flat = q.stored, ids.reshape(-1)
    spec, (count, features) = layout.spec, layout.shape
    if not layout.keeps_rows or q.packed.dim() != 2:
        return _rows_across_blocks(flat, q).view(*ids.shape, features)
    if flat.numel() and not flat.is_meta and flat.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ids(flat, count)
    codes, scales = q.packed[flat], q.absmax[flat]
    if spec.double_quant:
        blocks = features // spec.block_size
        block = flat[:, None] * blocks + torch.arange(blocks, device=flat.device)
        scales = fmt.scale_map(flat.device)[scales.int()] * q.group_scales[block // fmt.GROUP_SIZE] + q.offset
    text = spec.without_double_quant().text
    op = op_of(backends.namespace_for(flat.device.type, backends.selected()), "dequantize")
    return op(codes, scales, None, None, text, [flat.numel(), features], layout.dtype).view(*ids.shape, features)


def _rows_across_blocks(ids: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    """Rows that begin inside a byte or a block: each element looks up its own code and scale."""
    layout = q.stored
    count, features = layout.shape
    if ids.numel() and not ids.is_meta and ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ids(ids, count)
    element = ids[:, None] * features + torch.arange(features, device=ids.device)
    codes = q.packed.view(-1)[element // 2]
    codes = torch.where(element % 2 == 0, codes >> 4, codes & 15)
    values = fmt.codebook(layout.spec.format, ids.device)[codes.int()]
    return (values * q.scales()[element // layout.spec.block_size]).to(layout.dtype)


def _check_ids(ids: torch.Tensor, count: int) -> None:
    low, high = ids.aminmax()
    if low < 0 or high >= count:
        raise IndexError(f"ids: expected indices from 0 to {count - 1}, got {int(low)} to {int(high)}")


def check_sizes(**sizes: int) -> None:
    """An error that names the argument unless each is an int of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {size!r}")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context without autocast, which torch has not for the meta device."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def outside_autocast(product, x: torch.Tensor, *arguments) -> torch.Tensor:
    """``product(x, *arguments)``; where autocast is on, with x in its dtype and autocast off inside."""
    if not torch._C._is_any_autocast_enabled():
        return product(x, *arguments)
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # which raises for "meta"
        return product(x, *arguments)
    with torch.autocast(device_type, enabled=False):
        return product(x.to(torch.get_autocast_dtype(device_type)), *arguments)


def _linear(x, q, weight, bias, precision) -> torch.Tensor:
    namespace, features = _namespace(x, q), q.stored.shape[0]
    if precision == "exact":
        return products.linear(namespace, x, weight, features, bias)
    return _approximate(namespace, x, weight, features, bias)


def _lora_linear(x, q, weight, lora_a, lora_b, scaling, bias, dropout_p, precision) -> torch.Tensor:
    namespace, features = _namespace(x, q), q.stored.shape[0]
    if not dropout_p and precision == "exact":
        return products.lora_linear(namespace, x, weight, features, bias, lora_a, lora_b, scaling)
    t = lora.down(F.dropout(x, dropout_p) if dropout_p else x, lora_a)
    if precision == "exact":
        return products.linear(namespace, x, weight, features, bias, t, lora_b, scaling)
    return _approximate(namespace, x, weight, features, bias, t, lora_b, scaling)


def _dense_lora_linear(x, weight, lora_a, lora_b, scaling, bias, dropout_p, precision) -> torch.Tensor:
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise TypeError(f"q: expected a weight of shape (out_features, in_features), got {_describe(weight)}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected a last dimension of {weight.shape[1]}, got {tuple(x.shape)}")
    _check_lora(weight.shape, weight.device, lora_a, lora_b, dropout_p)
    if precision != "exact":
        raise ValueError(f"precision: expected 'exact' for a dense weight, got {precision!r}")

    def product(x, weight, bias):
        weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)  # under autocast
        t = lora.down(F.dropout(x, dropout_p), lora_a) if dropout_p else None
        return dense.lora_linear(lora.factor_namespace(x), x, weight, lora_a, lora_b, float(scaling), bias, t)

    return outside_autocast(product, x, weight, bias)


def _namespace(x: torch.Tensor, q: QuantizedTensor) -> str:
    return backends.namespace_for_product(x.device.type, x, q.stored.spec.format, backends.selected())


def _approximate(namespace, x, weight, features, bias, t=None, lora_b=None, scaling=1.0) -> torch.Tensor:
    return op_of(namespace, "linear_approximate")(x, *weight, features, bias, t, lora_b, scaling)


def check_quantized(q: QuantizedTensor) -> None:
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"q: expected a lowbit.QuantizedTensor (see lowbit.quantize), got {type(q).__name__}")


def check_operand(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        check_float_dtype(name, tensor.dtype)
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} (that of q), got {tensor.device}")


def _checked_weight(q: QuantizedTensor, x: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    """The op's arguments from packed to spec; an error unless x and bias fit the weight."""
    check_quantized(q)
    if q.stored.transposed:
        raise ValueError("q: expected a weight (out, in), got a transposed one; use x @ q, or q.T")
    weight = QuantizedTensor.operands(q)  # not q.operands(): torch.compile does not look into methods of an argument
    if weight is None:
        raise ValueError(
            f"q: expected a weight that begins with a block of its own, got a slice that begins inside one ({q!r}); "
            "F.linear decodes such a slice"
        )
    _check_operands(q.stored.shape, weight, x, bias)
    return weight


def _check_operands(weight_shape, weight: tuple, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    """An error unless x and bias fit a weight of this shape, whose arguments of an op ``weight`` holds."""
    if len(weight_shape) != 2:
        raise ValueError(f"q: expected a weight of 2 dimensions (out, in), got shape {tuple(weight_shape)}")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    out_features, in_features = weight_shape
    shape, device = x.shape, weight[0].device
    if not shape:
        raise ValueError(f"x: expected at least 1 dimension, the last of size {in_features}, got a scalar")
    if shape[-1] != in_features or x.dtype not in FLOAT_DTYPES or x.device != device:
        check_operand("x", x, (*shape[:-1], in_features), device)
    if bias is not None:
        check_operand("bias", bias, (out_features,), device)


def _check_precision(precision: str, *operands: torch.Tensor | None) -> None:
    if precision not in ("exact", "int8"):
        raise ValueError(f"precision: expected 'exact' or 'int8', got {precision!r}")
    if torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands):
        raise ValueError("precision: 'int8' has no backward; use it under torch.no_grad(), or precision='exact'")


def _check_lora(shape, device, lora_a, lora_b, dropout_p) -> None:
    out_features, in_features = shape
    if not isinstance(lora_a, torch.Tensor) or lora_a.dim() != 2:
        raise ValueError(f"lora_a: expected a tensor of shape (rank, {in_features}), got {_describe(lora_a)}")
    rank = lora_a.shape[0]
    if rank == 0:
        raise ValueError(f"lora_a: expected a rank of at least 1, got shape {tuple(lora_a.shape)}")
    check_operand("lora_a", lora_a, (rank, in_features), device)
    check_operand("lora_b", lora_b, (out_features, rank), device)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")


def _describe(value) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
