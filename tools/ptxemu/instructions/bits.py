"""Logic, shifts, bit fields and byte permutation (PTX ISA 9.7.1, 9.7.8 and 9.7.9)."""

import numpy as np

from ..compiler import instruction
from ..numerics import count_leading_zeros
from ..parser import parse_constant
from ..ptx_types import B32, PRED, U32, UNSIGNED

ONE, ZERO, ALL = np.uint64(1), np.uint64(0), np.uint64(0xFFFFFFFFFFFFFFFF)
BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@instruction("and", "or", "xor")
def logic(build, ins):
    t = build.types()[-1]
    compute = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.parts[0]]
    if t.kind != "p":
        return build.elementwise(compute, t, 2)
    a, b = (build.predicate(text) for text in ins.operands[1:3])
    put = build.destination(ins.operands[0], t)
    return lambda batch, mask: put(batch, mask, compute(a(batch), b(batch)))


@instruction("not")
def invert(build, ins):
    return build.elementwise(np.invert, build.types()[-1], 1)


@instruction("cnot")
def cnot(build, ins):
    return build.elementwise(lambda a: (a == 0).astype(a.dtype), build.types()[-1], 1)


# The 16 functions of two bits, indexed by their truth table: bit 2 b + c is the result for (b, c).
_TWO_INPUT = {
    0: lambda b, c: np.uint32(0),
    1: lambda b, c: ~(b | c),
    2: lambda b, c: ~b & c,
    3: lambda b, c: ~b,
    4: lambda b, c: b & ~c,
    5: lambda b, c: ~c,
    6: lambda b, c: b ^ c,
    7: lambda b, c: ~(b & c),
    8: lambda b, c: b & c,
    9: lambda b, c: ~(b ^ c),
    10: lambda b, c: c,
    11: lambda b, c: ~b | c,
    12: lambda b, c: b,
    13: lambda b, c: b | ~c,
    14: lambda b, c: b | c,
    15: lambda b, c: np.uint32(0xFFFFFFFF),
}


def lop3_function(table):
    """Function of (a, b, c) with truth table ``table``: its high half holds where a is set, its low half elsewhere."""
    high, low = table >> 4, table & 15
    where_a, elsewhere = _TWO_INPUT[high], _TWO_INPUT[low]
    if high == low:
        return lambda a, b, c: where_a(b, c)
    if low == 0:
        return lambda a, b, c: a & where_a(b, c)
    if high == 0:
        return lambda a, b, c: ~a & elsewhere(b, c)
    if high == 15:
        return lambda a, b, c: a | elsewhere(b, c)
    return lambda a, b, c: (a & where_a(b, c)) | (~a & elsewhere(b, c))


@instruction("lop3")
def lop3(build, ins):
    compute = lop3_function(parse_constant(ins.operands[4]).value)
    a, b, c = (build.source(text, B32) for text in ins.operands[1:4])
    destinations = build.pair(ins.operands[0])
    put = build.destination(destinations[0], B32)
    combine = BOOLEAN.get(build.one_of(BOOLEAN))
    if combine is None:
        return lambda batch, mask: put(batch, mask, compute(a(batch), b(batch), c(batch)))
    put_predicate, read_predicate = build.destination(destinations[1], PRED), build.predicate(ins.operands[5])

    def run(batch, mask):
        result, predicate = compute(a(batch), b(batch), c(batch)), read_predicate(batch)
        put(batch, mask, result)
        put_predicate(batch, mask, combine(result != 0, predicate))

    return run


@instruction("shl", "shr")
def shift(build, ins):
    t = build.types()[-1]
    shift_bits = np.left_shift if ins.parts[0] == "shl" else np.right_shift
    arithmetic = t.is_signed and shift_bits is np.right_shift
    a, put = build.source(ins.operands[1], t), build.destination(ins.operands[0], t)
    constant = parse_constant(ins.operands[2])
    if constant is not None:
        amount = constant.value & 0xFFFFFFFF
        if amount >= t.bits and not arithmetic:
            return lambda batch, mask: put(batch, mask, np.zeros(batch.lanes, t.dtype))
        amount = t.dtype(min(amount, t.bits - 1))
        return lambda batch, mask: put(batch, mask, shift_bits(a(batch), amount))
    b = build.source(ins.operands[2], U32)

    def run(batch, mask):
        x, amount = a(batch), b(batch)
        kind = x.dtype.type
        beyond = np.where(x < 0, kind(-1), kind(0)) if arithmetic else kind(0)
        shifted = shift_bits(x, (amount & np.uint32(t.bits - 1)).astype(x.dtype))
        put(batch, mask, np.where(amount >= t.bits, beyond, shifted))

    return run


@instruction("shf")
def funnel_shift(build, ins):
    left, wrap = ins.parts[1] == "l", build.has("wrap")

    def compute(a, b, c):
        amount = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = (np.asarray(b).astype(np.uint64) << np.uint64(32)) | a
        if left:
            return ((both << amount) >> np.uint64(32)).astype(np.uint32)
        return (both >> amount).astype(np.uint32)

    return build.elementwise(compute, B32, 3)


_PRMT_MODES = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


