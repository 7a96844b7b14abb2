"""What every kernel decodes: 4-bit codes to the codebook's values, and double-quantized scales.

A byte holds the codes of two neighbours, the first in its high nibble. Looking sixteen values up in memory would cost
more than everything else, so the table is in registers. NVIDIA has two instructions for that:

- 16 bits: ``prmt`` takes any 4 of 8 bytes. For each byte of a value two of them (codes 0-7, codes 8-15) and a choice
  by the code's highest bit, for four codes at once: 2.7 instructions per code. For fp32 it would be 5.9.
- fp32: lane l of a warp holds the value of code l % 16, and ``shfl`` fetches it from there. It heeds only the low bits
  of the lane's number, so a shift is all that a code takes: 2 instructions.

Elsewhere (PORTABLE: AMD, Intel, Triton's interpreter) it is a tree of selections by the four bits.
"""

import functools

import torch
import triton
import triton.language as tl

from ... import format as fmt
from . import INTERPRETED
from .launch import is_traced

#: The dtypes of products and of decoded weights, as kernels call them.
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

_INTERPRETED = tl.constexpr(INTERPRETED)
#: The formats that kernels here are written for: not one that somebody registers with scales of another kind.
FORMATS = {f: record for f, record in fmt.FORMATS.items() if record.scales in (fmt.BLOCK_SCALES, fmt.ROW_SCALES)}
CODEBOOKS = {format: record.codebook for format, record in FORMATS.items() if record.codebook}
_BITS = tl.constexpr({format: record.bits for format, record in FORMATS.items()})
#: What a code of 1 stands for in units of its row's scale.
INT8_UNIT = tl.constexpr(1 / fmt.INT8_MAX)


@triton.constexpr_function
def codes_per_byte(format):
    return 8 // _BITS.value[format]


@triton.jit
def round_to(values, DTYPE: tl.constexpr):
    """Return fp32 ``values`` in DTYPE, rounded to nearest, ties to even.

    Triton's interpreter would cut them off for bf16: it gets them rounded already.
    """
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(values == values, rounded, bits)  # a NaN stays one
        return (rounded & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)
    return values.to(DTYPE)


def _tables(format: str, dtype: torch.dtype) -> list[list[str]]:
    """Return for each byte of a value, lowest first, the words that two ``prmt`` choose from: codes 0-3, 4-7, ..."""
    size = dtype.itemsize
    raw = fmt.codebook(format).to(dtype).view(torch.int16 if size == 2 else torch.int32)
    values = [(int(bits) & (2 ** (8 * size) - 1)).to_bytes(size, "little") for bits in raw]
    words = lambda byte: (bytes(value[byte] for value in values[c : c + 4]) for c in (0, 4, 8, 12))  # noqa: E731
    return [[f"{int.from_bytes(word, 'little'):#010x}" for word in words(byte)] for byte in range(size)]


