"""Moves and conversions (PTX ISA 9.7.9: mov, cvt, cvta, isspacep)."""

import numpy as np

from ..address_space import LOCAL_BASE, SHARED_BASE, in_global_window, in_window
from ..compiler import instruction
from ..numerics import (
    ROUND_TO_INTEGER,
    bf16_to_f32,
    f32_to_bf16,
    float_to_int,
    flush_subnormals,
    narrow,
    odd_sum,
    relu,
    round_to_tf32,
    saturate,
)
from ..ptx_types import B32, PRED, TYPES, U64, UNSIGNED, untyped

_ROUNDINGS = ("rni", "rzi", "rmi", "rpi", "rn", "rz", "rm", "rp", "rna")


@instruction("mov")
def mov(build, ins):
    t = untyped(build.types()[-1])
    destination, source = ins.operands
    if destination.startswith("{"):
        return _unpack(build, t, build.names(destination), source)
    put = build.destination(destination, t)
    if source.startswith("{"):
        names = build.names(source)
        gather, dtype = build.register_file(names, TYPES[f"b{t.bits // len(names)}"]), UNSIGNED[t.bits]
        return lambda batch, mask: put(batch, mask, gather(batch).view(dtype).ravel())
    read = build.predicate(source) if t.kind == "p" else build.source(source, t)
    return lambda batch, mask: put(batch, mask, read(batch))


def _unpack(build, t, names, source):
    part = TYPES[f"b{t.bits // len(names)}"]
    read, count, dtype = build.all_lanes(source, t), len(names), UNSIGNED[part.bits]
    puts = [(column, build.destination(name, part)) for column, name in enumerate(names) if name != "_"]

    def run(batch, mask):
        parts = np.ascontiguousarray(read(batch)).view(dtype).reshape(-1, count)
        for column, put in puts:
            put(batch, mask, np.ascontiguousarray(parts[:, column]))

    return run


@instruction("cvta")
def cvta(build, ins):
    """Between a generic address and one within a space: global addresses are the same in both."""
    t, to_space = untyped(build.types()[-1]), build.has("to")
    read, put = build.source(ins.operands[1], t), build.destination(ins.operands[0], t)
    base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(build.space())
    if base is None:
        return lambda batch, mask: put(batch, mask, read(batch))
    base = np.uint64(base)
    if to_space:
        return lambda batch, mask: put(batch, mask, read(batch) - base)
    return lambda batch, mask: put(batch, mask, read(batch) + base)


@instruction("isspacep")
def isspacep(build, ins):
    read, put = build.source(ins.operands[1], U64), build.destination(ins.operands[0], PRED)
    base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(build.space())
    if base is None:
        return lambda batch, mask: put(batch, mask, in_global_window(read(batch)))
    return lambda batch, mask: put(batch, mask, in_window(read(batch), base))


@instruction("cvt")
def cvt(build, ins):
    types = build.types()
    if build.has("pack"):
        return _pack_integers(build, ins, types[0], types[1])
    to, source = types[0], types[1]
    rounding = build.one_of(_ROUNDINGS)
    if to.packed:
        if len(ins.operands) != 3 or build.has("satfinite"):
            raise build.unsupported()
        return _pack_floats(build, ins, to, source, rounding)
    if to.is_float:
        convert = _to_float(build, to, source, rounding)
    elif source.is_float:
        convert = _float_to_int(build, to, source, rounding)
    else:
        convert = _int_to_int(build, to, source)
    read, put = build.source(ins.operands[1], source), build.destination(ins.operands[0], to)
    return lambda batch, mask: put(batch, mask, convert(np.asarray(read(batch))))


def _pack_integers(build, ins, to, source):
    """cvt.pack.sat d, a, b, c: a and b saturated into d, above as much of c as still fits."""
    low, high = to.limits
    a, b = (build.source(text, source) for text in ins.operands[1:3])
    put = build.destination(ins.operands[0], B32)
    c = build.source(ins.operands[3], B32) if len(ins.operands) > 3 else None

    def saturated(x):
        return np.clip(x, low, high).astype(to.dtype).view(UNSIGNED[to.bits]).astype(np.uint32)

    def run(batch, mask):
        packed = (saturated(a(batch)) << np.uint32(to.bits)) | saturated(b(batch))
        if c is not None and to.bits < 16:
            packed = packed | (c(batch) << np.uint32(2 * to.bits))
        put(batch, mask, packed)

    return run


def _pack_floats(build, ins, to, source, rounding):
    """cvt.rn.f16x2.f32 d, a, b: a into the high half, b into the low half."""
    if to.name not in ("f16x2", "bf16x2"):
        raise build.unsupported()
    high, low = (build.all_lanes(text, source) for text in ins.operands[1:3])
    put, clamp = build.destination(ins.operands[0], untyped(to)), build.has("relu")

    def half(x):
        if clamp:
            x = relu(x)
        if to.name == "f16x2":
            return narrow(x.astype(np.float64), np.float16, rounding).view(np.uint16)
        return f32_to_bf16(x, rounding)

    def run(batch, mask):
        halves = np.stack([half(low(batch)), half(high(batch))], 1)
        put(batch, mask, halves.view(np.uint32).ravel())

    return run


def _int_to_int(build, to, source):
    if not build.has("sat"):
        return lambda x: x.astype(to.dtype)
    low, high = max(to.limits[0], source.limits[0]), min(to.limits[1], source.limits[1])
    return lambda x: np.clip(x, source.dtype(low), source.dtype(high)).astype(to.dtype)


def _float_to_int(build, to, source, rounding):
    flush = build.has("ftz") and source.name == "f32"
    rounding = rounding or "rzi"
    return lambda x: float_to_int(flush_subnormals(x) if flush else x, to, rounding)


def _to_float(build, to, source, rounding):
    """Function to a float type. It may stay wider where the destination's encoder does the one rounding."""
    steps = []
    if build.has("ftz") and source.name == "f32":
        steps.append(flush_subnormals)
    if rounding in ROUND_TO_INTEGER:
        steps.append(ROUND_TO_INTEGER[rounding])
    mode = rounding if rounding in ("rn", "rz", "rm", "rp", "rna") else "rn"
    if not source.is_float and source.bits == 64:
        if to.bits == 64 or (to.name == "f32" and mode == "rn"):
            if mode != "rn":
                raise build.unsupported()
            return lambda x: x.astype(to.dtype)  # numpy rounds 64-bit integers once
        steps.append(_int64_to_f64_odd)
    if build.has("relu"):
        steps.append(relu)
    if build.has("sat"):
        steps.append(saturate)
    steps.append(_rounding_step(to, source, mode, flush=build.has("ftz") and to.name == "f32"))

    def convert(x):
        for step in steps:
            x = step(x)
        return x

    return convert


def _int64_to_f64_odd(x):
    """64-bit integers -> float64 rounded to odd, from two parts that float64 holds exactly."""
    twelve = x.dtype.type(12)
    high = (x >> twelve) << twelve
    return odd_sum(high.astype(np.float64), (x - high).astype(np.float64))


def _rounding_step(to, source, mode, flush):
    if to.name == "tf32":
        return lambda x: round_to_tf32(x, mode)
    if to.name == "bf16":
        if mode == "rn":
            return lambda x: x if source.is_float else x.astype(np.float64)
        return lambda x: bf16_to_f32(f32_to_bf16(x.astype(np.float32), mode))
    if to.name == "f64":
        return lambda x: x.astype(np.float64)

    def round_once(x):
        y = narrow(x.astype(np.float64), to.dtype, mode)
        return flush_subnormals(y) if flush else y

    return round_once