@instruction("prmt")
def prmt(build, ins):
    """Each nibble of c picks a byte of b:a, or with its top bit set the byte's sign spread over 8 bits."""
    a, b, c = (build.source(text, B32) for text in ins.operands[1:4])
    put = build.destination(ins.operands[0], B32)
    mode = build.one_of(_PRMT_MODES)
    table = np.array(_PRMT_MODES[mode], np.uint32) if mode else None

    def run(batch, mask):
        selectors = c(batch)
        if table is not None:
            selectors = table[selectors & np.uint32(3)]
        both = (np.asarray(b(batch)).astype(np.uint64) << np.uint64(32)) | a(batch)
        result = np.uint32(0)
        for position in range(4):
            selector = (selectors >> np.uint32(4 * position)) & np.uint32(15)
            amount = (selector & np.uint32(7)).astype(np.uint64) << np.uint64(3)
            byte = ((both >> amount) & np.uint64(0xFF)).astype(np.uint32)
            if np.ndim(selector) or int(selector) & 8:
                sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
                byte = np.where(selector & np.uint32(8), sign, byte)
            result = result | (byte << np.uint32(8 * position))
        put(batch, mask, result)

    return run


def _low_ones(count):
    """uint64 with the ``count`` lowest bits set; count may be 64 or more."""
    full = count >= 64
    return np.where(full, ALL, (ONE << np.where(full, ZERO, count)) - ONE)


@instruction("bfe")
def bfe(build, ins):
    """Bit field of ``length`` bits at ``position``; bits beyond the register are 0, or the field's sign if signed."""
    t = build.types()[-1]
    bits = np.uint64(t.bits)

    def compute(a, position, length):
        position = np.minimum(position & np.uint32(255), np.uint32(t.bits)).astype(np.uint64)
        length = np.minimum(length & np.uint32(255), np.uint32(t.bits)).astype(np.uint64)
        value = np.asarray(a).astype(np.int64).view(np.uint64) if t.is_signed else np.asarray(a).astype(np.uint64)
        if t.bits == 32:
            value = value & np.uint64(0xFFFFFFFF)
        field = np.where(position >= 64, ZERO, value >> np.minimum(position, np.uint64(63))) & _low_ones(length)
        if t.is_signed:
            sign_position = np.minimum(position + length - ONE, bits - ONE)
            negative = (length != 0) & (((value >> sign_position) & ONE) == 1)
            inside = np.minimum(length, np.where(position >= bits, ZERO, bits - position))
            field = np.where(negative, field | ~_low_ones(inside), field)
        return field.astype(UNSIGNED[t.bits]).view(t.dtype)

    return build.elementwise(compute, t, 3, t, [t, U32, U32])


@instruction("bfi")
def bfi(build, ins):
    t = build.types()[-1]

    def compute(a, b, position, length):
        position = (position & np.uint32(255)).astype(np.uint64)
        length = (length & np.uint32(255)).astype(np.uint64)
        amount = np.minimum(position, np.uint64(63))
        field = np.where(position >= t.bits, ZERO, _low_ones(length) << amount)
        inserted = np.where(position >= 64, ZERO, np.asarray(a).astype(np.uint64) << amount)
        return ((np.asarray(b).astype(np.uint64) & ~field) | (inserted & field)).astype(UNSIGNED[t.bits])

    return build.elementwise(compute, t, 4, t, [t, t, U32, U32])


@instruction("bfind")
def bfind(build, ins):
    t, as_shift = build.types()[-1], build.has("shiftamt")

    def compute(a):
        x = np.asarray(a)
        if t.is_signed:
            x = np.where(x < 0, ~x, x).view(UNSIGNED[t.bits])
        zeros = count_leading_zeros(x, t.bits)
        return np.where(x == 0, np.uint32(0xFFFFFFFF), zeros if as_shift else np.uint32(t.bits - 1) - zeros)

    return build.elementwise(compute, t, 1, U32)


@instruction("clz")
def clz(build, ins):
    t = build.types()[-1]
    return build.elementwise(lambda a: count_leading_zeros(np.asarray(a), t.bits), t, 1, U32)


@instruction("popc")
def popc(build, ins):
    return build.elementwise(lambda a: np.bitwise_count(a).astype(np.uint32), build.types()[-1], 1, U32)


@instruction("brev")
def brev(build, ins):
    t = build.types()[-1]
    swaps = ((1, 0x5555555555555555), (2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F))

    def compute(a):
        x = np.asarray(a)
        for distance, pattern in swaps:
            keep, amount = t.dtype(pattern & ((1 << t.bits) - 1)), t.dtype(distance)
            x = ((x >> amount) & keep) | ((x & keep) << amount)
        return x.byteswap()

    return build.elementwise(compute, t, 1)


@instruction("bmsk")
def bmsk(build, ins):
    clamp = build.has("clamp")

    def compute(a, b):
        position, length = a.astype(np.uint64), b.astype(np.uint64)
        if clamp:
            position, length = np.minimum(position, np.uint64(32)), np.minimum(length, np.uint64(32))
        else:
            position, length = position & np.uint64(31), length & np.uint64(31)
        return ((((ONE << length) - ONE) << position) & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    return build.elementwise(compute, B32, 2)
