"""``quantize(..., codes="descent")``: codes and scales chosen together under the layer's Hessian, in the same bytes.

A weighted search (``search.py``) finds scales, and with them the grid of double quantization. On that grid GPTQ rounds
block after block, each block with a choice of scale, and then each block in turn descends: for its scale and the
neighbours of that on the grid, one code after the other takes its best value while all others stay.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..format import GROUP_SIZE, WeightSpec, scale_map
from .curvature import Curvature
from .search import scales_of

#: Scales that GPTQ tries for a block, in units of its largest magnitude, besides the one that it has.
GPTQ_FACTORS = tuple(sign * (0.65 + i * (0.4 / 12)) for sign in (1, -1) for i in range(13))
#: Times that the codes of a block are gone through for each scale that the descent tries.
CODE_SWEEPS = 2
#: Those scales: neighbours on the grid of double quantization; where there is none, multiples of the scale.
CODE_STEPS = (0, -1, 1, -2, 2)
SCALE_MULTIPLES = (1.0, 0.985, 1.015, 0.97, 1.03)


def curvatures_of(
    hessian: torch.Tensor | Curvature | Sequence[torch.Tensor | Curvature], damping: float, weight: torch.Tensor
) -> list[Curvature]:
    """One for each matrix of ``weight``, or one for all; TypeError/ValueError unless they fit it."""
    is_stack = isinstance(hessian, (list, tuple)) or (isinstance(hessian, torch.Tensor) and hessian.dim() == 3)
    matrices = list(hessian) if is_stack else [hessian]
    if is_stack and (weight.dim() != 3 or len(matrices) != len(weight)):
        raise ValueError(
            f"hessian: expected as many as the weight of shape {tuple(weight.shape)} has matrices, got {len(matrices)}"
        )
    if weight.dim() < 2:
        raise ValueError(f"weight: expected at least 2 dimensions with codes='descent', got {tuple(weight.shape)}")
    curvatures = [matrix if isinstance(matrix, Curvature) else Curvature(matrix, damping) for matrix in matrices]
    for curvature in curvatures:
        if len(curvature) != weight.shape[-1]:
            raise ValueError(
                f"hessian: expected shape {(weight.shape[-1],) * 2} for a weight of {weight.shape[-1]} input columns, "
                f"got {(len(curvature),) * 2}"
            )
        if curvature.device != weight.device:
            raise ValueError(f"hessian: expected device {weight.device} (that of weight), got {curvature.device}")
    return curvatures


def searched_scales(op, weight: torch.Tensor, curvatures: list[Curvature], spec: WeightSpec) -> torch.Tensor:
    """The weighted search's scales, fp32 [blocks]: each matrix's columns weighted by the diagonal of its Hessian."""
    if len(curvatures) == 1 or weight.shape[-1] % spec.block_size:
        return scales_of(op, weight, sum(curvature.diagonal.double() for curvature in curvatures), spec)
    each = zip(weight, curvatures, strict=True)
    return torch.cat([scales_of(op, matrix, curvature.diagonal, spec) for matrix, curvature in each])


@dataclass(frozen=True)
class DoubleQuantScales:
    """The scales that blocks may have where groups of them share a scale: 256 each. Codes are int64.

    Attributes:
        group_scales: of each block, fp32 [n, blocks of a row].
        offset: fp32 scalar.
    """

    group_scales: torch.Tensor
    offset: torch.Tensor

    def values(self, codes: torch.Tensor, block: int) -> torch.Tensor:
        """The scales of codes [n, any] of block number ``block`` of each row; as reference.decode_scales has them."""
        return scale_map(codes.device)[codes] * self.group_scales[:, block, None] + self.offset

    def nearest(self, scales: torch.Tensor, block: int) -> torch.Tensor:
        """The codes of the nearest scales there are."""
        entries = scale_map(scales.device)
        tiny = torch.finfo(torch.float32).tiny
        wanted = (scales - self.offset) / self.group_scales[:, block, None].clamp(min=tiny)
        return torch.bucketize(wanted, (entries[1:] + entries[:-1]) / 2)

    def neighbours(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [n, c] to try instead of codes [n, 1], these first."""
        return (codes + torch.tensor(CODE_STEPS, device=codes.device)).clamp(0, 255)


