"""Floating-point instructions of the emulator against exact rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_kernels import bf16_bits, bf16_values, elementwise_module, run_elementwise

# precision, smallest and largest exponent
F32, F16, BF16 = (24, -126, 127), (11, -14, 15), (8, -126, 127)


def rounded(x, fmt, rounding="rn"):
    """Fraction -> the value of the format that one rounding gives."""
    precision, smallest, largest = fmt
    if x == 0:
        return 0.0
    sign, magnitude = (-1, -x) if x < 0 else (1, x)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    units, rest = divmod(magnitude, quantum)
    rest /= quantum
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and units % 2 == 1),
        "rz": False,
        "rm": sign < 0 and rest > 0,
        "rp": sign > 0 and rest > 0,
    }[rounding]
    value = (units + up) * quantum
    if value >= Fraction(2) ** (largest + 1):
        to_infinity = rounding == "rn" or rounding == ("rp" if sign > 0 else "rm")
        return sign * (np.inf if to_infinity else float((2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** largest))
    return sign * float(value)


def hard_floats(random, count, fmt):
    """Values of a format with clustered exponents and few or patterned bits: near ties and cancellations."""
    precision, smallest, largest = fmt
    bits = precision - 1
    patterns = [
        0,
        1,
        (1 << bits) - 1,
        1 << bits - 1,
        *random.integers(0, 8, 3),
        *(random.integers(0, 8, 3) << bits - 3),
    ]
    mantissa = np.where(
        random.random(count) < 0.3, random.integers(0, 1 << bits, count), random.choice(patterns, count)
    )
    spread = random.integers(-precision - 4, precision + 5, count)
    exponent = random.choice([0, 0, 1, -1, smallest], count)
    exponent = np.where(random.random(count) < 0.5, spread, exponent)
    exponent = np.where(random.random(count) < 0.2, random.integers(smallest, largest + 1, count), exponent)
    value = (1 + mantissa / 2.0**bits) * 2.0 ** np.clip(exponent, smallest, largest)
    subnormal = mantissa * 2.0 ** (smallest - bits)
    return np.where(random.random(count) < 0.05, subnormal, value) * random.choice([-1, 1], count)


def encode(values, fmt):
    if fmt == F32:
        return values.astype(np.float32)
    return values.astype(np.float16).view(np.uint16) if fmt == F16 else bf16_bits(values)


def decode(raw, fmt):
    if fmt == F32:
        return raw.astype(np.float64)
    return (raw.view(np.float16) if fmt == F16 else bf16_values(raw)).astype(np.float64)


EXACT = {
    "fma": lambda a, b, c: a * b + c,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b if b else None,
    "cvt": lambda a: a,
}
FORMAT_OF = {"f32": F32, "f16": F16, "bf16": BF16}
STORED = {"f32": "f32", "f16": "b16", "bf16": "b16"}


def rounding_cases():
    """name -> (stored result, stored sources, PTX, operation, rounding, result format, source format)."""
    forms = [f"fma.{mode}.f32" for mode in ("rn", "rz", "rm", "rp")]
    forms += ["add.rn.f32", "add.rz.f32", "sub.f32", "mul.f32", "mul.rp.f32", "div.rn.f32"]
    forms += ["fma.rn.f16", "add.f16", "mul.f16", "fma.rn.bf16", "cvt.rn.f16.f32", "cvt.rz.f16.f32"]
    forms += ["cvt.rn.bf16.f32", "cvt.rz.bf16.f32"]
    cases = {}
    for form in forms:
        operation, *rest = form.split(".")
        types = [part for part in rest if part in FORMAT_OF]
        rounding = rest[0] if rest[0] in ("rn", "rz", "rm", "rp") else "rn"
        operands = EXACT[operation].__code__.co_argcount
        registers = ", ".join("dabc"[: operands + 1])
        source = STORED[types[-1]]
        case = (STORED[types[0]], [source] * operands, f"{form} {registers};", operation, rounding)
        cases[form.replace(".", "_")] = (*case, FORMAT_OF[types[0]], FORMAT_OF[types[-1]])
    return cases


CASES = rounding_cases()
MODULE = elementwise_module(CASES)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_rounds_exactly_once(name, seed):
    """Quantize is compared bit for bit: one wrong last bit here is a false alarm, or hides a true one."""
    result, sources, _, operation, rounding, result_format, source_format = CASES[name]
    random = np.random.default_rng(seed)
    operands = [hard_floats(random, 512, source_format) for _ in sources]
    if len(operands) == 3:
        operands[2][::3] = -operands[0][::3] * operands[1][::3] * random.choice([1, 1 + 2.0**-10])
    with np.errstate(over="ignore"):
        raw = [encode(values, source_format) for values in operands]
    got = decode(run_elementwise(MODULE, name, result, *raw), result_format)
    for lane, values in enumerate(zip(*(decode(r, source_format).tolist() for r in raw), strict=True)):
        if not np.isfinite(values).all():
            continue
        exact = EXACT[operation](*map(Fraction, values))
        if exact is not None:
            assert got[lane] == rounded(exact, result_format, rounding), (name, values)


CONVERSIONS = {
    "to_bf16": ("b16", ["f32"], "cvt.rn.bf16.f32 d, a;"),
    "to_f16": ("b16", ["f32"], "cvt.rn.f16.f32 d, a;"),
    "pack_bf16": ("u32", ["f32", "f32"], "cvt.rn.bf16x2.f32 d, a, b;"),
    "pack_f16": ("u32", ["f32", "f32"], "cvt.rn.f16x2.f32 d, a, b;"),
    "from_f16": ("f32", ["b16"], "cvt.f32.f16 d, a;"),
    "from_bf16": ("f32", ["b16"], "cvt.f32.bf16 d, a;"),
    "to_int": ("s32", ["f32"], "cvt.rni.s32.f32 d, a;"),
    "to_int_down": ("s32", ["f32"], "cvt.rmi.s32.f32 d, a;"),
    "to_unsigned": ("u32", ["f32"], "cvt.rzi.u32.f32 d, a;"),
    "to_long": ("s64", ["f32"], "cvt.rzi.s64.f32 d, a;"),
    "to_byte": ("u16", ["f32"], "cvt.rni.sat.u8.f32 d, a;"),
    "from_int": ("f32", ["s32"], "cvt.rn.f32.s32 d, a;"),
    "from_long": ("f32", ["s64"], "cvt.rn.f32.s64 d, a;"),
    "from_unsigned_down": ("f32", ["u32"], "cvt.rz.f32.u32 d, a;"),
    "to_tf32": ("u32", ["f32"], "cvt.rna.tf32.f32 d, a;"),
    "saturate": ("f32", ["f32"], "cvt.sat.f32.f32 d, a;"),
    "flush": ("f32", ["f32", "f32"], "add.ftz.f32 d, a, b;"),
    "min": ("f32", ["f32", "f32"], "min.f32 d, a, b;"),
    "min_nan": ("f32", ["f32", "f32"], "min.NaN.f32 d, a, b;"),
    "min_xorsign": ("f32", ["f32", "f32"], "min.xorsign.abs.f32 d, a, b;"),
    "max_nan_xorsign": ("f32", ["f32", "f32"], "max.NaN.xorsign.abs.f32 d, a, b;"),
    "min_abs": ("f32", ["f32", "f32", "f32"], "min.abs.f32 d, a, b, c;"),
    "not_less": ("u32", ["f32", "f32"], ".reg .pred p; setp.geu.f32 p, a, b; selp.u32 d, 1, 0, p;"),
    "test_nan": ("u32", ["f32"], ".reg .pred p; testp.notanumber.f32 p, a; selp.u32 d, 1, 0, p;"),
    "immediate": ("f32", ["f32"], "fma.rn.f32 d, a, 0f3F000000, 0fBF800000;"),
    "exp2": ("f32", ["f32"], "ex2.approx.ftz.f32 d, a;"),
    "reciprocal": ("f32", ["f32"], "rcp.approx.f32 d, a;"),
}
CONVERSION_MODULE = elementwise_module(CONVERSIONS, arch="90")

SPECIAL = np.array(
    [
        0,
        -0.0,
        np.nan,
        np.inf,
        -np.inf,
        1e-40,
        -1e-40,
        0.5,
        1.5,
        2.5,
        -0.5,
        254.5,
        255.5,
        2.0**31,
        -(2.0**31),
        2.0**63,
        1e30,
    ],
    np.float32,
)


def convert(name, *operands):
    """Any number of elements, by launches of 1024."""
    parts = [
        run_elementwise(CONVERSION_MODULE, name, CONVERSIONS[name][0], *(o[i : i + 1024] for o in operands))
        for i in range(0, len(operands[0]), 1024)
    ]
    return np.concatenate(parts)


def some_floats(seed=0):
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2**32, 3000, dtype=np.uint64).astype(np.uint32)
    ties = random.integers(0, 2**16, 1000).astype(np.uint32) << 16 | random.choice([0, 0x7FFF, 0x8000, 0x8001], 1000)
    everyday = random.normal(0, 1e5, 900).astype(np.float32)
    return np.concatenate([SPECIAL, bits.view(np.float32), ties.astype(np.uint32).view(np.float32), everyday])


def test_sixteen_bit_conversions_agree_with_torch():
    """Kernels' 16-bit outputs are compared with torch's, so both must round alike, ties and infinities included."""
    x = some_floats()
    number = ~np.isnan(x)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
        single = convert(f"to_{name}", x)
        np.testing.assert_array_equal(single[number], expected[number])
        high_and_low = convert(f"pack_{name}", x, x[::-1].copy())
        both = number & number[::-1]
        np.testing.assert_array_equal((high_and_low >> 16)[both], expected[both])
        np.testing.assert_array_equal((high_and_low & 0xFFFF)[both], expected[::-1][both])
        every = np.arange(2**16).astype(np.uint16)
        back, reference = (
            convert(f"from_{name}", every),
            torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy(),
        )
        np.testing.assert_array_equal(back[~np.isnan(reference)], reference[~np.isnan(reference)])
        assert np.isnan(back[np.isnan(reference)]).all()
    assert (convert("to_bf16", x)[~number] == 0x7FFF).all()


@np.errstate(all="ignore")
def test_conversions_to_integers_round_and_saturate():
    """Codes are computed through these: a wrap instead of a clamp is a wrong weight."""
    x = some_floats(1)
    x64 = x.astype(np.float64)
    nan = np.isnan(x)

    def clamped(values, low, high):
        return [0 if np.isnan(v) else int(min(max(v, low), high)) for v in values]

    assert convert("to_int", x).tolist() == clamped(np.rint(x64), -(2**31), 2**31 - 1)
    assert convert("to_int_down", x).tolist() == clamped(np.floor(x64), -(2**31), 2**31 - 1)
    assert convert("to_unsigned", x).tolist() == clamped(np.trunc(x64), 0, 2**32 - 1)
    assert convert("to_byte", x).tolist() == clamped(np.rint(x64), 0, 255)
    long = convert("to_long", x)
    limits = [-(2**63) if np.isnan(v) else min(max(int(v), -(2**63)), 2**63 - 1) for v in np.clip(x64, -1e30, 1e30)]
    assert long.tolist() == limits
    np.testing.assert_array_equal(convert("saturate", x), np.where(nan, 0, np.clip(x, 0, 1)))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=60))
@settings(max_examples=20, deadline=None)
def test_conversions_from_integers_round_once(values):
    """Element counts and offsets turn into floats without a double rounding."""
    long = np.array(values, np.int64)
    assert convert("from_long", long).tolist() == [rounded(Fraction(v), F32) for v in values]
    small = long.astype(np.int32)
    assert convert("from_int", small).tolist() == [rounded(Fraction(v), F32) for v in small.tolist()]
    unsigned = small.view(np.uint32)
    assert convert("from_unsigned_down", unsigned).tolist() == [
        rounded(Fraction(v), F32, "rz") for v in unsigned.tolist()
    ]


@np.errstate(all="ignore")
def test_special_values():
    """NaN, signed zeros and subnormals take the hardware's path, not numpy's."""
    x = some_floats(2)
    y = np.roll(x, 7)

    def flush(v):
        return np.where(np.abs(v) < 2.0**-126, np.copysign(0, v), v).astype(np.float32)

    np.testing.assert_array_equal(convert("flush", x, y), flush(flush(x) + flush(y)))
    np.testing.assert_array_equal(convert("min", x, y), np.fmin(x, y))
    np.testing.assert_array_equal(convert("min_nan", x, y), np.minimum(x, y))
    zeros = np.array([0.0, -0.0], np.float32)
    assert np.signbit(convert("min", zeros, zeros[::-1].copy())).all()
    np.testing.assert_array_equal(convert("min_abs", x, y, y[::-1].copy()), np.fmin.reduce(np.abs([x, y, y[::-1]])))
    np.testing.assert_array_equal(convert("not_less", x, y), ~(x < y))
    np.testing.assert_array_equal(convert("test_nan", x), np.isnan(x))
    np.testing.assert_array_equal(convert("immediate", x), (x.astype(np.float64) * 0.5 - 1).astype(np.float32))
    finite = np.isfinite(x)
    bits = x.view(np.uint32)
    np.testing.assert_array_equal(convert("to_tf32", x)[finite], ((bits + 0x1000) & 0xFFFFE000)[finite])


@pytest.mark.parametrize(("name", "choose"), [("min_xorsign", np.fmin), ("max_nan_xorsign", np.maximum)])
def test_min_and_max_with_the_signs_product(name, choose):
    """What LLVM clamps to +-limit with from sm_86 on: a NaN's sign counts where the other operand is chosen."""
    x = np.concatenate([some_floats(4), np.copysign(SPECIAL, -SPECIAL)])
    y = np.roll(x, 5)
    expected = choose(np.abs(x), np.abs(y))
    actual, number = convert(name, x, y), ~np.isnan(expected)
    np.testing.assert_array_equal(np.abs(actual), expected)
    np.testing.assert_array_equal(np.signbit(actual)[number], (np.signbit(x) ^ np.signbit(y))[number])
    assert (np.isnan(x) & np.signbit(x) & number).any() == (choose is np.fmin)


def test_approximate_instructions_can_be_perturbed():
    """approx_ulp shows whether a kernel depends on the last bits of an approximation that chips do differently."""
    x = np.random.default_rng(3).normal(0, 3, 256).astype(np.float32)
    exact = convert("exp2", x)
    np.testing.assert_allclose(exact, np.exp2(x.astype(np.float64)), rtol=1e-7)
    moved = np.zeros_like(x)
    CONVERSION_MODULE.launch("exp2", 1, 256, [x, moved], approx_ulp=2)
    steps = moved.view(np.int32) - exact.view(np.int32)
    assert set(steps.tolist()) == {-2, -1, 0, 1, 2}
    np.testing.assert_allclose(convert("reciprocal", x), 1 / x.astype(np.float64), rtol=1e-7)
