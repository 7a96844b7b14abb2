"""What torch's own code does with a quantized weight, below autograd: a table from aten op to function.

The table holds the ops that modules, copies, saving, FSDP2 and checkpoints need of a parameter, and products: one that
did not come through ``F.linear`` (a backward, a transposed weight, a traced model) runs on our kernels too. The tests
in tests/test_tensor_*.py try each op by what needs it. Any other op decodes the weight, and says so once.
"""

import functools
import math
import warnings

import torch
from torch.utils._pytree import tree_any_only, tree_map_only

from . import backends
from .format import FLOAT_DTYPES
from .functional import embedding
from .ops.record import op_of
from .tensor import QuantizedTensor

aten = torch.ops.aten


def implements(*ops):
    """Make the decorated function (op, *arguments) what these aten ops do with a quantized weight."""

    def decorate(function):
        QuantizedTensor.ATEN.update(dict.fromkeys(ops, function))
        return function

    return decorate


def decoding(function):
    """``function`` whose NotImplemented means: decode the weight first."""

    @functools.wraps(function)
    def wrapped(op, *args, **kwargs):
        result = function(op, *args, **kwargs)
        return otherwise(op, *args, **kwargs) if result is NotImplemented else result

    return wrapped


# --- copies and views


@implements(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _same(op, q):
    return q._with()


@implements(aten.clone.default)
def _clone(op, q, *, memory_format=None):
    return q._with(torch.clone)


@implements(aten._to_copy.default)
@decoding
def _to_copy(op, q, *, dtype=None, layout=None, device=None, pin_memory=False, non_blocking=False, memory_format=None):
    dtype = q.stored.dtype if dtype is None else dtype
    if dtype not in FLOAT_DTYPES:
        return NotImplemented
    return q._with(lambda part: part.to(device, non_blocking=non_blocking, copy=True), dtype=dtype)


@implements(aten.empty_like.default)
@decoding
def _empty_like(op, q, *, dtype=None, layout=None, device=None, pin_memory=False, memory_format=None):
    if dtype not in (None, *FLOAT_DTYPES):
        return torch.empty(q.stored.logical_shape, dtype=dtype, device=device or q.packed.device)
    return q._with(lambda part: torch.empty_like(part, device=device), dtype=dtype or q.stored.dtype)


@implements(aten.is_pinned.default)
def _is_pinned(op, q, device=None):
    return q.packed.is_pinned()


@implements(aten._pin_memory.default)
def _pin_memory(op, q, device=None):
    return q._with(torch.Tensor.pin_memory)


@implements(aten.copy_.default)
def _copy_(op, to, source, non_blocking=False):
    if not isinstance(to, QuantizedTensor):
        return to.copy_(source.dequantize(), non_blocking)
    if not isinstance(source, QuantizedTensor):
        raise RuntimeError(
            "copy_: a dense tensor cannot be copied into a quantized weight. Load a dense state dict before the model "
            "is quantized (lowbit.quantize_), or after lowbit.dequantize_(model)"
        )
    if to._buffer is not None:
        to.take(source)
        return to
    ours, theirs = (q.stored._replace(dtype=None, sharded=False) for q in (to, source))
    if ours != theirs:
        raise ValueError(
            f"copy_: expected a weight of shape {to.stored.logical_shape} stored as {to.spec.text!r}, got shape "
            f"{source.stored.logical_shape} stored as {source.spec.text!r}; quantize the model with the spec of what "
            f"it loads: lowbit.quantize_(model, lowbit.WeightSpec.parse({source.spec.text!r}))"
        )
    for part, value in zip(to.parts(), source.parts(), strict=True):
        if part is not None:
            part.copy_(value, non_blocking)
    return to


@implements(aten.new_zeros.default)
@decoding
def _new_zeros(op, q, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    if tuple(size[1:]) != q.stored.shape[1:] or len(size) != len(q.stored.shape) or dtype not in (None, q.stored.dtype):
        return _dense_like(op, q, size)
    return q.zeroed(tuple(size))


def _dense_like(op, q, *args, **kwargs):
    stand_in = q.packed.new_empty((), dtype=q.stored.dtype).expand(q.stored.logical_shape)
    return op(stand_in, *args, **kwargs)


_LIKES = ("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_full", "new_ones")
implements(*(getattr(aten, name).default for name in (*_LIKES, "new_empty_strided")))(_dense_like)


@implements(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
@decoding
def _view(op, q, size):
    layout = q.stored
    if layout.transposed or -1 in size[1:]:
        return NotImplemented
    shape = tuple(size)
    if -1 in shape:
        shape = (layout.numel // max(1, math.prod(shape[1:])), *shape[1:])
    # FSDP2 keeps its shard flattened, and does not read it there: decoded it would be memory for nothing.
    if shape == layout.shape or layout.sharded and len(shape) == 1:
        return q._with()
    if layout.spec.block_size is None and shape[-1:] != layout.shape[-1:] or not layout.exact or layout.first_element:
        return NotImplemented
    return QuantizedTensor(*q.parts(), shape=shape, dtype=layout.dtype, spec=layout.spec)


@implements(aten.as_strided.default)
@decoding
def _as_strided(op, q, size, stride, offset=None):
    same = tuple(size) == q.stored.logical_shape and tuple(stride) == q.stride() and not offset
    return q._with() if same else NotImplemented


# --- slices by rows


def rows(q: QuantizedTensor, begin: int, end: int) -> QuantizedTensor:
    """Rows [begin, end) of dimension 0; their bytes are views."""
    layout = q.stored
    sliced = layout._replace(shape=(end - begin, *layout.shape[1:]))
    if layout.keeps_rows and q.packed.dim() == 2:
        parts = (q.packed[begin:end], q.absmax[begin:end])
        first = 0 if layout.spec.block_size is None else layout.first_element + begin * layout.row
        exact = layout.exact
    else:
        size = layout.spec.block_size
        first = layout.first_element + begin * layout.row
        held = layout.first_element // size
        block, last = first // size - held, -(-(first + sliced.numel) // size) - held
        code_bytes = layout.spec.packed_size(size)
        parts = (q.packed.view(-1)[block * code_bytes : last * code_bytes], q.absmax.view(-1)[block:last])
        exact = parts[0].numel() == layout.spec.packed_size(sliced.numel)
    result = QuantizedTensor._make(
        (*parts, q.group_scales, q.offset), sliced._replace(first_element=first, exact=exact)
    )
    result._buffer = q._buffer
    return result


def _can_slice(q: QuantizedTensor, dim: int) -> bool:
    layout = q.stored
    if dim % max(1, q.dim()) or layout.transposed and len(layout.shape) < 3:
        return False
    return layout.spec.block_size is not None or layout.keeps_rows


@implements(aten.slice.Tensor)
@decoding
def _slice(op, q, dim=0, start=None, end=None, step=1):
    if step != 1 or not _can_slice(q, dim):
        return NotImplemented
    begin, end, _ = slice(start, end).indices(q.stored.shape[0])
    return rows(q, begin, max(begin, end))


@implements(aten.select.int)
@decoding
def _select(op, q, dim, index):
    layout = q.stored
    if len(layout.shape) < 2 or not _can_slice(q, dim):
        return NotImplemented
    count = layout.shape[0]
    if not -count <= index < count:
        raise IndexError(f"index {index} is out of range for dimension 0 with size {count}")
    one = rows(q, index % count, index % count + 1)
    inner = one.stored._replace(shape=layout.shape[1:])
    parts = one.parts()
    if inner.keeps_rows:
        parts = (*(part.view(inner.shape[0], -1) for part in parts[:2]), *parts[2:])
    return QuantizedTensor._make(parts, inner)


@implements(aten.unbind.int)
@decoding
def _unbind(op, q, dim=0):
    if len(q.stored.shape) < 2 or not _can_slice(q, dim):
        return NotImplemented
    return [_select(aten.select.int, q, 0, index) for index in range(q.stored.shape[0])]


@implements(aten.split.Tensor)
@decoding
def _split(op, q, size, dim=0):
    if not _can_slice(q, dim):
        return NotImplemented
    count = q.stored.shape[0]
    return [rows(q, begin, min(begin + size, count)) for begin in range(0, max(count, 1), max(size, 1))]


@implements(aten.split_with_sizes.default)
@decoding
def _split_with_sizes(op, q, sizes, dim=0):
    if not _can_slice(q, dim):
        return NotImplemented
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [rows(q, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@implements(aten.embedding.default)
@decoding
def _embedding(op, q, ids, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    return embedding(ids, q) if _has_rows(q) else NotImplemented


@implements(aten.index_select.default)
@decoding
def _index_select(op, q, dim, ids):
    return embedding(ids, q) if dim == 0 and _has_rows(q) else NotImplemented


@implements(aten.index.Tensor)
@decoding
def _index(op, q, indices):
    one = len(indices) == 1 and indices[0] is not None and indices[0].dtype in (torch.int32, torch.int64)
    return embedding(indices[0], q) if one and _has_rows(q) else NotImplemented


def _has_rows(q: QuantizedTensor) -> bool:
    layout = q.stored
    return len(layout.shape) == 2 and not layout.transposed and layout.exact and not layout.first_element


# --- transposes and products


@implements(aten.t.default)
def _t(op, q):
    return q._with(transposed=not q.stored.transposed) if q.dim() == 2 else q._with()


@implements(aten.transpose.int)
@decoding
def _transpose(op, q, first, second):
    dims = q.dim()
    swapped = {first % dims, second % dims}
    if len(swapped) == 1:
        return q._with()
    return q._with(transposed=not q.stored.transposed) if swapped == {dims - 2, dims - 1} else NotImplemented


@implements(aten.permute.default)
@decoding
def _permute(op, q, order):
    order, dims = [d % q.dim() for d in order], list(range(q.dim()))
    if order == dims:
        return q._with()
    return q._with(transposed=not q.stored.transposed) if order == [*dims[:-2], *dims[:-3:-1]] else NotImplemented


def product(x: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    """x q, of x [..., k] and a weight [k, n]; NotImplemented where our kernels do not compute it."""
    operands, shape = q.operands(), q.stored.logical_shape
    if operands is None or len(shape) != 2 or x.dtype not in FLOAT_DTYPES or x.device != q.packed.device:
        return NotImplemented
    if x.shape[-1:] != shape[:1]:
        return NotImplemented  # torch's own error
    namespace = backends.namespace_for_product(x.device.type, x, q.spec.format, backends.selected())
    if q.stored.transposed:
        return op_of(namespace, "linear")(x, *operands, shape[1], None, None, None, 1.0)
    return op_of(namespace, "linear_grad_input")(x, *operands, shape[1], None, None)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, one of them a quantized weight [k, n], the other of any leading dimensions; or NotImplemented."""
    if isinstance(b, QuantizedTensor):
        return NotImplemented if isinstance(a, QuantizedTensor) else product(a, b)
    if a.dim() != 2 or b.dim() < 2:
        return product(b, _t(aten.t.default, a)) if a.dim() == 2 else NotImplemented
    y = product(b.mT, _t(aten.t.default, a))
    return NotImplemented if y is NotImplemented else y.mT.contiguous()


@implements(aten.mm.default)
@decoding
def _mm(op, a, b):
    return matmul(a, b)


@implements(aten.addmm.default)
@decoding
def _addmm(op, bias, a, b, *, beta=1, alpha=1):
    if isinstance(bias, QuantizedTensor) or (beta, alpha) != (1, 1):
        return NotImplemented
    y = matmul(a, b)
    return NotImplemented if y is NotImplemented else y + bias


@implements(aten._grouped_mm.default)
@decoding
def _grouped_mm(op, x, q, offs=None, bias=None, out_dtype=None):
    """Tokens times the matrices of their experts; its backward comes here again, with the stack transposed."""
    operands = q.operands() if isinstance(q, QuantizedTensor) and q.dim() == 3 and x.dim() == 2 else None
    if operands is None or offs is None or bias is not None or out_dtype not in (None, x.dtype):
        return NotImplemented
    namespace, features = backends.namespace_for_experts(x.device.type, backends.selected()), q.stored.logical_shape[2]
    if q.stored.transposed:
        return op_of(namespace, "grouped_linear")(x, *operands, offs, features, None, None, None, 1.0)
    return op_of(namespace, "grouped_linear_grad_input")(x, *operands, offs, features)


# --- anything else


@functools.cache
def _say_once(name: str) -> None:
    warnings.warn(
        f"{name} decodes a quantized weight first: the result is right, the call slow. F.linear, F.embedding, w[e], "
        "row slices, and products with w or w.T run on the packed weight. (Said once for each function.)",
        stacklevel=2,
    )


def refuse_writing(name: str):
    """Raise the RuntimeError of an in-place operation on a quantized weight."""
    raise RuntimeError(
        f"{name}: a quantized weight cannot be written in place: expected a dense tensor. Decode "
        "it (lowbit.dequantize(w), or lowbit.dequantize_(model)), change that, and quantize the result "
        "(lowbit.quantize, lowbit.quantize_)"
    )


@implements("otherwise")
def otherwise(op, *args, **kwargs):
    """The result of an op that has no entry: of the ops that torch makes it of, or else of the decoded weight.

    Raises:
        RuntimeError: it would write into the weight.
    """
    arguments = op._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    if any(
        argument.is_write and tree_any_only(QuantizedTensor, lambda q: True, given.get(argument.name))
        for argument in arguments
    ):
        refuse_writing(op.overloadpacket.__name__)
    if op._can_decompose() and op not in QuantizedTensor.ATEN:
        result = op.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    _say_once(op.overloadpacket.__name__)
    args, kwargs = tree_map_only(QuantizedTensor, QuantizedTensor.dequantize, (args, kwargs))
    return op(*args, **kwargs)
