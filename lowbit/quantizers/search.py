"""``quantize(..., scale="search")``: scales that minimise the error of the decoded weight, in the same bytes."""

import torch

from .. import reference
from ..format import WeightSpec


def check_importance(importance: torch.Tensor, weight: torch.Tensor) -> None:
    """TypeError/ValueError unless ``importance`` is one finite number of at least 0 per column of ``weight``."""
    if not isinstance(importance, torch.Tensor):
        raise TypeError(f"importance: expected a torch.Tensor, got {type(importance).__name__}")
    if not importance.dtype.is_floating_point:
        raise TypeError(f"importance: expected a floating-point dtype, got {importance.dtype}")
    columns = weight.shape[-1] if weight.dim() else 1
    if importance.shape != (columns,):
        raise ValueError(
            f"importance: expected shape ({columns},), one number per input column, got {tuple(importance.shape)}"
        )
    if importance.device != weight.device:
        raise ValueError(f"importance: expected device {weight.device} (that of weight), got {importance.device}")
    if not importance.is_meta:
        wrong = ~torch.isfinite(importance) | (importance < 0)
        if bool(wrong.any()):
            column = int(wrong.nonzero()[0])
            raise ValueError(
                f"importance: expected finite numbers of at least 0, got {importance[column].item()} in column {column}"
            )


def scales_of(op, weight: torch.Tensor, importance: torch.Tensor | None, spec: WeightSpec) -> torch.Tensor:
    """The signed scale of each block, fp32 [blocks]."""
    if importance is not None:
        # Only ratios matter; fp32 holds those of any float64 input once the largest is 1.
        largest = importance.amax() if importance.numel() else importance.new_ones(())
        importance = (importance / largest.clamp(min=torch.finfo(importance.dtype).tiny)).float()
    return op.search_scales.default(weight, importance, spec.text)


def encode(op, weight: torch.Tensor, absmax, group_scales, offset, spec: WeightSpec) -> torch.Tensor:
    """packed: codes chosen for what the scales decode to, since double quantization comes between the two."""
    return op.encode.default(weight, reference.decode_scales(absmax, group_scales, offset, spec.text), spec.text)
