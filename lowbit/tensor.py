"""QuantizedTensor: a quantized weight that is a torch.Tensor.

Outside it has the weight's shape and dtype; inside are a few uint8 and fp32 parts. So a quantized model is the same
model: ``nn.Linear`` stays ``nn.Linear``, and its ``weight`` is another kind of tensor. What torch's functions do with
such a weight is in two tables: ``functions.py`` fills :attr:`QuantizedTensor.FUNCTIONS` (products and look-ups on our
kernels), ``aten.py`` fills :attr:`QuantizedTensor.ATEN` (what frameworks need of a parameter). Anything else decodes
the weight first.
"""

import math
from typing import NamedTuple

import torch

from . import backends, reference
from . import format as fmt
from .format import WeightSpec, check_float_dtype
from .sharding import Sharded
from .version import __version__

PARTS = ("packed", "absmax", "group_scales", "offset")


class Layout(NamedTuple):
    """What the parts of a weight mean.

    ``shape`` is that of the weight as it was quantized; the tensor's own shape has the last two dimensions swapped
    where ``transposed``. ``first_element`` says where, in the row-major elements of a whole weight, the parts begin
    to be this slice of it: its block's bytes are held from the block's start, and group_scales are the whole weight's.
    ``exact``: whether the parts hold the weight's blocks and no others. ``sharded``: whether FSDP2 made the slice.
    """

    spec: WeightSpec
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    first_element: int = 0
    exact: bool = True
    sharded: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Weights per index of dimension 0."""
        return math.prod(self.shape[1:])

    @property
    def groups(self) -> int:
        """Groups of 256 blocks, if the weight begins with one."""
        return fmt.block_count(self.spec.scale_count(self.shape), fmt.GROUP_SIZE)

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """The tensor's own shape."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    @property
    def keeps_rows(self) -> bool:
        """Whether an index of dimension 0 is whole bytes and whole blocks (or rows with a scale)."""
        if not self.shape:
            return False
        size = self.spec.block_size
        return len(self.shape) > 1 if size is None else self.row > 0 and self.row % size == 0


