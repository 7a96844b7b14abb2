"""Comparison and selection (PTX ISA 9.7.6 and 9.7.7)."""

import numpy as np

from ..compiler import instruction
from ..numerics import flush_subnormals
from ..ptx_types import PRED, TYPES, untyped
from .bits import BOOLEAN

_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMPARISONS = (*_ORDERED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")


def _either_nan(a, b):
    return np.isnan(a) | np.isnan(b)


def _comparison(name, t):
    """Comparison by name. Of floats, those ending in u are also true where either operand is NaN."""
    if name == "nan":
        return _either_nan
    if name == "num":
        return lambda a, b: ~_either_nan(a, b)
    if not t.is_float or (name in _ORDERED and name != "ne"):
        return _ORDERED[name]
    if name == "neu":
        return np.not_equal  # numpy's is true for NaN
    if name == "ne":
        return lambda a, b: (a != b) & ~_either_nan(a, b)
    ordered = _ORDERED[name[:-1]]
    return lambda a, b: ordered(a, b) | _either_nan(a, b)


def _compared_type(t):
    return TYPES[f"u{t.bits}"] if t.kind == "b" else t


@instruction("setp")
def setp(build, ins):
    t = _compared_type(build.types()[-1])
    compare = _comparison(build.one_of(_COMPARISONS), t)
    combine = BOOLEAN.get(build.one_of(BOOLEAN))
    puts = [build.destination(name, PRED) for name in build.pair(ins.operands[0])]
    a, b = (build.source(text, t) for text in ins.operands[1:3])
    other = build.predicate(ins.operands[3]) if combine is not None else None
    flush = build.has("ftz") and t.name == "f32"

    def run(batch, mask):
        x, y = a(batch), b(batch)
        if flush:
            x, y = flush_subnormals(x), flush_subnormals(y)
        result = compare(x, y)
        if t.packed:  # one predicate per half
            results = [result[0::2].copy(), result[1::2].copy()]
        else:
            results = [result, ~result] if len(puts) > 1 else [result]
        if other is not None:
            predicate = other(batch)
            results = [combine(result, predicate) for result in results]
        for put, result in zip(puts, results, strict=False):
            put(batch, mask, result)

    return run


@instruction("set")
def set_register(build, ins):
    result_type, t = build.types()[0], _compared_type(build.types()[-1])
    compare = _comparison(build.one_of(_COMPARISONS), t)
    combine = BOOLEAN.get(build.one_of(BOOLEAN))
    a, b = (build.source(text, t) for text in ins.operands[1:3])
    put = build.destination(ins.operands[0], result_type)
    other = build.predicate(ins.operands[3]) if combine is not None else None

    def run(batch, mask):
        result = compare(a(batch), b(batch))
        if other is not None:
            predicate = other(batch)
            result = combine(result, np.repeat(predicate, 2) if t.packed else predicate)
        if result_type.is_float:
            values = result.astype(result_type.dtype)
        elif t.packed:
            values = np.where(result, np.uint16(0xFFFF), np.uint16(0)).view(np.uint32)
        else:
            all_ones = result_type.dtype(-1 if result_type.is_signed else (1 << result_type.bits) - 1)
            values = np.where(result, all_ones, result_type.dtype(0))
        put(batch, mask, values)

    return run


@instruction("selp")
def selp(build, ins):
    t = untyped(build.types()[-1])
    a, b = (build.source(text, t) for text in ins.operands[1:3])
    predicate, put = build.predicate(ins.operands[3]), build.destination(ins.operands[0], t)
    return lambda batch, mask: put(batch, mask, np.where(predicate(batch), a(batch), b(batch)))


@instruction("slct")
def slct(build, ins):
    t, selector_type = untyped(build.types()[0]), build.types()[-1]
    a, b = (build.source(text, t) for text in ins.operands[1:3])
    selector, put = build.source(ins.operands[3], selector_type), build.destination(ins.operands[0], t)
    return lambda batch, mask: put(batch, mask, np.where(selector(batch) >= 0, a(batch), b(batch)))
