"""QuantizedTensor: a 4-bit or int8 weight and its scales, and how they are written to files."""

import json
from collections.abc import Iterable

import torch

from . import backends, reference
from . import format as fmt
from .backends import namespace_for

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


class QuantizedTensor:
    """A weight in one of the formats of :mod:`lowbit.format`. Made by :func:`lowbit.quantize`.

    Attributes:
        packed: uint8 [ceil(n / 2)], two codes a byte; int8: [n], ``packed.view(torch.int8)`` being the codes.
        absmax: one entry per block: fp32 scales, or uint8 codes with double quantization; int8: fp32, one per row.
        group_scales: fp32, one per 256 blocks; None without double quantization.
        offset: fp32 scalar tensor; None without double quantization.
        shape: the weight's shape.
        dtype: dtype of the weight that was quantized, and of ``dequantize()``.
        format: "nf4", "fp4" or "int8".
        block_size: elements per block; int8: the length of a row.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        group_scales: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        format: str = "nf4",
        block_size: int = 64,
    ):
        self.packed = packed
        self.absmax = absmax
        self.group_scales = group_scales
        self.offset = offset
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.format = format
        self.block_size = block_size
        self._check()

    def _check(self) -> None:
        """ValueError/TypeError unless the parts fit each other: kernels trust these sizes."""
        check_format(self.format)
        check_float_dtype("dtype", self.dtype)
        if (self.group_scales is None) != (self.offset is None):
            raise ValueError("group_scales and offset: expected both (double quantization) or neither, got one")
        if self.format == "int8":
            blocks, row_length = fmt.row_shape(self.shape)
            if self.block_size != row_length:
                raise ValueError(
                    f"block_size: expected {row_length}, the length of a row, for int8, got {self.block_size!r}"
                )
            if self.double_quant:
                raise ValueError("group_scales and offset: expected None (int8 has no double quantization)")
            packed_size = self.numel()
        else:
            check_block_size(self.block_size)
            blocks = fmt.block_count(self.numel(), self.block_size)
            packed_size = (self.numel() + 1) // 2
        expected = [("packed", self.packed, torch.uint8, (packed_size,))]
        if self.double_quant:
            groups = fmt.block_count(blocks, fmt.GROUP_SIZE)
            expected.append(("absmax", self.absmax, torch.uint8, (blocks,)))
            expected.append(("group_scales", self.group_scales, torch.float32, (groups,)))
            expected.append(("offset", self.offset, torch.float32, ()))
        else:
            expected.append(("absmax", self.absmax, torch.float32, (blocks,)))
        for name, tensor, dtype, shape in expected:
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
            if tensor.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name}: expected shape {shape} for a weight of shape {tuple(self.shape)} in blocks of "
                    f"{self.block_size}, got {tuple(tensor.shape)}"
                )

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, format={self.format!r}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}, device={self.device})"
        )

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.group_scales is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of storage of the packed codes and all scales."""
        return sum(part.nbytes for part in self.parts() if part is not None)

    def numel(self) -> int:
        """Number of weights (two per packed byte; one in int8)."""
        return self.shape.numel()

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """``(packed, absmax, group_scales, offset)``, the order in which the ops take them."""
        return self.packed, self.absmax, self.group_scales, self.offset

    def scales(self) -> torch.Tensor:
        """The decoded scale of each block, fp32 [ceil(n / block_size)]; int8: the absmax of each row, fp32 [rows]."""
        return reference.decode_scales(self.absmax, self.group_scales, self.offset)

    def dequantize(self, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """The decoded weight in ``dtype``, written into ``out`` where given; as :func:`lowbit.dequantize`."""
        ops = getattr(torch.ops, namespace_for(self.device.type, backends.selected))
        if out is not None:
            self._check_out(out, dtype)
            ops.dequantize_out.default(*self.parts(), self.format, self.block_size, out)
            return out
        dtype = self.dtype if dtype is None else dtype
        check_float_dtype("dtype", dtype)
        return ops.dequantize.default(*self.parts(), self.format, self.block_size, list(self.shape), dtype)

    def _check_out(self, out: torch.Tensor, dtype: torch.dtype | None) -> None:
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"out: expected a torch.Tensor, got {type(out).__name__}")
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

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """This weight on another device; self where it is there already.

        Raises:
            TypeError: ``device`` is a dtype: the stored bytes have none to change (see :meth:`dequantize`).
        """
        if isinstance(device, torch.dtype):
            raise TypeError(f"device: expected a torch.device or str, got {device}; use dequantize(dtype)")
        if torch.device(device) == self.device:
            return self
        parts = (None if part is None else part.to(device) for part in self.parts())
        return QuantizedTensor(
            *parts, shape=self.shape, dtype=self.dtype, format=self.format, block_size=self.block_size
        )

    def state_dict(self, prefix: str = "weight") -> dict[str, torch.Tensor]:
        """The tensors of this weight under bitsandbytes' key names, ``prefix`` being the weight's own name.

        For int8 these are the keys of its ``Linear8bitLt``, which have no place for :attr:`dtype`: ``prefix`` holds
        the codes, int8 (rows, row length), and beside it stand ``SCB`` (absmax) and ``weight_format`` (0, row-major).
        """
        if self.format == "int8":
            stem = _module_stem(prefix)
            return {
                prefix: self.packed.view(torch.int8).view(fmt.row_shape(self.shape)),
                f"{stem}SCB": self.absmax,
                f"{stem}weight_format": torch.zeros((), dtype=torch.uint8, device=self.device),
            }
        about = {
            "quant_type": self.format,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        state = {
            prefix: self.packed.view(-1, 1),
            f"{prefix}.absmax": self.absmax,
            f"{prefix}.quant_map": fmt.codebook(self.format, self.device),
        }
        if self.double_quant:
            state[f"{prefix}.nested_absmax"] = self.group_scales
            state[f"{prefix}.nested_quant_map"] = fmt.SCALE_MAP.to(self.device)
            about |= {
                "nested_blocksize": fmt.GROUP_SIZE,
                "nested_dtype": "float32",
                # A meta tensor has no value; its state dict only shows names and shapes.
                "nested_offset": 0.0 if self.offset.is_meta else self.offset.item(),
            }
        text = json.dumps(about).encode()
        state[f"{prefix}.quant_state.bitsandbytes__{self.format}"] = torch.tensor(
            list(text), dtype=torch.uint8, device=self.device
        )
        return state

    @classmethod
    def from_state_dict(
        cls, state: dict[str, torch.Tensor], prefix: str = "weight", *, int8_dtype: torch.dtype = torch.float32
    ) -> "QuantizedTensor":
        """Read what :meth:`state_dict` or bitsandbytes wrote; other keys of ``state`` are left alone.

        ``int8_dtype`` becomes the :attr:`dtype` of an int8 weight, whose keys do not say it. Such a weight comes back
        as the matrix (rows, row length).

        Raises:
            ValueError: a key is missing, the JSON is broken, or sizes, codebook or scale map are not this format's.
            TypeError: a tensor has the wrong dtype.
        """
        stem = f"{prefix}.quant_state.bitsandbytes__"
        found = [key for key in state if key.startswith(stem)]
        if not found and prefix in state and state[prefix].dtype == torch.int8:
            return cls._from_int8_state(state, prefix, int8_dtype)
        if len(found) != 1:
            raise ValueError(
                f"state: expected one key {stem}nf4 or {stem}fp4, or {prefix} in int8, got {found or 'none'}"
            )
        try:
            about = json.loads(bytes(state[found[0]].tolist()))
            block_size, shape = int(about["blocksize"]), tuple(int(size) for size in about["shape"])
            quant_type, dtype = about["quant_type"], _DTYPE_NAMES[about["dtype"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{found[0]}: expected bitsandbytes' JSON description, got {error!r}") from error
        check_format(quant_type)

        def part(name: str) -> torch.Tensor:
            key = prefix + name
            if key not in state:
                raise ValueError(f"state: missing key {key!r}")
            return state[key]

        def require(name: str, expected: torch.Tensor) -> None:
            if not torch.equal(part(name).float().cpu(), expected):
                raise ValueError(f"{prefix}{name}: expected the standard table of {quant_type}, got another one")

        packed = part("")
        require(".quant_map", fmt.codebook(quant_type))
        group_scales = offset = None
        if "nested_offset" in about:
            require(".nested_quant_map", fmt.SCALE_MAP)
            if about.get("nested_blocksize") != fmt.GROUP_SIZE:
                raise ValueError(
                    f"{found[0]}: expected nested_blocksize {fmt.GROUP_SIZE}, got {about.get('nested_blocksize')}"
                )
            group_scales = part(".nested_absmax")
            offset = torch.tensor(about["nested_offset"], dtype=torch.float32, device=packed.device)
        return cls(
            packed.reshape(-1),
            part(".absmax"),
            group_scales,
            offset,
            shape=shape,
            dtype=dtype,
            format=quant_type,
            block_size=block_size,
        )

    @classmethod
    def _from_int8_state(cls, state: dict[str, torch.Tensor], prefix: str, dtype: torch.dtype) -> "QuantizedTensor":
        codes, stem = state[prefix], _module_stem(prefix)
        if codes.dim() != 2:
            raise ValueError(f"{prefix}: expected int8 codes of 2 dimensions, got shape {tuple(codes.shape)}")
        if f"{stem}SCB" not in state:
            raise ValueError(f"state: missing key '{stem}SCB'")
        layout = state.get(f"{stem}weight_format")  # checkpoints of Hugging Face models may leave it out
        if layout is not None and not layout.is_meta and layout.numel() and layout.flatten()[0] != 0:
            raise ValueError(f"{stem}weight_format: expected 0 (row-major), got {layout.tolist()}")
        return cls(
            codes.contiguous().view(torch.uint8).view(-1),
            state[f"{stem}SCB"],
            shape=tuple(codes.shape),
            dtype=dtype,
            format="int8",
            block_size=codes.shape[1],
        )


def state_keys(state: Iterable[str], prefix: str) -> list[str]:
    """The keys of ``state`` that belong to the quantized weight called ``prefix``, in any format."""
    beside = {f"{_module_stem(prefix)}{name}" for name in ("SCB", "weight_format")}
    return [key for key in state if key == prefix or key.startswith(prefix + ".") or key in beside]


def _module_stem(prefix: str) -> str:
    """What stands before a weight's own name: "layer." for "layer.weight"."""
    return prefix[: prefix.rfind(".") + 1]


def check_format(format: str) -> None:
    """ValueError unless ``format`` is one of ``lowbit.format.FORMATS``."""
    if format not in fmt.FORMATS:
        raise ValueError(f"format: expected one of {', '.join(fmt.FORMATS)}, got {format!r}")


def check_block_size(block_size: int) -> None:
    """TypeError/ValueError unless ``block_size`` is a power of two in 32...4096."""
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"block_size: expected an int, got {block_size!r}")
    if not fmt.is_block_size(block_size):
        raise ValueError(
            f"block_size: expected a power of two from {fmt.MIN_BLOCK_SIZE} to {fmt.MAX_BLOCK_SIZE}, got {block_size}"
        )


def check_float_dtype(name: str, dtype: torch.dtype) -> None:
    """TypeError unless ``dtype`` is float32, float16 or bfloat16."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {dtype}")
