"""Arithmetic as the hardware rounds it, on numpy arrays: one rounding per instruction, in the instruction's mode.

float64 holds every product of two float32 exactly; where a sum does not fit, it is rounded *to odd*, after which a
second rounding to a narrower type gives what a single rounding would (Boldo and Melquiond, "Emulation of FMA and
correctly rounded sums", IEEE Transactions on Computers 57(4), 2008).
"""

import numpy as np

from .errors import UnsupportedInstruction

_F32_TINY = np.float32(2.0**-126)  # smallest normal


def bf16_to_f32(bits):
    """bf16 bits -> float32 array."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f64_to_f32_odd(x):
    """float64 -> float32, rounded to odd, so that a later narrower rounding is a single rounding."""
    y = x.astype(np.float32)
    inexact = (y.astype(np.float64) != x) & np.isfinite(x)
    if inexact.any():
        bits = y.view(np.uint32)
        away = inexact & (np.abs(y.astype(np.float64)) > np.abs(x))
        bits = np.where(away, bits - np.uint32(1), bits)
        y = np.where(inexact, bits | np.uint32(1), bits).astype(np.uint32).view(np.float32)
    return y


def f32_to_bf16(x, rounding="rn"):
    """Float array (float32 or float64) -> bf16 bits; NaN becomes the canonical 0x7fff."""
    if x.dtype == np.float64:
        x = f64_to_f32_odd(x)
    elif x.dtype != np.float32:
        x = x.astype(np.float32)
    bits = x.view(np.uint32)
    sixteen = np.uint32(16)
    if rounding == "rz":
        rounded = bits >> sixteen
    elif rounding == "rna":
        rounded = (bits + np.uint32(0x8000)) >> sixteen
    elif rounding == "rn":
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> sixteen) & np.uint32(1))) >> sixteen
    else:
        raise UnsupportedInstruction(f"rounding .{rounding} to bf16")
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def odd_sum(p, c):
    """p + c in float64, rounded to odd: exact enough for one later rounding to at most 51 bits."""
    total = p + c
    c_part = total - p
    error = (p - (total - c_part)) + (c - c_part)  # Knuth's two-sum
    inexact = (error != 0) & np.isfinite(total)
    if inexact.any():
        even = (total.view(np.uint64) & np.uint64(1)) == 0
        towards = np.where(error > 0, np.inf, -np.inf)
        total = np.where(inexact & even, np.nextafter(total, towards), total)
    return total


def narrow(x, dtype, rounding):
    """float64 (exact or rounded to odd) -> float32 or float16 in the given rounding mode."""
    y = x.astype(dtype)
    if rounding in ("rn", None):
        return y
    y64 = y.astype(np.float64)
    if rounding == "rz":
        wrong, towards = np.abs(y64) > np.abs(x), dtype(0)
    elif rounding == "rm":
        wrong, towards = y64 > x, dtype(-np.inf)
    elif rounding == "rp":
        wrong, towards = y64 < x, dtype(np.inf)
    else:
        raise UnsupportedInstruction(f"rounding mode .{rounding}")
    return np.where(wrong, np.nextafter(y, towards), y)


def fma_f32(a, b, c):
    product = a.astype(np.float64) * b
    total = product + c
    # Rounding twice is wrong only where the float64 sum lies halfway between two float32: its low bits are then zero.
    if ((total.view(np.uint64) & np.uint64(0x0FFFFFFF)) == 0).any():
        total = odd_sum(product, c.astype(np.float64))
    return total.astype(np.float32)


def fma_bf16(a, b, c):
    """Left in float64: the encoder rounds once to bf16."""
    return odd_sum(a.astype(np.float64) * b, c.astype(np.float64))


def fma_f16(a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float16)


def fma_f64(a, b, c):
    """Through 80-bit long double: may round twice."""
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


FMA = {
    "f32": fma_f32,
    "f64": fma_f64,
    "f16": fma_f16,
    "f16x2": fma_f16,
    "bf16": fma_bf16,
    "bf16x2": fma_bf16,
}


def flush_subnormals(x):
    """.ftz on float32: subnormals become zeros of their sign."""
    return np.where(np.abs(x) < _F32_TINY, np.copysign(np.float32(0), x), x)


def saturate(x):
    """.sat: clamp to [0, 1], NaN becomes 0."""
    kind = x.dtype.type
    return np.where(np.isnan(x), kind(0), np.clip(x, kind(0), kind(1)))


def relu(x):
    """.relu: negative values and -0 become 0, NaN stays."""
    return np.where((x > 0) | np.isnan(x), x, x.dtype.type(0))


def float_min_max(is_max, propagate_nan):
    """min/max of floats: -0 < +0; NaN is ignored unless .NaN propagates it (PTX ISA 9.7.3, min and max)."""
    choose = {
        (True, True): np.maximum,
        (False, True): np.minimum,
        (True, False): np.fmax,
        (False, False): np.fmin,
    }[is_max, propagate_nan]
    both_or_either = np.logical_and if is_max else np.logical_or

    def min_max(a, b):
        result = choose(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            negative = both_or_either(np.signbit(a), np.signbit(b))
            kind = result.dtype.type
            result = np.where(zeros, np.where(negative, kind(-0.0), kind(0.0)), result)
        return result

    return min_max


ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_int(x, t, rounding):
    """cvt from float to the integer type t: saturates; NaN is 0, or the top bit for 64-bit types (PTX ISA, cvt)."""
    rounded = ROUND_TO_INTEGER[rounding](x.astype(np.float64))
    low, high = t.limits
    nan = np.isnan(rounded)
    rounded = np.where(nan, 0.0, rounded)
    if t.bits < 64:
        return np.clip(rounded, low, high).astype(np.int64).astype(t.dtype)
    # float64 cannot hold the largest 64-bit integers, so saturated values are put in afterwards.
    above, below = rounded >= float(high), rounded <= float(low)
    values = np.where(above | below, 0.0, rounded).astype(t.dtype)
    values = np.where(above, t.dtype(high), np.where(below, t.dtype(low), values))
    return np.where(nan, t.dtype(-(1 << 63)) if t.is_signed else t.dtype(1 << 63), values)


def round_to_tf32(x, rounding):
    """float32 -> float32 with the 13 low bits zero; ties away from zero (.rna) or to even (.rn), or truncated."""
    bits = x.view(np.uint32)
    if rounding == "rna":
        bits = bits + np.uint32(0x1000)
    elif rounding == "rn":
        bits = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), bits & np.uint32(0xFFFFE000)).view(np.float32)


def multiply_high_64(a, b, signed):
    """Upper 64 bits of the 128-bit product, by 32-bit halves."""
    low_half, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    ua, ub = a.astype(np.uint64), b.astype(np.uint64)
    a0, a1, b0, b1 = ua & low_half, ua >> shift, ub & low_half, ub >> shift
    middle = a1 * b0 + ((a0 * b0) >> shift)
    other_middle = (middle & low_half) + a0 * b1
    high = a1 * b1 + (middle >> shift) + (other_middle >> shift)
    if signed:
        zero = np.uint64(0)
        high = high - np.where(a.astype(np.int64) < 0, ub, zero) - np.where(b.astype(np.int64) < 0, ua, zero)
    return high


def divide_truncating(a, b, signed):
    """Return (quotient, remainder) rounded towards zero. Division by zero gives all ones and a, as on hardware."""
    by_zero = b == 0
    divisor = np.where(by_zero, b.dtype.type(1), b)
    quotient = a // divisor
    if signed:
        floored = (quotient * divisor != a) & ((a < 0) != (divisor < 0))
        quotient = np.where(floored, quotient + 1, quotient).astype(a.dtype)
    all_ones = np.array(-1).astype(a.dtype)
    return np.where(by_zero, all_ones, quotient), np.where(by_zero, a, a - quotient * divisor)


def count_leading_zeros(x, bits):
    """Per element, by halving; gives ``bits`` for zero."""
    x = x.astype(np.uint64)
    count = np.zeros(x.shape, np.uint32)
    for step in (32, 16, 8, 4, 2, 1):
        if step >= bits:
            continue
        top_is_zero = ((x >> np.uint64(bits - step)) & np.uint64((1 << step) - 1)) == 0
        count += np.where(top_is_zero, np.uint32(step), np.uint32(0))
        x = np.where(top_is_zero, x << np.uint64(step), x)
        if bits < 64:
            x &= np.uint64((1 << bits) - 1)
    return count + (((x >> np.uint64(bits - 1)) & np.uint64(1)) == 0).astype(np.uint32)
