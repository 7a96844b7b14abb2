"""Integer and bit instructions of the emulator against Python's integers."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_kernels import HEADER, NUMPY_TYPE, elementwise_module, elementwise_ptx, run_elementwise
from ptxemu.toolchain import run

M32, M64 = 0xFFFFFFFF, (1 << 64) - 1
LANES = 128


def signed(value, bits=32):
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def divide(a, b):
    """Towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def permute(a, b, c):
    both, result = b << 32 | a, 0
    for position in range(4):
        selector = c >> 4 * position & 15
        byte = both >> 8 * (selector & 7) & 255
        if selector & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * position
    return result


def extract(a, position, length, bits, is_signed):
    position, length = position & 255, length & 255
    sign = a >> min(position + length - 1, bits - 1) & 1 if is_signed and length else 0
    field = 0
    for i in range(bits):
        inside = i < length and position + i < bits
        field |= (a >> position + i & 1 if inside else sign) << i
    return field


def insert(a, b, position, length, bits):
    position, length = position & 255, length & 255
    for i in range(min(length, max(0, bits - position))):
        b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


def lookup(table):
    def reference(a, b, c):
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))

    return reference


def dot_product(a, b, c):
    products = (signed(a >> 8 * i & 255, 8) * signed(b >> 8 * i & 255, 8) for i in range(4))
    return sum(products) + c & M32