class FreeScales:
    """Scales that may be any number: their codes are the scales themselves."""

    def values(self, codes: torch.Tensor, block: int) -> torch.Tensor:
        """The scales of codes."""
        return codes

    nearest = values

    def neighbours(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [n, c] to try instead of codes [n, 1], these first."""
        return codes * torch.tensor(SCALE_MULTIPLES, device=codes.device)


def improve(op, weight, packed, absmax, group_scales, offset, spec: WeightSpec, curvatures: list[Curvature], sweeps):
    """``(packed, absmax)`` of a weight that has been quantized by weighted search, chosen again under its Hessian.

    The search's ``group_scales`` and ``offset`` stay. No row comes out worse than it was. Where rows cut blocks, or
    there are none, nothing changes.
    """
    columns = weight.shape[-1]
    if weight.numel() == 0 or columns % spec.block_size:
        return packed, absmax
    searched = op.dequantize.default(packed, absmax, group_scales, offset, spec.text, list(weight.shape), torch.float32)
    # In these units the largest weight is about 1. It is a power of two, so that nothing is rounded.
    unit = 2.0 ** -min(max(math.frexp(float(weight.abs().amax()))[1], -120), 120)
    wanted, searched = weight.reshape(-1, columns).float() * unit, searched.view(-1, columns) * unit
    blocks = columns // spec.block_size
    if spec.double_quant:
        group_of = torch.arange(absmax.numel(), device=absmax.device) // GROUP_SIZE
        group_scales = (group_scales[group_of] * unit).view(-1, blocks)
        codes = absmax.long().view(-1, blocks)
    else:
        codes = absmax.view(-1, blocks) * unit

    new_packed, new_codes = [], []
    count = len(wanted) // len(curvatures)
    for first, curvature in zip(range(0, len(wanted), count), curvatures, strict=True):
        here = slice(first, first + count)
        scales = DoubleQuantScales(group_scales[here], offset * unit) if spec.double_quant else FreeScales()
        rows = _Rows(op, wanted[here], searched[here], codes[here], scales, curvature, spec)
        rows.gptq()
        for _ in range(sweeps):
            rows.descend()
        found, decoded = rows.best()
        new_codes.append(found)
        decoded_scales = torch.cat([scales.values(found[:, block, None], block) for block in range(blocks)], 1)
        new_packed.append(op.encode.default(decoded, decoded_scales, spec.text))
    codes = torch.cat(new_codes).view(-1)
    return torch.cat(new_packed), codes.to(torch.uint8) if spec.double_quant else codes / unit


class _Rows:
    """The rows of a weight on their way: decoded values, and codes of scales, that get better step by step."""

    def __init__(self, op, wanted, searched, codes, scales, curvature, spec):
        self.op, self.scales, self.curvature = op, scales, curvature
        self.spec, self.size = spec.text, spec.block_size
        self.wanted, self.searched, self.searched_codes = wanted, searched, codes
        self.codes = codes.clone()
        self.decoded: torch.Tensor
        self.gradient: torch.Tensor

    def gptq(self) -> None:
        """Round all blocks, each with a choice of scale."""
        order, upper = self.curvature.factor(self.size)
        factors = torch.tensor(GPTQ_FACTORS, device=order.device)
        left, decoded_in_order = self.wanted[:, order], []
        for first in range(0, len(order), self.size):
            here, rest = slice(first, first + self.size), slice(first + self.size, None)
            block = int(order[first]) // self.size
            weight = left[:, here].contiguous()
            tried = self.scales.nearest(weight.abs().amax(1, keepdim=True) * factors, block)
            codes = torch.cat([self.codes[:, block, None], tried], 1)
            decoded, errors, choice = self.op.gptq_block.default(
                weight, upper[here, here].contiguous(), self.scales.values(codes, block), self.spec
            )
            decoded_in_order.append(decoded)
            self.codes[:, block] = codes.gather(1, choice[:, None].long())[:, 0]
            left[:, rest].addmm_(errors, upper[here, rest], alpha=-1)
        self.decoded = torch.cat(decoded_in_order, 1)[:, order.argsort()]
        self.gradient = (self.wanted - self.decoded) @ self.curvature.damped

    def descend(self) -> None:
        """Go through all blocks once, each giving way to its best change while the others stay."""
        for block in range(self.codes.shape[1]):
            here = slice(block * self.size, (block + 1) * self.size)
            hessian = self.curvature.damped[here]
            codes = self.scales.neighbours(self.codes[:, block, None])
            old = self.decoded[:, here].clone()  # contiguous() is a view where a row is one block
            new, choice = self.op.descend_block.default(
                old,
                self.gradient[:, here].contiguous(),
                hessian[:, here].contiguous(),
                self.scales.values(codes, block),
                CODE_SWEEPS,
                self.spec,
            )
            self.gradient.addmm_(new - old, hessian, alpha=-1)  # before `old` is written to: it may be self.decoded
            self.decoded[:, here] = new
            self.codes[:, block] = codes.gather(1, choice[:, None].long())[:, 0]

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(codes, decoded)``, in each row what the search had where that is better."""
        found = self.curvature.loss_from(self.wanted - self.decoded, self.gradient)
        better = (found <= self.curvature.loss(self.wanted - self.searched))[:, None]
        codes = torch.where(better, self.codes, self.searched_codes)
        return codes, torch.where(better, self.decoded, self.searched)