def _permute_asm(format: str, dtype: torch.dtype, scaled: bool) -> str:
    """Return PTX from one register of 4 packed bytes to the 16-bit values of their high nibbles and of their low ones.

    The outputs are those of 4 elements each: 2 registers of pairs, high nibbles' first. ``scaled``: each value times
    its element's scale, the sum of two operands: value * (high + low) = fma(value, high, value * low), whose inner
    rounding is 2^-16 of the result and less.

    ``prmt`` takes one word of a table as an immediate. ptxas would copy the other from a uniform register each time,
    one move per code. Where the values are the result a zero that ptxas cannot see through (no lane is below itself)
    makes it keep them in registers.
    """
    tables = _tables(format, dtype)
    lines = ["{", ".reg .b32 codes, index, upper, a, b, p0, p1, shifted, zero, t00, t01, t10, t11;"]
    if scaled:
        first = [(table[0], table[2]) for table in tables]
        lines.append("mov.b32 zero, 0x80008000;")  # two of minus zero: bf16x2 has no product without a sum before sm_90
    else:
        first = [("t00", "t01"), ("t10", "t11")]
        lines += ["mov.u32 zero, %lanemask_lt;", "mov.u32 a, %lanemask_eq;", "and.b32 zero, zero, a;"]
        for names, table in zip(first, tables, strict=True):
            lines += [f"xor.b32 {names[0]}, zero, {table[0]};", f"xor.b32 {names[1]}, zero, {table[2]};"]
    lines.append("shl.b32 shifted, $4, 4;")
    for half in (0, 1):  # bytes 2 half and 2 half + 1: nibbles low, high, low, high
        lines += [f"shr.u32 codes, $4, {16 * half};", "and.b32 index, codes, 0x7777;"]
        # Bytes of ones where a code is 8 or more: prmt repeats the sign of bytes chosen with 8 added.
        lines.append(f"prmt.b32 upper, $4, shifted, {0xBFAE if half else 0x9D8C:#x};")
        for byte, table in enumerate(tables):
            lines.append(f"prmt.b32 a, {first[byte][0]}, {table[1]}, index;")
            lines.append(f"prmt.b32 b, {first[byte][1]}, {table[3]}, index;")
            lines.append(f"lop3.b32 p{byte}, upper, b, a, 0xca;")  # upper ? b : a
        for result, order in ((half, 0x7351), (2 + half, 0x6240)):
            lines.append(f"prmt.b32 {'a' if scaled else f'${result}'}, p0, p1, {order:#x};")
            if scaled:
                kind = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
                lines.append(f"fma.rn.{kind} b, a, ${7 + half}, zero;")
                lines.append(f"fma.rn.{kind} ${result}, a, ${5 + half}, b;")
    return "\n".join([*lines, "}"])


def _shuffle_asm(format: str) -> str:
    """Return the same to fp32, to 8 registers. All lanes of a warp have to take part, as they do in Triton's code.

    The lane's own value comes from ``prmt``; ptxas computes it once in a kernel.
    """
    lines = ["{", ".reg .b32 lane, index, a, b, p0, p1, p2, p3, table, code;", ".reg .pred upper;"]
    lines += ["mov.u32 lane, %laneid;", "and.b32 index, lane, 7;", "and.b32 lane, lane, 8;"]
    lines.append("setp.ne.u32 upper, lane, 0;")
    for byte, words in enumerate(_tables(format, torch.float32)):
        lines += [f"prmt.b32 a, {words[0]}, {words[1]}, index;", f"prmt.b32 b, {words[2]}, {words[3]}, index;"]
        lines.append(f"selp.b32 p{byte}, b, a, upper;")
    lines += ["prmt.b32 a, p0, p1, 0x4040;", "prmt.b32 b, p2, p3, 0x4040;", "prmt.b32 table, a, b, 0x5410;"]
    for nibble in range(8):  # even ones are low
        lines.append(f"shr.u32 code, $8, {4 * nibble};")
        lines.append(f"shfl.sync.idx.b32 ${nibble // 2 + (0 if nibble % 2 else 4)}, table, code, 0x101f, 0xffffffff;")
    return "\n".join([*lines, "}"])


#: The key is (format, Triton's name of the dtype, whether scaled). A jitted function may look it up while compiled.
_ASM = tl.constexpr(
    {
        (format, name, scaled): _permute_asm(format, dtype, scaled)
        for format in CODEBOOKS
        for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16))
        for scaled in (False, True)
    }
    | {(format, "fp32", False): _shuffle_asm(format) for format in CODEBOOKS}
)
_VALUES = tl.constexpr(CODEBOOKS)


@triton.constexpr_function
def _asm(format, dtype, scaled):
    return _ASM.value[format, str(dtype), scaled]


@triton.constexpr_function
def _both(dtype):
    return (dtype, dtype)