def sized_cases(bits):
    """Cases that exist for 32 and 64 bits."""
    word, integer, mask = f"u{bits}", f"s{bits}", (1 << bits) - 1

    def s(value):
        return signed(value, bits)

    return {
        f"bfe_u{bits}": (
            word,
            [word, "u32", "u32"],
            f"bfe.{word} d, a, b, c;",
            lambda a, b, c: extract(a, b, c, bits, 0),
        ),
        f"bfe_s{bits}": (
            word,
            [word, "u32", "u32"],
            f"bfe.{integer} d, a, b, c;",
            lambda a, b, c: extract(a, b, c, bits, 1),
        ),
        f"bfi{bits}": (word, [word, word, "u32", "u32"], f"bfi.b{bits} d, a, b, c, e;", lambda *v: insert(*v, bits)),
        f"clz{bits}": ("u32", [word], f"clz.b{bits} d, a;", lambda a: bits - a.bit_length()),
        f"popc{bits}": ("u32", [word], f"popc.b{bits} d, a;", lambda a: a.bit_count()),
        f"brev{bits}": (word, [word], f"brev.b{bits} d, a;", lambda a: int(format(a, f"0{bits}b")[::-1], 2)),
        f"bfind_u{bits}": ("u32", [word], f"bfind.{word} d, a;", lambda a: a.bit_length() - 1 & M32),
        f"bfind_s{bits}": ("u32", [word], f"bfind.{integer} d, a;", lambda a: max(s(a), ~s(a)).bit_length() - 1 & M32),
        f"bfind_shift{bits}": (
            "u32",
            [word],
            f"bfind.shiftamt.{word} d, a;",
            lambda a: bits - a.bit_length() if a else M32,
        ),
        f"mul_hi_u{bits}": (word, [word] * 2, f"mul.hi.{word} d, a, b;", lambda a, b: a * b >> bits),
        f"mul_hi_s{bits}": (word, [word] * 2, f"mul.hi.{integer} d, a, b;", lambda a, b: s(a) * s(b) >> bits & mask),
        f"mad_lo{bits}": (word, [word] * 3, f"mad.lo.{word} d, a, b, c;", lambda a, b, c: a * b + c & mask),
        f"div_s{bits}": (
            word,
            [word] * 2,
            f"div.{integer} d, a, b;",
            lambda a, b: divide(s(a), s(b)) & mask if b else None,
        ),
        f"rem_s{bits}": (
            word,
            [word] * 2,
            f"rem.{integer} d, a, b;",
            lambda a, b: s(a) - divide(s(a), s(b)) * s(b) & mask if b else None,
        ),
        f"div_u{bits}": (word, [word] * 2, f"div.{word} d, a, b;", lambda a, b: a // b if b else None),
        f"rem_u{bits}": (word, [word] * 2, f"rem.{word} d, a, b;", lambda a, b: a % b if b else None),
        f"shl{bits}": (word, [word, "u32"], f"shl.b{bits} d, a, b;", lambda a, b: a << b & mask if b < bits else 0),
        f"shr_u{bits}": (word, [word, "u32"], f"shr.{word} d, a, b;", lambda a, b: a >> b if b < bits else 0),
        f"shr_s{bits}": (word, [word, "u32"], f"shr.{integer} d, a, b;", lambda a, b: s(a) >> min(b, bits - 1) & mask),
        f"shr_const{bits}": (word, [word], f"shr.{integer} d, a, 5;", lambda a: s(a) >> 5 & mask),
        f"min_s{bits}": (word, [word] * 2, f"min.{integer} d, a, b;", lambda a, b: min(s(a), s(b)) & mask),
        f"max_u{bits}": (word, [word] * 2, f"max.{word} d, a, b;", max),
        f"abs{bits}": (word, [word], f"abs.{integer} d, a;", lambda a: abs(s(a)) & mask),
        f"neg{bits}": (word, [word], f"neg.{integer} d, a;", lambda a: -a & mask),
        f"sad{bits}": (word, [word] * 3, f"sad.{integer} d, a, b, c;", lambda a, b, c: abs(s(a) - s(b)) + c & mask),
    }


def majority(a, b, c):
    return a & b | a & c | b & c


PRMT_MODES = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}
TWO, THREE = ["u32"] * 2, ["u32"] * 3
CASES = {
    **sized_cases(32),
    **sized_cases(64),
    **{
        f"lop3_{t:02x}": ("u32", THREE, f"lop3.b32 d, a, b, c, {t};", lookup(t))
        for t in (0, 0x80, 0xE8, 0x96, 0xCA, 0x1B)
    },
    **{
        f"lop3_{t:02x}": ("u32", THREE, f"lop3.b32 d, a, b, c, {t};", lookup(t))
        for t in (0x40, 0x7F, 0xF9, 0x2D, 0xB8, 0xFF)
    },
    "prmt": ("u32", THREE, "prmt.b32 d, a, b, c;", permute),
    **{
        f"prmt_{mode}": ("u32", THREE, f"prmt.b32.{mode} d, a, b, c;", lambda a, b, c, t=table: permute(a, b, t[c & 3]))
        for mode, table in PRMT_MODES.items()
    },
    "mul_wide_u": ("u64", TWO, "mul.wide.u32 d, a, b;", lambda a, b: a * b),
    "mul_wide_s": ("u64", TWO, "mul.wide.s32 d, a, b;", lambda a, b: signed(a) * signed(b) & M64),
    "mad_wide": (
        "u64",
        ["u32", "u32", "u64"],
        "mad.wide.s32 d, a, b, c;",
        lambda a, b, c: signed(a) * signed(b) + c & M64,
    ),
    "mul_wide_16": ("s32", ["s16", "s16"], "mul.wide.s16 d, a, b;", lambda a, b: signed(a, 16) * signed(b, 16) & M32),
    "mad_16": ("u16", ["u16"] * 3, "mad.lo.s16 d, a, b, c;", lambda a, b, c: a * b + c & 0xFFFF),
    "shl_16": ("u16", ["u16", "u32"], "shl.b16 d, a, b;", lambda a, b: a << b & 0xFFFF if b < 16 else 0),
    "funnel_left": ("u32", THREE, "shf.l.wrap.b32 d, a, b, c;", lambda a, b, c: (b << 32 | a) << (c & 31) >> 32 & M32),
    "funnel_right": ("u32", THREE, "shf.r.wrap.b32 d, a, b, c;", lambda a, b, c: (b << 32 | a) >> (c & 31) & M32),
    "funnel_clamp": ("u32", THREE, "shf.r.clamp.b32 d, a, b, c;", lambda a, b, c: (b << 32 | a) >> min(c, 32) & M32),
    "add_sat": (
        "u32",
        TWO,
        "add.sat.s32 d, a, b;",
        lambda a, b: max(-(2**31), min(2**31 - 1, signed(a) + signed(b))) & M32,
    ),
    "dp4a": ("u32", THREE, "dp4a.s32.s32 d, a, b, c;", dot_product),
    "slct": ("u32", THREE, "slct.u32.s32 d, a, b, c;", lambda a, b, c: a if signed(c) >= 0 else b),
    "cnot": ("u32", ["u32"], "cnot.b32 d, a;", lambda a: int(a == 0)),
    "carry": (
        "u64",
        ["u64", "u64"],
        ".reg .u32 w<6>; mov.b64 {w0, w1}, a; mov.b64 {w2, w3}, b;"
        "add.cc.u32 w4, w0, w2; addc.u32 w5, w1, w3; mov.b64 d, {w4, w5};",
        lambda a, b: a + b & M64,
    ),
    "borrow": (  # bits 32 to 95 of the difference of two numbers of three words, whose top words are zero
        "u64",
        ["u64", "u64"],
        ".reg .u32 w<7>; mov.b64 {w0, w1}, a; mov.b64 {w2, w3}, b;"
        "sub.cc.u32 w4, w0, w2; subc.cc.u32 w5, w1, w3; subc.u32 w6, 0, 0; mov.b64 d, {w5, w6};",
        lambda a, b: a - b >> 32 & M64,
    ),
    "setp": (
        "u32",
        THREE,
        ".reg .pred p, q, r; setp.lt.u32 r, a, c; setp.lt.and.s32 p|q, a, b, r;"
        "selp.u32 d, 1, 0, p; @q add.u32 d, d, 2;",
        lambda a, b, c: (1 if signed(a) < signed(b) else 2) if a < c else 0,
    ),
    "lop3_predicate": (
        "u32",
        THREE,
        ".reg .pred p, q; setp.lt.u32 q, a, b; lop3.and.b32 d|p, a, b, c, 0xE8, q; @!p xor.b32 d, d, 1;",
        lambda a, b, c: majority(a, b, c) ^ int(not (majority(a, b, c) and a < b)),
    ),
    "pack": (
        "u32",
        TWO,
        ".reg .b16 h<4>; mov.b32 {h0, h1}, a; mov.b32 {h2, h3}, b; mov.b32 d, {h3, h0};",
        lambda a, b: b >> 16 | (a & 0xFFFF) << 16,
    ),
    "cvt_s8": ("u32", ["u32"], ".reg .s16 t; cvt.s8.s32 t, a; cvt.s32.s16 d, t;", lambda a: signed(a & 255, 8) & M32),
    "cvt_sat_u8": (
        "u32",
        ["u32"],
        ".reg .u16 t; cvt.sat.u8.s32 t, a; cvt.u32.u16 d, t;",
        lambda a: max(0, min(255, signed(a))),
    ),
    "cvt_s64": ("u64", ["u32"], "cvt.s64.s32 d, a;", lambda a: signed(a) & M64),
    "cvt_pack": (
        "u32",
        THREE,
        "cvt.pack.sat.u8.s32.b32 d, a, b, c;",
        lambda a, b, c: c << 16 & M32 | max(0, min(255, signed(a))) << 8 | max(0, min(255, signed(b))),
    ),
    "bmsk": ("u32", TWO, "bmsk.clamp.b32 d, a, b;", lambda a, b: (1 << min(b, 32)) - 1 << min(a, 32) & M32),
    "indexed_branch": (
        "u32",
        ["u32"],
        ".reg .u32 t; rem.u32 t, a, 3; list: .branchtargets L0, L1, L2; brx.idx t, list;"
        "L0: mov.u32 d, 10; bra E; L1: mov.u32 d, 20; bra E; L2: mov.u32 d, 30; E: add.u32 d, d, 1;",
        lambda a: (11, 21, 31)[a % 3],
    ),
}
MODULE = elementwise_module(CASES)

