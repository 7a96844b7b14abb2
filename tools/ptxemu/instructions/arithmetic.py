"""Integer and floating-point arithmetic (PTX ISA 9.7.1 to 9.7.5)."""

import functools

import numpy as np

from ..compiler import instruction
from ..numerics import FMA, divide_truncating, float_min_max, multiply_high_64, narrow, odd_sum
from ..ptx_types import S32, TYPES, U32


@instruction("add", "sub", "addc", "subc")
def add(build, ins):
    t, subtract = build.types()[-1], ins.parts[0].startswith("sub")
    if not t.is_float:
        if build.has("cc") or ins.parts[0] in ("addc", "subc"):
            return _add_with_carry(build, ins, t, subtract)
        if build.has("sat"):
            return _add_saturating(build, t, subtract)
    elif build.rounding() != "rn":
        return _add_rounded(build, t, subtract)
    elif len(build.types()) > 1:
        raise build.unsupported()  # mixed types of sm_100
    return build.elementwise(np.subtract if subtract else np.add, t, 2)


def _add_with_carry(build, ins, t, subtract):
    t = TYPES[f"u{t.bits}"]
    a, b = (build.all_lanes(text, t) for text in ins.operands[1:3])
    put = build.destination(ins.operands[0], t)
    reads_carry, writes_carry, unsigned = ins.parts[0] in ("addc", "subc"), build.has("cc"), t.dtype

    def run(batch, mask):
        x, y = a(batch), b(batch)
        carry = batch.carry.astype(unsigned) if reads_carry else unsigned(0)
        if subtract:
            partial = x - y
            result = partial - carry
            carry_out = (x < y) | (partial < carry)
        else:
            partial = x + y
            result = partial + carry
            carry_out = (partial < x) | (result < partial)
        if writes_carry:
            batch.carry = carry_out if mask is None else np.where(mask, carry_out, batch.carry)
        put(batch, mask, result)

    return run


def _add_saturating(build, t, subtract):
    low, high = S32.limits

    def saturated(a, b):
        wide = a.astype(np.int64) - b if subtract else a.astype(np.int64) + b
        return np.clip(wide, low, high).astype(np.int32)

    return build.elementwise(saturated, t, 2)


def _add_rounded(build, t, subtract):
    if t.name != "f32":
        raise build.unsupported()
    rounding = build.rounding()

    def rounded(a, b):
        addend = -b.astype(np.float64) if subtract else b.astype(np.float64)
        return narrow(odd_sum(a.astype(np.float64), addend), np.float32, rounding)

    return build.elementwise(rounded, t, 2)


@instruction("mul")
def mul(build, ins):
    t = build.types()[-1]
    if not t.is_float:
        return _integer_multiply(build, t, add=False)
    rounding = build.rounding()
    if rounding == "rn":
        return build.elementwise(np.multiply, t, 2)
    return build.elementwise(lambda a, b: narrow(a.astype(np.float64) * b, np.float32, rounding), t, 2)


@instruction("mad", "fma")
def fma(build, ins):
    t = build.types()[-1]
    if not t.is_float:
        if build.has("cc"):
            raise build.unsupported()
        return _integer_multiply(build, t, add=True)
    rounding = build.rounding()
    if rounding == "rn":
        return build.elementwise(FMA[t.name], t, 3)
    if t.name != "f32":
        raise build.unsupported()

    def rounded(a, b, c):
        return narrow(odd_sum(a.astype(np.float64) * b, c.astype(np.float64)), np.float32, rounding)

    return build.elementwise(rounded, t, 3)


def _integer_multiply(build, t, add):
    """mul and mad of integers: .wide, .hi or .lo."""
    wide_bits = {16: 32, 32: 64}.get(t.bits)
    wide = TYPES[f"{'s' if t.is_signed else 'u'}{wide_bits}"] if wide_bits else None
    if build.has("wide"):
        w = wide.dtype
        if add:
            return build.elementwise(lambda a, b, c: a.astype(w) * b.astype(w) + c, t, 3, wide, [t, t, wide])
        return build.elementwise(lambda a, b: a.astype(w) * b.astype(w), t, 2, wide)
    if build.has("hi"):
        if wide is None:

            def product(a, b):
                return multiply_high_64(a, b, t.is_signed).astype(t.dtype)

        else:
            w = wide.dtype

            def product(a, b):
                return ((a.astype(w) * b.astype(w)) >> w(t.bits)).astype(t.dtype)

    else:
        product = np.multiply
    if add:
        return build.elementwise(lambda a, b, c: product(a, b) + c, t, 3)
    return build.elementwise(product, t, 2)


