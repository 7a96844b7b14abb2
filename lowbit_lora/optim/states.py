"""What an optimizer keeps of one parameter, and where in an arena."""

import math
from dataclasses import dataclass

import torch

from lowbit.optim import RULES, STATE_BLOCK

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard
else:  # a torch that was built without it has no sharded tensors
    DTensor = Replicate = Shard = type(None)

#: The states of each rule, in torch's names, and the parameters' smallest size for states in 8 bits (bitsandbytes').
STATE_NAMES = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}
SMALLEST_IN_8_BITS = 4096
_ALIGNMENT = 16  # bytes: kernels read and write so many at once
assert all(len(STATE_NAMES[name]) == len(rule.signed_states) for name, rule in RULES.items())


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or of a DTensor this process's shard."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def in_8_bits(parameter: torch.Tensor, bits: int) -> bool:
    """Whether the parameter's states are in 8 bits, the same for each shard of it.

    A shard's blocks have to be those of the whole, so that it can be saved and loaded by another number of processes:
    it is, if rows are whole blocks.
    """
    if bits != 8 or parameter.numel() < SMALLEST_IN_8_BITS:
        return False
    if not isinstance(parameter, DTensor):
        return True
    by_rows = all(isinstance(placement, Replicate) or placement == Shard(0) for placement in parameter.placements)
    return by_rows and math.prod(parameter.shape[1:]) % STATE_BLOCK == 0


@dataclass(frozen=True)
class Piece:
    """One tensor of a parameter's state: its global and its local shape, and its bytes in the parameter's region."""

    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.local_shape) * self.dtype.itemsize


class StatesOf:
    """The states of one parameter: which tensors, and where each begins in a region of so many bytes.

    Attributes:
        pieces: by name, such as "exp_avg" and "exp_avg_absmax".
        nbytes: of the region.
        numel: of this process's part of the parameter.
        device: where they are.
    """

    def __init__(self, parameter: torch.Tensor, rule: str, bits: int, device: torch.device):
        local = local_part(parameter)
        self.numel, self.device, self.pieces, self.nbytes = local.numel(), device, {}, 0
        scales, local_scales = self._scale_shapes(parameter, local)
        eight = in_8_bits(parameter, bits)
        for name in STATE_NAMES[rule]:
            self._add(name, tuple(parameter.shape), tuple(local.shape), torch.uint8 if eight else torch.float32)
            if eight:
                self._add(f"{name}_absmax", scales, local_scales, torch.float32)

    @staticmethod
    def _scale_shapes(parameter: torch.Tensor, local: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if isinstance(parameter, DTensor):  # a row of scales for each row, so that both are sharded alike
            row = (math.prod(parameter.shape[1:]) // STATE_BLOCK,)
            return (parameter.shape[0] if parameter.dim() else 1, *row), (local.shape[0] if local.dim() else 1, *row)
        count = (-(-local.numel() // STATE_BLOCK),)
        return count, count

    def _add(self, name: str, shape: tuple[int, ...], local_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        piece = self.pieces[name] = Piece(shape, local_shape, dtype, self.nbytes)
        self.nbytes += -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT

    def views(self, region: torch.Tensor, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors, in a region (uint8); DTensors of a parameter that is one."""
        found = {}
        for name, piece in self.pieces.items():
            view = region[piece.offset : piece.offset + piece.nbytes].view(piece.dtype).view(piece.local_shape)
            # The same memory as a storage of its own: torch saves storages whole, and in one dtype only.
            view = torch.from_dlpack(view)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                strides = torch.empty(piece.shape, device="meta").stride()
                view = DTensor.from_local(
                    view, mesh, placements, run_check=False, shape=torch.Size(piece.shape), stride=strides
                )
            found[name] = view
        return found

    def row(self, place: tuple[int, int], rule: str) -> list[int]:
        """The columns of ``lowbit.optim.LAYOUT`` after the first, for a region at this (segment, offset)."""
        segment, begin = place
        columns = []
        for name in STATE_NAMES[rule]:
            scales = self.pieces.get(f"{name}_absmax")
            columns += [begin + self.pieces[name].offset, -1 if scales is None else begin + scales.offset]
        return [segment, *columns, *[-1] * (4 - len(columns))]

    def check(self, state: dict, parameter: torch.Tensor, what: str) -> None:
        """ValueError unless a state from elsewhere is one of this parameter; ``what`` names it."""
        wanted = {"step", *self.pieces}
        if set(state) != wanted:
            raise ValueError(f"{what}: expected states {sorted(wanted)}, got {sorted(state)}: of another optimizer?")
        for name, piece in self.pieces.items():
            value = state[name]
            is_right = isinstance(value, torch.Tensor) and tuple(value.shape) == piece.shape
            # fp32 states may come from an optimizer that keeps them in the parameter's dtype.
            same_kind = is_right and (
                value.dtype == piece.dtype or {value.dtype, piece.dtype}.isdisjoint({torch.uint8})
            )
            if not same_kind or isinstance(value, DTensor) != isinstance(parameter, DTensor):
                got = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
                kind = "a DTensor, " if isinstance(parameter, DTensor) else ""
                raise ValueError(f"{what}: expected {name} to be {kind}{piece.dtype} {list(piece.shape)}, got {got}")
        step = float(state["step"])
        if not (step >= 0 and step == int(step)):
            raise ValueError(f"{what}: expected step to be a whole number of at least 0, got {state['step']!r}")


def copy_state(to: torch.Tensor, value: torch.Tensor) -> None:
    """Write a tensor of a state; DTensors may be sharded in different ways."""
    if isinstance(to, DTensor):
        value = value.redistribute(to.device_mesh, to.placements)
    local_part(to).copy_(local_part(value))
