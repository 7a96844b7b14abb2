"""PTX types, and the view of a register's bits that an instruction of each type computes on (PTX ISA 5.2, "Types")."""

from dataclasses import dataclass

import numpy as np

from .numerics import bf16_to_f32, f32_to_bf16

# Registers are unsigned arrays of their width. A 128-bit register is a bag of bits that is only moved, and
# complex128 is numpy's one 16-byte element type that copies bits unchanged.
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64, 128: np.complex128}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


@dataclass(frozen=True)
class PtxType:
    """A type as instructions name it.

    ``kind`` is p(redicate), u(nsigned), s(igned), b(its) or f(loat); ``dtype`` is what numpy computes in, which for
    bf16 and tf32 is float32; ``packed`` types hold two elements of ``dtype``.
    """

    name: str
    bits: int
    kind: str
    dtype: type
    packed: bool = False

    @property
    def is_float(self):
        return self.kind == "f"

    @property
    def is_signed(self):
        return self.kind == "s"

    @property
    def bytes(self):
        return max(self.bits // 8, 1)

    @property
    def limits(self):
        """Smallest and largest value of an integer type."""
        if self.is_signed:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1


def _all_types():
    types = [PtxType("pred", 1, "p", np.bool_), PtxType("b128", 128, "b", np.complex128)]
    for bits in (8, 16, 32, 64):
        types += [PtxType(f"{kind}{bits}", bits, kind, UNSIGNED[bits]) for kind in "ub"]
        types.append(PtxType(f"s{bits}", bits, "s", SIGNED[bits]))
    types += [
        PtxType("f16", 16, "f", np.float16),
        PtxType("bf16", 16, "f", np.float32),
        PtxType("f32", 32, "f", np.float32),
        PtxType("tf32", 32, "f", np.float32),
        PtxType("f64", 64, "f", np.float64),
        PtxType("f16x2", 32, "f", np.float16, packed=True),
        PtxType("bf16x2", 32, "f", np.float32, packed=True),
        PtxType("u16x2", 32, "u", np.uint16, packed=True),
        PtxType("s16x2", 32, "s", np.int16, packed=True),
    ]
    return {t.name: t for t in types}


TYPES = _all_types()
PRED, U32, S32, B32, U64, B64 = (TYPES[name] for name in ("pred", "u32", "s32", "b32", "u64", "b64"))


def untyped(t):
    """The .bN type of t's width: the same bits, neither converted nor interpreted."""
    return TYPES[f"b{t.bits}"] if t.bits > 1 else t


def decoder(t):
    """Function from raw bits (an unsigned array of ``t.bits``) to the array to compute on."""
    if t.name == "bf16":
        return bf16_to_f32
    if t.name == "bf16x2":
        return lambda raw: bf16_to_f32(raw.view(np.uint16))
    if t.name == "tf32":
        return lambda raw: (raw & np.uint32(0xFFFFE000)).view(np.float32)  # the hardware ignores the 13 low bits
    if t.packed or t.kind in "sf":
        return lambda raw, dtype=t.dtype: raw.view(dtype)
    return lambda raw: raw


def encoder(t):
    """Function from a computed array to raw bits: the inverse of `decoder`, rounding where the type is narrower."""
    if t.name == "bf16":
        return f32_to_bf16
    if t.name == "bf16x2":
        return lambda values: f32_to_bf16(values).view(np.uint32)
    if t.kind == "p" or t.bits == 128:
        return lambda values: values
    dtype, unsigned = t.dtype, UNSIGNED[t.bits]
    return lambda values: (values if values.dtype == dtype else values.astype(dtype)).view(unsigned)