@instruction("div", "rem")
def div(build, ins):
    t = build.types()[-1]
    if t.is_float:
        if build.rounding() != "rn" or ins.parts[0] == "rem":
            raise build.unsupported()
        if build.has("approx") or build.has("full"):
            return _approximate(build, np.divide, t, 2)
        return build.elementwise(np.divide, t, 2)
    which = 0 if ins.parts[0] == "div" else 1
    return build.elementwise(lambda a, b: divide_truncating(np.asarray(a), np.asarray(b), t.is_signed)[which], t, 2)


def _approximate(build, compute, t, count):
    """An instruction whose hardware result may be off: option approx_ulp moves each result by as many random ulp."""
    generator = np.random.default_rng(1)
    perturbation = 0

    def perturbed(*arguments):
        result = compute(*arguments)
        if perturbation and t.name in ("f32", "f64"):
            steps = generator.integers(-perturbation, perturbation + 1, result.shape)
            kind = result.dtype.type
            for _ in range(perturbation):
                towards = np.where(steps > 0, kind(np.inf), kind(-np.inf))
                result = np.where(steps == 0, result, np.nextafter(result, towards))
                steps -= np.sign(steps)
        return result

    inner = build.elementwise(perturbed, t, count)

    def run(batch, mask):
        nonlocal perturbation
        perturbation = batch.options.approx_ulp
        inner(batch, mask)

    return run


_UNARY = {
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(*_UNARY)
def unary(build, ins):
    """Computed in float64 and rounded: right for .rn; hardware's .approx differs by an ulp or two."""
    t, function = build.types()[-1], _UNARY[ins.parts[0]]
    if build.rounding() != "rn":
        raise build.unsupported()

    def compute(x):
        return function(x.astype(np.float64)).astype(x.dtype)

    return _approximate(build, compute, t, 1) if build.has("approx") else build.elementwise(compute, t, 1)


@instruction("neg")
def neg(build, ins):
    t = build.types()[-1]
    if t.is_float:
        return build.elementwise(np.negative, t, 1)
    return build.elementwise(lambda a: np.asarray(a).dtype.type(0) - a, t, 1)


@instruction("abs")
def absolute(build, ins):
    return build.elementwise(np.abs, build.types()[-1], 1)


@instruction("min", "max")
def min_max(build, ins):
    t, is_max = build.types()[-1], ins.parts[0] == "max"
    if build.has("relu") and not t.is_float:
        raise build.unsupported()
    integers = np.maximum if is_max else np.minimum
    choose = float_min_max(is_max, build.has("NaN")) if t.is_float else integers
    magnitudes, xorsign = build.has("abs"), build.has("xorsign")

    def run(*values):
        chosen = functools.reduce(choose, map(np.abs, values) if magnitudes else values)
        if not xorsign:
            return chosen
        negative = np.signbit(values[0]) ^ np.signbit(values[1])  # also of a NaN that was not chosen
        return np.where(negative & ~np.isnan(chosen), -chosen, chosen)

    return build.elementwise(run, t, len(ins.operands) - 1)


@instruction("copysign")
def copysign(build, ins):
    return build.elementwise(lambda a, b: np.copysign(b, a), build.types()[-1], 2)


@instruction("testp")
def testp(build, ins):
    t = build.types()[-1]
    tiny = np.finfo(t.dtype).tiny
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }[ins.parts[1]]
    return build.elementwise(test, t, 1, TYPES["pred"])


@instruction("sad")
def sad(build, ins):
    return build.elementwise(lambda a, b, c: c + np.where(a > b, a - b, b - a), build.types()[-1], 3)


@instruction("dp4a")
def dp4a(build, ins):
    bytes_a, bytes_b = (np.int8 if t.is_signed else np.uint8 for t in build.types()[:2])
    a, b = (build.all_lanes(text, U32) for text in ins.operands[1:3])
    c, put = build.source(ins.operands[3], S32), build.destination(ins.operands[0], S32)

    def run(batch, mask):
        x = a(batch).copy().view(bytes_a).reshape(-1, 4).astype(np.int32)
        y = b(batch).copy().view(bytes_b).reshape(-1, 4).astype(np.int32)
        put(batch, mask, (x * y).sum(1, dtype=np.int32) + c(batch))

    return run