class QuantizedTensor(Sharded, torch.Tensor):
    """A weight stored as its :class:`~lowbit.format.WeightSpec` says. Made by :func:`lowbit.quantize`.

    Attributes:
        packed: uint8, two codes per byte in 4 bits. Rows of the weight lie on dimension 0 where a row is whole bytes
            and whole blocks; else it is flat.
        absmax: one entry per block: fp32 scales, or uint8 codes with double quantization; int8: fp32, one per row.
        group_scales: fp32, one per 256 blocks; None without double quantization.
        offset: fp32 scalar tensor; None without double quantization.
        stored: the :class:`Layout`, what the parts mean.

    Args:
        packed, absmax, group_scales, offset: the parts, in any shape.
        shape, dtype: of the weight: float32, float16 or bfloat16.
        spec: how it is stored.

    Raises:
        TypeError, ValueError: parts that do not fit each other.
    """

    #: torch function -> what replaces it; takes the function's arguments.
    FUNCTIONS: dict = {}
    #: aten op -> what replaces it below autograd; takes the op and its arguments.
    ATEN: dict = {}

    @staticmethod
    def __new__(cls, packed, absmax, group_scales=None, offset=None, *, shape, dtype, spec):
        layout = Layout(spec, tuple(shape), dtype)
        parts = _checked((packed, absmax, group_scales, offset), layout)
        return cls._make(_on_rows(parts, layout), layout)

    def __init__(self, *args, **kwargs):
        pass

    @classmethod
    def _make(cls, parts: tuple, layout: Layout) -> "QuantizedTensor":
        """A tensor of these parts, unchecked."""
        packed = parts[0]
        # storage_size=0: C++ that reads a tensor's memory (torch.jit.save) finds none, instead of a null pointer.
        self = torch.Tensor._make_wrapper_subclass(
            cls, layout.logical_shape, dtype=layout.dtype, device=packed.device, requires_grad=False, storage_size=0
        )
        self._hold(parts, layout)
        return self

    def _hold(self, parts: tuple, layout: Layout) -> None:
        """Become a weight of these parts."""
        self.packed, self.absmax, self.group_scales, self.offset = parts
        self.stored = layout
        # The first rows of a weight have all of its group_scales too. Asked here: every product wants to know.
        groups = self.group_scales
        self._has_own_groups = groups is None or groups.numel() == layout.groups

    def _with(self, change=None, **layout) -> "QuantizedTensor":
        """This weight with ``change`` applied to each part, and other fields of the layout."""
        parts = self.parts() if change is None else tuple(None if p is None else change(p) for p in self.parts())
        return QuantizedTensor._make(parts, self.stored._replace(**layout) if layout else self.stored)

    @property
    def spec(self) -> WeightSpec:
        """How the weight is stored."""
        return self.stored.spec

    @property
    def nbytes(self) -> int:
        """Bytes of storage of the packed codes and all scales."""
        return sum(part.nbytes for part in self.parts() if part is not None)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """``(packed, absmax, group_scales, offset)``."""
        return self.packed, self.absmax, self.group_scales, self.offset

    def operands(self) -> tuple | None:
        """The arguments from packed to spec by which an op takes the weight ``layout.shape``; None for a slice that
        begins inside a block, which has to be decoded.
        """
        layout = self.stored
        spec, groups = layout.spec, self.group_scales
        if layout.exact and not layout.first_element and self._has_own_groups:
            return self.packed, self.absmax, self.group_scales, self.offset, spec.text
        if layout.first_element % spec.block_size:
            return None
        packed = self.packed.reshape(-1)[: spec.packed_size(layout.numel)]
        count = spec.scale_count(layout.shape)
        first_block = layout.first_element // spec.block_size
        if not spec.double_quant:
            return packed, self.absmax.reshape(-1)[:count], None, None, spec.text
        if first_block % fmt.GROUP_SIZE:
            # The kernels count groups from the first block on.
            return packed, self.scales()[:count], None, None, spec.without_double_quant().text
        first_group = first_block // fmt.GROUP_SIZE
        groups = groups[first_group : first_group + fmt.block_count(count, fmt.GROUP_SIZE)]
        return packed, self.absmax.reshape(-1)[:count], groups, self.offset, spec.text

    def scales(self) -> torch.Tensor:
        """The decoded scale of each block that is held, fp32 [blocks]; int8: the absmax of each row, fp32 [rows]."""
        first_block = self.stored.first_element // (self.spec.block_size or 1)
        return reference.decode_scales(self.absmax, self.group_scales, self.offset, self.spec.text, first_block)

    def dequantize(self, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """The decoded weight in ``dtype``, written into ``out`` where given; as :func:`lowbit.dequantize`."""
        layout = self.stored
        if out is not None:
            self._check_out(out, dtype)
            operands = None if layout.transposed else self.operands()
            if operands is None:
                return out.copy_(self.dequantize(out.dtype))
            self._ops().dequantize_out.default(*operands, out)
            return out
        dtype = layout.dtype if dtype is None else dtype
        check_float_dtype("dtype", dtype)
        operands = self.operands()
        if operands is None:
            dense = self._decode_held(dtype)
        else:
            dense = self._ops().dequantize.default(*operands, list(layout.shape), dtype)
        return dense.transpose(-1, -2) if layout.transposed else dense

    def _decode_held(self, dtype: torch.dtype) -> torch.Tensor:
        """The slice that begins inside a block: all blocks that are held are decoded."""
        layout = self.stored
        held = min(self.absmax.numel() * layout.spec.block_size, self.packed.numel() * 8 // layout.spec.record.bits)
        spec = layout.spec.without_double_quant().text
        weight = (self.packed.reshape(-1), self.scales(), None, None, spec)
        flat = self._ops().dequantize.default(*weight, [held], dtype)
        skipped = layout.first_element % layout.spec.block_size
        return flat[skipped : skipped + layout.numel].reshape(layout.shape)

    def _ops(self):
        return getattr(torch.ops, backends.namespace_for(self.packed.device.type, backends.selected()))

    def _check_out(self, out: torch.Tensor, dtype: torch.dtype | None) -> None:
        if not isinstance(out, torch.Tensor) or isinstance(out, QuantizedTensor):
            raise TypeError(f"out: expected a dense torch.Tensor, got {type(out).__name__}")
        check_float_dtype("out", out.dtype)
        if dtype is not None and dtype != out.dtype:
            raise TypeError(f"out: expected {dtype} (the dtype given), got {out.dtype}")
        if out.shape != self.shape:
            raise ValueError(f"out: expected shape {tuple(self.shape)}, got {tuple(out.shape)}")
        if out.device != self.device:
            raise ValueError(f"out: expected device {self.device} (that of q), got {out.device}")
        if not out.is_contiguous():
            raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
        if out.requires_grad and torch.is_grad_enabled():
            raise ValueError("out: expected a tensor that requires no gradients (dequantize has none)")

    def __repr__(self, *, tensor_contents=None) -> str:
        return (
            f"QuantizedTensor(shape={self.stored.logical_shape}, dtype={self.stored.dtype}, spec={self.spec.text!r}, "
            f"device={self.packed.device})"
        )

    def __tensor_flatten__(self):
        return [name for name in PARTS if getattr(self, name) is not None], self.stored

    @staticmethod
    def __tensor_unflatten__(inner, layout, outer_size, outer_stride):
        return QuantizedTensor._make(tuple(inner.get(name) for name in PARTS), layout)

    def _stable_hash_for_caching(self) -> str:
        """All that compiled code depends on. torch's cache of compiled code, which outlives a process, asks for it."""
        parts = [None if p is None else (p.shape, p.stride(), p.dtype, p.device) for p in self.parts()]
        # The version stands for what functions.py and aten.py made of a function: that is in the compiled code.
        return repr((__version__, self.stored, self.requires_grad, parts))

    def __reduce_ex__(self, protocol):
        layout = self.stored
        return _rebuild, (*self.parts(), layout.spec.text, *layout[1:], isinstance(self, torch.nn.Parameter))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        replacement = cls.FUNCTIONS.get(func)
        if replacement is not None:
            return replacement(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        replacement = cls.ATEN.get(func, cls.ATEN["otherwise"])
        return replacement(func, *args, **(kwargs or {}))


def _rebuild(packed, absmax, group_scales, offset, spec, shape, dtype, transposed, first, exact, sharded, is_parameter):
    """What pickle and torch.load call; fails where the parts do not fit, as a damaged file's do not."""
    layout = Layout(WeightSpec.parse(spec), tuple(shape), dtype, transposed, first, exact, sharded)
    parts = (packed, absmax, group_scales, offset)
    if exact and not first and not sharded:
        parts = _checked(parts, layout)
    tensor = QuantizedTensor._make(parts, layout)
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


torch.serialization.add_safe_globals([_rebuild, QuantizedTensor])


def _on_rows(parts: tuple, layout: Layout) -> tuple:
    """The parts with the weight's rows on dimension 0 where a row is whole bytes and whole blocks, else flat."""
    packed, absmax, group_scales, offset = parts
    size = (layout.shape[0], -1) if layout.keeps_rows and layout.numel else (-1,)
    return packed.reshape(size), absmax.reshape(size), group_scales, offset


def _checked(parts: tuple, layout: Layout) -> tuple:
    """The parts; ValueError/TypeError unless they fit each other, since kernels trust these sizes."""
    packed, absmax, group_scales, offset = parts
    spec, shape = layout.spec, layout.shape
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"spec: expected a lowbit.WeightSpec, got {type(spec).__name__}")
    check_float_dtype("dtype", layout.dtype)
    if (group_scales is None) != (offset is None):
        raise ValueError("group_scales and offset: expected both (double quantization) or neither, got one")
    if (group_scales is not None) != spec.double_quant:
        expected = "tensors (the spec says double_quant)" if spec.double_quant else "None (no double quantization)"
        raise ValueError(f"group_scales and offset: expected {expected} for {spec.text!r}")
    scales = spec.scale_count(shape)
    expected = [("packed", packed, torch.uint8, spec.packed_size(layout.numel))]
    if spec.double_quant:
        expected.append(("absmax", absmax, torch.uint8, scales))
        expected.append(("group_scales", group_scales, torch.float32, fmt.block_count(scales, fmt.GROUP_SIZE)))
        expected.append(("offset", offset, torch.float32, 1))
    else:
        expected.append(("absmax", absmax, spec.record.scales.dtype, scales))
    for name, tensor, dtype, numel in expected:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor.numel() != numel:
            raise ValueError(
                f"{name}: expected {numel} elements for a weight of shape {shape} stored as {spec.text!r}, got shape "
                f"{tuple(tensor.shape)}"
            )
        if tensor.device != packed.device:
            raise ValueError(f"{name}: expected device {packed.device} (that of packed), got {tensor.device}")
    return parts
