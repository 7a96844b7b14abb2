"""Loads, stores, atomics and asynchronous copies (PTX ISA 9.7.9, 9.7.13 atom, red and fences)."""

import numpy as np

from ..compiler import instruction
from ..numerics import float_min_max
from ..parser import parse_constant
from ..ptx_types import SIGNED, TYPES, U32, U64, decoder, encoder


@instruction("ld", "ldu")
def load(build, ins):
    t, space, count = build.types()[-1], build.space(), build.vector_length()
    signed = SIGNED[t.bits] if t.is_signed else None  # sign-extended into a wider register
    register_type = TYPES[f"{'s' if signed else 'b'}{t.bits}"]
    puts = [build.destination(name, register_type) for name in build.names(ins.operands[0])]
    address, symbol, offset = build.address(ins.operands[1])
    if space == "param" and symbol is not None:

        def read(batch):
            return [
                batch.parameters.read(symbol, offset + k * t.bytes, t.bytes, register_type.bits)
                for k in range(len(puts))
            ]

    else:

        def read(batch):
            return batch.memory.load(ins, space, address(batch), t.bytes, count)

    def run(batch, mask):
        for put, raw in zip(puts, read(batch), strict=True):
            put(batch, mask, raw.view(signed) if signed else raw)

    return run


@instruction("st")
def store(build, ins):
    t, space = build.types()[-1], build.space()
    sources = [build.source(name, TYPES[f"b{t.bits}"]) for name in build.names(ins.operands[1])]
    address, symbol, offset = build.address(ins.operands[0])
    if space == "param":

        def run(batch, mask):
            for k, read in enumerate(sources):
                batch.parameters.write(symbol, offset + k * t.bytes, t.bytes, read(batch), mask)

    else:

        def run(batch, mask):
            batch.memory.store(ins, space, address(batch), t.bytes, [read(batch) for read in sources])

    return run


@instruction("cp")
def async_copy(build, ins):
    if ins.parts[1] != "async" or build.has("bulk") or build.has("mbarrier"):
        raise build.unsupported()
    if build.has("commit_group"):
        return lambda batch, mask: batch.copies.commit()
    if build.has("wait_group"):
        groups_left = parse_constant(ins.operands[0]).value
        return lambda batch, mask: batch.copies.wait(groups_left)
    if build.has("wait_all"):
        return lambda batch, mask: batch.copies.wait(None)
    destination, source = build.address(ins.operands[0])[0], build.address(ins.operands[1])[0]
    size = parse_constant(ins.operands[2]).value
    source_size = _source_size(build, ins, size)

    def run(batch, mask):
        wanted = None if source_size is None else np.broadcast_to(source_size(batch), (batch.lanes,))
        batch.copies.issue(ins, destination(batch), source(batch), size, wanted)

    return run


def _source_size(build, ins, size):
    """The optional operand: how many bytes to read (the rest becomes zero), an ignore predicate, or a cache policy."""
    if len(ins.operands) <= 3:
        return None
    register = build.register(ins.operands[3])
    if register is not None and register.bits == 1:
        ignore = build.predicate(ins.operands[3])
        return lambda batch: np.where(ignore(batch), np.uint32(0), np.uint32(size))
    if register is not None and register.bits == 64:
        return None
    return build.source(ins.operands[3], U32)


_ATOMIC_OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def _atomic_function(operation, t):
    """Return update(old bits, operand bits, second operand bits), which gives the new bits."""
    if operation == "cas":
        return lambda old, compared, new: np.where(old == compared, new, old)
    compute = {
        "add": np.add,
        "min": float_min_max(False, False) if t.is_float else np.minimum,
        "max": float_min_max(True, False) if t.is_float else np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "exch": lambda old, new: new,
        "inc": lambda old, limit: np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1)),
        "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1)),
    }[operation]
    decode, encode = decoder(t), encoder(t)
    return lambda old, operand, _: encode(compute(decode(old), decode(operand)))


@instruction("atom", "red")
def atomic(build, ins):
    if ins.parts[1] == "async":
        raise build.unsupported()
    t, space = build.types()[-1], build.space()
    operation = build.one_of(_ATOMIC_OPERATIONS)
    returns = ins.parts[0] == "atom"
    operands = ins.operands[1:] if returns else ins.operands
    if t.kind == "b" and operation in ("add", "min", "max"):
        t = TYPES[f"u{t.bits}"]
    raw = TYPES[f"b{t.bits}"]
    address = build.address(operands[0])[0]
    sources = [build.all_lanes(name, raw) for name in build.names(operands[1])]
    second = build.all_lanes(operands[2], raw) if operation == "cas" else None
    puts = [build.destination(name, raw) for name in build.names(ins.operands[0])] if returns else []
    update = _atomic_function(operation, t)

    def run(batch, mask):
        base = address(batch)
        for k, read in enumerate(sources):
            element = base + base.dtype.type(k * t.bytes) if k else base
            new = None if second is None else second(batch)
            old = batch.memory.atomic(ins, space, element, t.bytes, read(batch), new, update)
            if puts:
                puts[k](batch, mask, old)

    return run


@instruction(
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "griddepcontrol",
    "nanosleep",
    "setmaxnreg",
    "pmevent",
)
def no_effect(build, ins):
    """Ordering, cache and timing hints: memory here is always in order."""
    return lambda batch, mask: None


@instruction("createpolicy")
def create_policy(build, ins):
    put = build.destination(ins.operands[0], U64)
    return lambda batch, mask: put(batch, mask, np.zeros(batch.lanes, np.uint64))
