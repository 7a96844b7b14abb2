"""What the ops take, checked before any launch and made contiguous: a kernel that reads beyond an operand computes with
whatever is there.

Errors are RuntimeErrors, as the native ops'; the public functions have raised their own by then. Not checked is what
only the GPU knows, where the rows of each expert end: the host would have to wait for it.
"""

import math
from typing import NamedTuple

import torch

from ... import format as fmt
from .decode import DTYPES, FORMATS, scale_map


def wrong(name: str, expected: object, got: object) -> RuntimeError:
    return RuntimeError(f"{name}: expected {expected}, got {got}")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise wrong(name, "dtype float32, float16 or bfloat16", _name_of(dtype))


def check_size(name: str, value: int) -> None:
    if value < 0:
        raise wrong(name, "at least 0", value)


def check_dimensions(name: str, tensor: torch.Tensor, dimensions: int) -> None:
    if tensor.dim() != dimensions:
        raise wrong(name, f"{dimensions} dimensions", tensor.dim())


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise wrong(name, "a contiguous tensor", f"strides {list(tensor.stride())} for shape {list(tensor.shape)}")


def spec_of(text: str, searched: bool = False) -> fmt.WeightSpec:
    """Return the spec that ``text`` says. ``searched``: its format must be one that has codes for given scales."""
    spec = fmt.WeightSpec.parse(text)
    served = [name for name, record in FORMATS.items() if record.codebook or not searched]
    if spec.format not in served:
        raise wrong("spec", " or ".join(served), spec.format)
    return spec


def checked(
    name: str, tensor: torch.Tensor, numel: int, like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return ``tensor``, contiguous: ``numel`` elements of ``dtype`` (None: any floats) on ``like``'s device."""
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
    """Return :func:`checked` of an operand of floats, or None if it is None."""
    return None if tensor is None else checked(name, tensor, numel, like)


class Weight(NamedTuple):
    """A weight as an op gets it, its parts checked and contiguous."""

    packed: torch.Tensor
    absmax: torch.Tensor
    group_scales: torch.Tensor | None
    offset: torch.Tensor | None
    spec: fmt.WeightSpec

    def operands(self) -> tuple[torch.Tensor | None, ...]:
        """Return a kernel's (packed, absmax, group_scales, offset, scale_map); codes without a codebook are int8."""
        packed = self.packed if self.spec.record.codebook else self.packed.view(torch.int8)
        return packed, *self[1:4], scale_map(packed.device) if self.spec.double_quant else None

    def constants(self) -> dict[str, object]:
        """Return what a kernel is compiled for."""
        spec = self.spec
        return {"FORMAT": spec.format, "BLOCK_SIZE": spec.block_size or 1, "DOUBLE_QUANT": spec.double_quant}

    def arguments(self) -> tuple:
        """Return what an op takes."""
        return *self[:4], self.spec.text


def weight_of(shape: tuple[int, ...], like: torch.Tensor, packed, absmax, group_scales, offset, spec: str) -> Weight:
    """Return the weight of that shape, for a product with ``like``. Its spec alone says which parts there are."""
    spec, numel = spec_of(spec), math.prod(shape)
    packed = checked("packed", packed, spec.packed_size(numel), like, torch.uint8)
    scales = spec.scale_count(shape)
    absmax = checked("absmax", absmax, scales, like, torch.uint8 if spec.double_quant else torch.float32)
    missing = (group_scales is None) + (offset is None)
    if missing != (0 if spec.double_quant else 2):
        expected = f"{'both' if spec.double_quant else 'neither'} for {spec}"
        raise wrong("group_scales, offset", expected, ("both", "one", "neither")[missing])
    if not spec.double_quant:
        return Weight(packed, absmax, None, None, spec)
    groups = fmt.block_count(scales, fmt.GROUP_SIZE)
    group_scales = checked("group_scales", group_scales, groups, like, torch.float32)
    return Weight(packed, absmax, group_scales, checked("offset", offset, 1, like, torch.float32), spec)


def rows_of_floats(name: str, tensor: torch.Tensor) -> int:
    """Return how many rows an activation [..., length of a row] has."""
    check_float(name, tensor.dtype)
    if not tensor.dim():
        raise wrong(name, "at least 1 dimension", "a scalar")
    return math.prod(tensor.shape[:-1])


def lora_factors(
    names: tuple[str, str], low: torch.Tensor | None, up: torch.Tensor | None, rows: int, features: int, like
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return (low [rows, rank], up of ``features`` * rank elements); (None, None) without LoRA or with rank 0."""
    if (low is None) != (up is None):
        raise wrong(", ".join(names), "both (LoRA) or neither", "one")
    if low is None:
        return None, None
    rank = low.shape[-1] if low.dim() else 1
    low, up = checked(names[0], low, rows * rank, like), checked(names[1], up, features * rank, like)
    return (low.view(rows, rank), up) if rank else (None, None)


def expert_ends_of(expert_ends: torch.Tensor, rows: int, like: torch.Tensor) -> torch.Tensor:
    """Return ``expert_ends`` int32 [experts], contiguous: at least one where there are rows."""
    if rows and not expert_ends.numel():
        raise wrong("expert_ends", f"the last to be {rows}, the rows", "no experts")
    return checked("expert_ends", expert_ends, expert_ends.numel(), like, torch.int32)
