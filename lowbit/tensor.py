"""QuantizedTensor: a 4-bit weight and its scales, and how they are written to files."""

import json

import torch

from . import backends, reference
from . import format as fmt
from .backends import namespace_for

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


class QuantizedTensor:
    """A weight in the 4-bit format of :mod:`lowbit.format`. Made by :func:`lowbit.quantize`.

    Attributes:
        packed: uint8 [ceil(n / 2)], two codes a byte.
        absmax: one entry per block: fp32 scales, or uint8 codes with double quantization.
        group_scales: fp32, one per 256 blocks; None without double quantization.
        offset: fp32 scalar tensor; None without double quantization.
        shape: the weight's shape.
        dtype: dtype of the weight that was quantized, and of ``dequantize()``.
        format: "nf4" or "fp4".
        block_size: elements per block.
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
        check_block_size(self.block_size)
        check_float_dtype("dtype", self.dtype)
        blocks = fmt.block_count(self.numel(), self.block_size)
        if (self.group_scales is None) != (self.offset is None):
            raise ValueError("group_scales and offset: expected both (double quantization) or neither, got one")
        expected = [("packed", self.packed, torch.uint8, ((self.numel() + 1) // 2,))]
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
        """Number of weights (two per packed byte)."""
        return self.shape.numel()

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """``(packed, absmax, group_scales, offset)``, the order in which the ops take them."""
        return self.packed, self.absmax, self.group_scales, self.offset

    def scales(self) -> torch.Tensor:
        """The decoded scale of each block, fp32 [ceil(n / block_size)]."""
        return reference.decode_scales(self.absmax, self.group_scales, self.offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded weight in ``dtype`` (default: the quantized weight's own).

        Raises:
            TypeError: ``dtype`` is not float32, float16 or bfloat16.
        """
        dtype = self.dtype if dtype is None else dtype
        check_float_dtype("dtype", dtype)
        namespace = namespace_for(self.device.type, backends.selected)
        op = getattr(torch.ops, namespace).dequantize.default
        return op(*self.parts(), self.format, self.block_size, list(self.shape), dtype)

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
        """The tensors of this weight under bitsandbytes' key names, ``prefix`` being the weight's own name."""
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
    def from_state_dict(cls, state: dict[str, torch.Tensor], prefix: str = "weight") -> "QuantizedTensor":
        """Read what :meth:`state_dict` or bitsandbytes wrote; other keys of ``state`` are left alone.

        Raises:
            ValueError: a key is missing, the JSON is broken, or sizes, codebook or scale map are not this format's.
            TypeError: a tensor has the wrong dtype.
        """
        stem = f"{prefix}.quant_state.bitsandbytes__"
        found = [key for key in state if key.startswith(stem)]
        if len(found) != 1:
            raise ValueError(f"state: expected one key {stem}nf4 or {stem}fp4, got {found or 'none'}")
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


def check_format(format: str) -> None:
    """ValueError unless ``format`` is a 4-bit format; NotImplementedError for int8, which is to come."""
    if format == "int8":
        raise NotImplementedError("format: 'int8' is not implemented yet; expected 'nf4' or 'fp4'")
    if format not in fmt.CODEBOOKS:
        raise ValueError(f"format: expected one of {', '.join(fmt.CODEBOOKS)}, got {format!r}")


def check_block_size(block_size: int) -> None:
    """TypeError/ValueError unless ``block_size`` is a power of two in 32...4096."""
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"block_size: expected an int, got {block_size!r}")
    in_range = fmt.MIN_BLOCK_SIZE <= block_size <= fmt.MAX_BLOCK_SIZE
    if not in_range or block_size & (block_size - 1):
        raise ValueError(
            f"block_size: expected a power of two from {fmt.MIN_BLOCK_SIZE} to {fmt.MAX_BLOCK_SIZE}, got {block_size}"
        )


def check_float_dtype(name: str, dtype: torch.dtype) -> None:
    """TypeError unless ``dtype`` is float32, float16 or bfloat16."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {dtype}")
