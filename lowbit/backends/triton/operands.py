"""What the ops take, checked before any launch and made contiguous: a kernel that reads beyond an operand computes with
whatever is there.

Errors are RuntimeErrors, as the native ops'; the public functions have raised their own by then. Not checked is what
only the GPU knows, where the rows of each expert end: the host would have to wait for it.
"""

import math

import torch

from ... import format as fmt
from .rounding import DTYPES


def wrong(name: str, expected: object, got: object) -> RuntimeError:
    return RuntimeError(f"{name}: expected {expected}, got {got}")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise wrong(name, "dtype float32, float16 or bfloat16", _name_of(dtype))


def check_format(format: str, block_size: int, columns: int | None) -> None:
    """``columns``: the length of a row, which is int8's block size; None where int8 is not served."""
    if format == "int8" and columns is not None:
        if max(block_size, 1) != max(columns, 1):
            raise wrong("block_size", f"{columns} (the length of a row) for int8", block_size)
        return
    if format not in fmt.CODEBOOKS:
        raise wrong("format", "nf4 or fp4" if columns is None else "nf4, fp4 or int8", format)
    if not fmt.is_block_size(block_size):
        raise wrong("block_size", f"a power of two from {fmt.MIN_BLOCK_SIZE} to {fmt.MAX_BLOCK_SIZE}", block_size)


def check_size(name: str, value: int) -> None:
    if value < 0:
        raise wrong(name, "at least 0", value)


def check_dimensions(name: str, tensor: torch.Tensor, dimensions: int) -> None:
    if tensor.dim() != dimensions:
        raise wrong(name, f"{dimensions} dimensions", tensor.dim())


def checked(
    name: str, tensor: torch.Tensor, numel: int, like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``tensor``, contiguous: of ``numel`` elements, on ``like``'s device, of ``dtype`` (None: floats of any)."""
    if tensor.device != like.device:
        raise wrong(name, f"device {like.device} (that of the other tensors)", tensor.device)
    if tensor.numel() != numel:
        raise wrong(name, f"{numel} elements", tensor.numel())
    if dtype is None:
        check_float(name, tensor.dtype)
    elif tensor.dtype != dtype:
        raise wrong(name, f"dtype {_name_of(dtype)}", _name_of(tensor.dtype))
    return tensor.contiguous()


def optional(name: str, tensor: torch.Tensor | None, numel: int, like: torch.Tensor) -> torch.Tensor | None:
    """:func:`checked`, of an operand of floats that need not be there."""
    return None if tensor is None else checked(name, tensor, numel, like)


def weight_of(
    shape: tuple[int, ...], like: torch.Tensor, packed, absmax, group_scales, offset, format: str, block_size: int
) -> tuple:
    """The arguments from packed to block_size of a weight of that shape, for a product with ``like``."""
    numel, (rows, columns) = math.prod(shape), fmt.row_shape(shape)
    check_format(format, block_size, columns)
    if (group_scales is None) != (offset is None):
        raise wrong("group_scales, offset", "both (double quantization) or neither", "one")
    if format == "int8":
        if offset is not None:
            raise wrong("group_scales, offset", "neither for int8", "both")
        packed = checked("packed", packed, numel, like, torch.uint8)
        return packed, checked("absmax", absmax, rows, like, torch.float32), None, None, format, block_size
    blocks = fmt.block_count(numel, block_size)
    packed = checked("packed", packed, (numel + 1) // 2, like, torch.uint8)
    absmax = checked("absmax", absmax, blocks, like, torch.float32 if offset is None else torch.uint8)
    if offset is not None:
        groups = fmt.block_count(blocks, fmt.GROUP_SIZE)
        group_scales = checked("group_scales", group_scales, groups, like, torch.float32)
        offset = checked("offset", offset, 1, like, torch.float32)
    return packed, absmax, group_scales, offset, format, block_size


def rows_of_floats(name: str, tensor: torch.Tensor) -> int:
    """How many rows an activation [..., length of a row] has."""
    check_float(name, tensor.dtype)
    if not tensor.dim():
        raise wrong(name, "at least 1 dimension", "a scalar")
    return math.prod(tensor.shape[:-1])


def lora_factors(
    names: tuple[str, str], low: torch.Tensor | None, up: torch.Tensor | None, rows: int, features: int, like
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(low [rows, rank], up of ``features`` times rank elements); (None, None) without LoRA or with one of rank 0."""
    if (low is None) != (up is None):
        raise wrong(", ".join(names), "both (LoRA) or neither", "one")
    if low is None:
        return None, None
    rank = low.shape[-1] if low.dim() else 1
    low, up = checked(names[0], low, rows * rank, like), checked(names[1], up, features * rank, like)
    return (low.view(rows, rank), up) if rank else (None, None)


def expert_ends_of(expert_ends: torch.Tensor, rows: int, like: torch.Tensor) -> torch.Tensor:
    """``expert_ends`` int32 [experts], contiguous: at least one where there are rows."""
    if rows and not expert_ends.numel():
        raise wrong("expert_ends", f"the last to be {rows}, the rows", "no experts")
    return checked("expert_ends", expert_ends, expert_ends.numel(), like, torch.int32)