EDGES = (
    0,
    1,
    2,
    5,
    31,
    32,
    33,
    63,
    64,
    65,
    255,
    256,
    0x7FFFFFFF,
    0x80000000,
    M32,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    M64,
)
words = st.one_of(st.sampled_from(EDGES), st.integers(0, 255), st.integers(0, M64))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=4, deadline=None)
@given(rows=st.lists(st.tuples(words, words, words, words), min_size=1, max_size=24), seed=st.integers(0, 99))
def test_integer_instruction(name, rows, seed):
    """A kernel that decodes 4-bit codes with these instructions would be declared right when it is wrong."""
    result, sources, _, reference = CASES[name]
    more = np.random.default_rng(seed).choice(np.array(EDGES, np.uint64), (LANES - len(rows), 4))
    rows = np.concatenate([np.array(rows, np.uint64), more])
    operands = []
    for column, t in zip(rows.T, sources, strict=False):
        unsigned = f"u{NUMPY_TYPE[t]().itemsize}"
        operands.append(column.astype(unsigned))
    got = run_elementwise(MODULE, name, result, *operands)
    got = got.view(f"u{got.itemsize}").tolist()
    for lane, values in enumerate(zip(*(operand.tolist() for operand in operands), strict=True)):
        expected = reference(*values)
        if expected is not None:
            assert got[lane] == expected, (name, [hex(v) for v in values], hex(got[lane]), hex(expected))


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is not installed (CUDA toolkit)")
def test_the_ptx_is_legal(tmp_path):
    """Otherwise the tests above would prove the emulator right about PTX that no compiler emits."""
    text = HEADER.format(arch="80") + "".join(elementwise_ptx(name, *case[:3]) for name, case in CASES.items())
    (tmp_path / "cases.ptx").write_text(text)
    run("ptxas", "-arch=sm_80", "-O0", tmp_path / "cases.ptx", "-o", tmp_path / "cases.cubin")