@triton.constexpr_function
def _constraints(outputs, inputs):
    return ",".join(["=r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def _value(format, code):
    return _VALUES.value[format][code]


@triton.jit
def _either(bit, FORMAT: tl.constexpr, CODE: tl.constexpr):
    return tl.where(bit, _value(FORMAT, CODE + 1), _value(FORMAT, CODE))


@triton.jit
def _select(code, FORMAT: tl.constexpr):
    """Return the fp32 values of codes in 0...15."""
    bit0, bit1 = (code & 1) != 0, (code & 2) != 0
    bit2, bit3 = (code & 4) != 0, (code & 8) != 0
    low = tl.where(
        bit2,
        tl.where(bit1, _either(bit0, FORMAT, 6), _either(bit0, FORMAT, 4)),
        tl.where(bit1, _either(bit0, FORMAT, 2), _either(bit0, FORMAT, 0)),
    )
    high = tl.where(
        bit2,
        tl.where(bit1, _either(bit0, FORMAT, 14), _either(bit0, FORMAT, 12)),
        tl.where(bit1, _either(bit0, FORMAT, 10), _either(bit0, FORMAT, 8)),
    )
    return tl.where(bit3, high, low)


@triton.jit
def decode_codes(packed, FORMAT: tl.constexpr, DTYPE: tl.constexpr, PORTABLE: tl.constexpr):
    """Return the codebook's values, rounded to DTYPE, for the high and for the low nibbles of uint8 ``packed``.

    To fp32, lanes exchange values. The compiler must not move that to where some lanes do not come, so it is not pure.
    """
    if PORTABLE:
        return round_to(_select(packed >> 4, FORMAT), DTYPE), round_to(_select(packed & 15, FORMAT), DTYPE)
    else:  # said, because Triton compiles what follows a return
        IS_FP32: tl.constexpr = DTYPE == tl.float32
        constraints: tl.constexpr = _constraints(8 if IS_FP32 else 4, 1)
        asm: tl.constexpr = _asm(FORMAT, DTYPE, False)
        return tl.inline_asm_elementwise(asm, constraints, [packed], _both(DTYPE), is_pure=not IS_FP32, pack=4)


@triton.jit
def decode_scaled(packed, high, low, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Return the same in a 16-bit DTYPE, on NVIDIA, times the bytes' scales ``high + low``, which are in DTYPE too."""
    asm: tl.constexpr = _asm(FORMAT, DTYPE, True)
    constraints: tl.constexpr = _constraints(4, 5)
    return tl.inline_asm_elementwise(asm, constraints, [packed, high, low], _both(DTYPE), is_pure=True, pack=4)


@triton.jit
def load_scales(scales, block, mask, DOUBLE_QUANT: tl.constexpr):
    """Return what is stored of the scales of the blocks numbered ``block`` (zero where not ``mask``), for scales_of.

    ``scales``: the pointers (absmax, group_scales, offset, scale_map), the last two to one number and to fp32 [256].
    """
    absmax, group_scales, _, _ = scales
    stored = tl.load(absmax + block, mask=mask, other=0)
    group_scale = stored
    if DOUBLE_QUANT:
        group_scale = tl.load(group_scales + block // 256, mask=mask, other=0.0)
    return stored, group_scale


@triton.jit
def scales_of(stored, group_scale, scales, DOUBLE_QUANT: tl.constexpr):
    """Return the fp32 scales of what load_scales returned.

    Double-quantized: the map's entry for the block's code times its group's scale, plus the offset, each rounded.
    (``launch`` keeps the two from being one FMA.)
    """
    _, _, offset, scale_map = scales
    if DOUBLE_QUANT:
        return tl.load(scale_map + stored.to(tl.int32)) * group_scale + tl.load(offset)
    else:
        return stored


@triton.jit
def decode_scales(scales, block, mask, DOUBLE_QUANT: tl.constexpr):
    """Return the fp32 scales of the blocks numbered ``block``; something where not ``mask``."""
    stored, group_scale = load_scales(scales, block, mask, DOUBLE_QUANT)
    return scales_of(stored, group_scale, scales, DOUBLE_QUANT)


@functools.cache
def _scale_map(device: torch.device) -> torch.Tensor:
    return fmt.SCALE_MAP.to(device)


def scale_map(device: torch.device) -> torch.Tensor:
    """Return what the 256 codes of double-quantized scales stand for, fp32 [256] on ``device``.

    A graph that torch.compile makes owns all its buffers: there it is an op that returns a copy, once per graph.
    """
    return torch.ops.lowbit_triton.scale_map.default(device) if is_traced() else _scale_map(device)


def copy_of_scale_map(device: torch.device) -> torch.Tensor:
    """Return a copy of the map: the kernel of that op."""
    return _scale_map(device).clone()
