"""How FSDP2 shards a quantized weight by rows, and gathers it.

``fully_shard`` slices the weight, copies its slice into a zeroed buffer of the padded size, and asks the local shard
for what to gather. Where rows are whole blocks and divide evenly, that is the codes and the scales as they lie. Else
each rank sends the blocks that begin in its rows, as bytes: first the codes, then the scales. group_scales and offset,
which are small, stay with every shard.
"""

import math
from typing import NamedTuple

import torch


class _Split(NamedTuple):
    """A weight of ``shape`` split by rows over ``ranks`` ranks; ``unit``: elements that share a scale."""

    shape: tuple[int, ...]
    ranks: int
    unit: int
    unit_bytes: int
    scale_bytes: int

    @property
    def rows(self) -> int:
        """Rows of the first rank, which no other has more of."""
        return -(-self.shape[0] // self.ranks)

    @property
    def row(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def capacity(self) -> int:
        """Units that a rank may own."""
        return -(-self.rows * self.row // self.unit) + 1

    def owned(self, rank: int) -> tuple[int, int]:
        """The units [first, last) that begin in a rank's rows."""
        begin = min(rank * self.rows, self.shape[0]) * self.row
        end = min((rank + 1) * self.rows, self.shape[0]) * self.row
        return -(-begin // self.unit), -(-end // self.unit)

    def send(self, packed: torch.Tensor, absmax: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """What the rank owns, as uint8 tensors of the padded shard's size: FSDP2 takes no other."""
        first, last = self.owned(rank)
        # A shard holds the unit that its first element lies in, also where that begins in the rank before.
        skipped = first - min(rank * self.rows, self.shape[0]) * self.row // self.unit
        codes = packed.reshape(-1)[skipped * self.unit_bytes : (skipped + last - first) * self.unit_bytes]
        scales = absmax.reshape(-1)[skipped : skipped + last - first].view(torch.uint8)
        size = self.rows * self.row
        sent = packed.new_zeros(-(-self.capacity * (self.unit_bytes + self.scale_bytes) // size), size)
        for piece, at in ((codes, 0), (scales, self.capacity * self.unit_bytes)):
            sent.view(-1)[at : at + piece.numel()].copy_(piece)
        return [piece.view(self.rows, *self.shape[1:]) for piece in sent]

    def receive(self, gathered: tuple, packed_size: int, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """``(packed, absmax)`` of the whole weight, flat."""
        by_rank = torch.cat([tensor.view(self.ranks, -1) for tensor in gathered], 1)
        codes, scales = [], []
        for rank in range(self.ranks):
            first, last = self.owned(rank)
            at = self.capacity * self.unit_bytes
            codes.append(by_rank[rank, : (last - first) * self.unit_bytes])
            scales.append(by_rank[rank, at : at + (last - first) * self.scale_bytes])
        return torch.cat(codes)[:packed_size].clone(), torch.cat(scales).view(scale_dtype)


class Sharded:
    """The part of :class:`~lowbit.QuantizedTensor` that FSDP2 calls."""

    #: Of a slice of a zeroed buffer: the buffer.
    _buffer = None

    def zeroed(self, shape: tuple[int, ...]):
        """A buffer for a slice of this weight of up to that shape. What it holds is said by what is copied into it."""
        whole = not self.stored.transposed and not self.stored.first_element and self.stored.exact
        if not whole and not self.stored.sharded:
            raise ValueError(
                f"cannot shard a slice or a transposed view of a quantized weight ({self!r}): expected a whole weight; "
                "quantize the part by itself with lowbit.quantize(part.dequantize())"
            )
        layout = self.stored._replace(shape=tuple(shape), first_element=0, exact=True, sharded=True)
        if layout.keeps_rows and self.packed.dim() == 2:
            sizes = [(shape[0], part.shape[1]) for part in (self.packed, self.absmax)]
        else:
            split = self._split(tuple(shape), 1)
            sizes = [(split.capacity * split.unit_bytes,), (split.capacity,)]
        packed, absmax = (part.new_zeros(size) for part, size in zip((self.packed, self.absmax), sizes, strict=True))
        buffer = self._make((packed, absmax, self.group_scales, self.offset), layout)
        buffer._buffer = buffer
        return buffer

    def take(self, source) -> None:
        """Copy a slice of a weight to the front of the zeroed buffer that this is a slice of."""
        buffer = self._buffer
        for to, of in ((buffer.packed, source.packed), (buffer.absmax, source.absmax)):
            to.view(-1)[: of.numel()].copy_(of.reshape(-1))
        buffer.stored = buffer.stored._replace(
            first_element=source.stored.first_element, exact=buffer.packed.dim() == 2
        )

    def _split(self, shape: tuple[int, ...], ranks: int) -> _Split:
        unit = self.stored.spec.block_size or shape[-1]
        return _Split(shape, ranks, unit, self.stored.spec.packed_size(unit), self.absmax.element_size())

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """``(tensors to gather, what fsdp_post_all_gather needs besides)``. Called by FSDP2."""
        split = self._split(tuple(outer_size), mesh.size())
        whole = self.stored._replace(shape=split.shape, first_element=0, exact=True, sharded=False)
        alone = mesh.size() == 1
        as_they_lie = alone or whole.keeps_rows and split.rows * split.ranks == split.shape[0]
        about = (whole, split, as_they_lie, self.absmax if alone else None, self.group_scales, self.offset)
        if alone:  # FSDP2 copies the first tensor, and forgets others
            return (self.packed,), about
        if as_they_lie:
            return (self.packed, self.absmax), about
        return tuple(split.send(self.packed, self.absmax, mesh.get_local_rank())), about

    def fsdp_post_all_gather(self, gathered, about, param_dtype, *, out=None):
        """``(the whole weight in param_dtype, tensors that FSDP2 may free)``, or the same written into ``out``."""
        whole, split, as_they_lie, own_absmax, group_scales, offset = about
        whole = whole._replace(dtype=param_dtype)
        if out is not None:
            if not as_they_lie:  # else ``out`` lies where it was gathered
                packed, absmax = self._received(gathered, whole, split)
                out.packed.copy_(packed)
                out.absmax.copy_(absmax)
            return None
        if own_absmax is not None:
            parts = _front(gathered[0], own_absmax, whole)
            return self._make((*parts, group_scales, offset), whole), ()  # the shard needs its scales
        packed, absmax = gathered if as_they_lie else self._received(gathered, whole, split)
        return self._make((packed, absmax, group_scales, offset), whole), (packed, absmax)

    def _received(self, gathered, whole, split):
        parts = split.receive(gathered, whole.spec.packed_size(whole.numel), self.absmax.dtype)
        return tuple(part.view(split.shape[0], -1) for part in parts) if whole.keeps_rows else parts


def _front(packed, absmax, whole) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of a whole weight, which are at the front of a shard's memory."""
    packed = packed.reshape(-1)[: whole.spec.packed_size(whole.numel)]
    absmax = absmax.reshape(-1)[: whole.spec.scale_count(whole.shape)]
    return (packed.view(whole.shape[0], -1), absmax.view(whole.shape[0], -1)) if whole.keeps_rows else (packed, absmax)
