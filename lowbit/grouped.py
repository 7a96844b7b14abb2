"""The public functions for a mixture of experts: arguments checked here, work done by the ops of the chosen backend."""

import torch
import torch.nn.functional as F

from . import backends
from .format import check_float_dtype
from .functional import check_operand, check_quantized, outside_autocast
from .ops import grouped as products
from .ops.record import op_of
from .tensor import QuantizedTensor


def grouped_linear(
    x: torch.Tensor, q: QuantizedTensor, expert_ends: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x W_e^T + bias_e`` for each row of x and the expert e it belongs to; differentiable in x and bias.

    Only experts that have rows are decoded. (``torch.nn.functional.grouped_mm`` takes the same ends, as ``offs``.)

    Args:
        x: [rows, in_features], float32, float16 or bfloat16: the tokens, sorted by expert.
        q: the weights of all experts, [experts, out_features, in_features], quantized as one tensor.
        expert_ends: int32 [experts] on x's device, where the rows of each expert end: not decreasing, the last one
            equal to the number of rows. On a GPU it is not read by the host: values that break this are not found,
            but no kernel goes outside of its tensors for them.
        bias: [experts, out_features] or None.

    Returns:
        [rows, out_features] in x's dtype (under autocast, in the autocast dtype); accumulated in fp32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; ``expert_ends`` out of order or not ending at the rows.
    """
    weight = _checked_stack(x, q, expert_ends, bias)
    return outside_autocast(_linear, x, q, weight, expert_ends, bias)


def grouped_lora_linear(
    x: torch.Tensor,
    q: QuantizedTensor,
    expert_ends: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> torch.Tensor:
    """``x W_e^T + scaling * (dropout(x) A_e^T) B_e^T + bias_e``: :func:`grouped_linear` with a LoRA for each expert.

    Differentiable in x, bias, lora_a and lora_b.

    Args:
        x, q, expert_ends, bias: as in :func:`grouped_linear`.
        lora_a: [experts, rank, in_features].
        lora_b: [experts, out_features, rank].
        scaling: lora_alpha / rank, or lora_alpha / sqrt(rank).
        dropout_p: probability of zeroing an element of the x that enters LoRA, in [0, 1); only where ``training``.

    Returns:
        [rows, out_features] in x's dtype (under autocast, in the autocast dtype). LoRA's part is computed in fp32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, ``dropout_p`` out of range; ``expert_ends`` as above.

    Source: Hu et al., "LoRA", 2021 (arXiv 2106.09685).
    """
    weight = _checked_stack(x, q, expert_ends, bias)
    experts, out_features, in_features = q.stored.shape
    if not isinstance(lora_a, torch.Tensor) or lora_a.dim() != 3 or lora_a.shape[1] == 0:
        shape = tuple(lora_a.shape) if isinstance(lora_a, torch.Tensor) else type(lora_a).__name__
        raise ValueError(f"lora_a: expected a tensor of shape ({experts}, rank, {in_features}), got {shape}")
    rank = lora_a.shape[1]
    check_operand("lora_a", lora_a, (experts, rank, in_features), q.packed.device)
    check_operand("lora_b", lora_b, (experts, out_features, rank), q.packed.device)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    dropout_p = dropout_p if training else 0.0
    return outside_autocast(_lora_linear, x, q, weight, expert_ends, lora_a, lora_b, float(scaling), bias, dropout_p)


def grouped_matmul(
    x: torch.Tensor, matrices: torch.Tensor, expert_ends: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``x M_e^T`` for each row of x and the dense matrix e it belongs to; differentiable in x and matrices.

    Args:
        x: [rows, in_features], float32, float16 or bfloat16, sorted by matrix.
        matrices: [experts, out_features, in_features].
        expert_ends: as in :func:`grouped_linear`.
        dtype: of the result, which is summed in fp32: float32, float16 or bfloat16.

    Returns:
        [rows, out_features] in ``dtype``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit; ``expert_ends`` out of order or not ending at the rows.
    """
    if not isinstance(matrices, torch.Tensor) or matrices.dim() != 3:
        got = tuple(matrices.shape) if isinstance(matrices, torch.Tensor) else type(matrices).__name__
        raise ValueError(f"matrices: expected a tensor of shape (experts, out, in), got {got}")
    if not isinstance(x, torch.Tensor) or x.dim() != 2:
        got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x: expected a tensor of shape (rows, {matrices.shape[2]}), got {got}")
    check_operand("x", x, (x.shape[0], matrices.shape[2]), matrices.device)
    check_float_dtype("dtype", dtype)
    _check_expert_ends(expert_ends, matrices.shape[0], x)
    return op_of(backends.namespace_for_experts(x.device.type, backends.selected()), "grouped_matmul")(
        x, matrices, expert_ends, dtype
    )


def _linear(x, q, weight, expert_ends, bias, t=None, lora_b=None, scaling=1.0) -> torch.Tensor:
    op = op_of(backends.namespace_for_experts(x.device.type, backends.selected()), "grouped_linear")
    return op(x, *weight, expert_ends, q.stored.shape[1], bias, t, lora_b, scaling)


def _lora_linear(x, q, weight, expert_ends, lora_a, lora_b, scaling, bias, dropout_p) -> torch.Tensor:
    namespace = backends.namespace_for_experts(x.device.type, backends.selected())
    if dropout_p:
        t = op_of(namespace, "grouped_matmul")(F.dropout(x, dropout_p, True), lora_a, expert_ends)
        return _linear(x, q, weight, expert_ends, bias, t, lora_b, scaling)
    features = q.stored.shape[1]
    return products.grouped_lora_linear(namespace, x, weight, expert_ends, features, bias, lora_a, lora_b, scaling)


def _checked_stack(x, q, expert_ends, bias) -> tuple:
    """The op's arguments from packed to spec; an error unless the operands fit the stack."""
    check_quantized(q)
    layout = q.stored
    if len(layout.shape) != 3 or layout.transposed:
        kind = "transposed ones" if layout.transposed else "weights"
        raise ValueError(
            f"q: expected weights of 3 dimensions (experts, out, in), got {kind} of shape {layout.logical_shape}"
        )
    experts, out_features, in_features = layout.shape
    weight = QuantizedTensor.operands(q)  # not q.operands(): torch.compile does not look into methods of an argument
    if weight is None:
        raise ValueError(f"q: expected a stack that begins with a block of its own, got a slice of one ({q!r})")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (rows, {in_features}), got {tuple(x.shape)}")
    check_operand("x", x, (x.shape[0], in_features), q.packed.device)
    if bias is not None:
        check_operand("bias", bias, (experts, out_features), q.packed.device)
    _check_expert_ends(expert_ends, experts, x)
    return weight


def _check_expert_ends(expert_ends: torch.Tensor, experts: int, x: torch.Tensor) -> None:
    if not isinstance(expert_ends, torch.Tensor):
        raise TypeError(f"expert_ends: expected a torch.Tensor, got {type(expert_ends).__name__}")
    if expert_ends.dtype != torch.int32:
        raise TypeError(f"expert_ends: expected torch.int32, got {expert_ends.dtype}")
    if expert_ends.shape != (experts,):
        raise ValueError(f"expert_ends: expected shape ({experts},), got {tuple(expert_ends.shape)}")
    if expert_ends.device != x.device:
        raise ValueError(f"expert_ends: expected device {x.device} (that of x), got {expert_ends.device}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ends(expert_ends, x.shape[0])


def _check_ends(expert_ends: torch.Tensor, rows: int) -> None:
    """ValueError unless the ends are in order and the last one is at ``rows``."""
    ends = expert_ends.tolist()
    if any(end < begin for begin, end in zip([0, *ends], ends, strict=False)):
        raise ValueError(f"expert_ends: expected numbers from 0 on that do not decrease, got {ends}")
    if (ends[-1] if ends else 0) != rows:
        raise ValueError(f"expert_ends: expected the last to be {rows}, the rows of x, got {ends}")
