"""What every kernel decodes: 4-bit codes to the codebook's values, and double-quantized scales.

A byte holds the codes of two neighbours, the first in its high nibble. Looking sixteen values up in memory would cost
more than everything else, so the table is in registers. NVIDIA has two instructions for that:

- 16 bits: ``prmt`` takes any 4 of 8 bytes. For each byte of a value two of them (codes 0-7, codes 8-15) and a choice
  by the code's highest bit, for four codes at once: 2.7 instructions per code. For fp32 it would be 5.9.
- fp32: lane l of a warp holds the value of code l % 16, and ``shfl`` fetches it from there: it heeds only the low bits
  of the lane's number, so a shift is all it takes, 2 instructions per code.

Elsewhere (PORTABLE: AMD, Intel, Triton's interpreter) it is a tree of selections by the four bits.
"""

import torch
import triton
import triton.language as tl

from ... import format as fmt
from .rounding import round_to

_BITS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4}


def _value_bytes(format: str, dtype: torch.dtype) -> list[bytes]:
    """Per code the bytes of its value in ``dtype``, lowest first."""
    size = _BITS[dtype]
    raw = fmt.codebook(format).to(dtype).view(torch.int16 if size == 2 else torch.int32)
    return [(int(bits) & (2 ** (8 * size) - 1)).to_bytes(size, "little") for bits in raw]


def _table(values: list[bytes], byte: int) -> list[int]:
    """One byte of all values, in the four words that two ``prmt`` choose from: codes 0-7, then 8-15."""
    return [int.from_bytes(bytes(value[byte] for value in values[c : c + 4]), "little") for c in (0, 4, 8, 12)]


def _permute_asm(format: str, dtype: torch.dtype) -> str:
    """PTX from one register of 4 packed bytes to the 16-bit values of their high nibbles and of their low ones.

    The outputs are those of 4 elements each: 2 registers of pairs, high nibbles' first. ``prmt`` takes one word of a
    table as an immediate. ptxas would copy the other from a uniform register each time, one move per code: a zero that
    it cannot see through (no lane is below itself) makes it keep them in registers.
    """
    values = _value_bytes(format, dtype)
    tables = [_table(values, byte) for byte in (0, 1)]
    lines = ["{", ".reg .b32 codes, index, upper, a, b, p0, p1, shifted, zero, t00, t01, t10, t11;"]
    lines += ["mov.u32 zero, %lanemask_lt;", "mov.u32 a, %lanemask_eq;", "and.b32 zero, zero, a;"]
    for byte in (0, 1):
        lines.append(f"xor.b32 t{byte}0, zero, {tables[byte][0]:#010x};")
        lines.append(f"xor.b32 t{byte}1, zero, {tables[byte][2]:#010x};")
    lines.append("shl.b32 shifted, $4, 4;")
    for half in (0, 1):  # bytes 2 half and 2 half + 1: nibbles low, high, low, high
        lines.append(f"shr.u32 codes, $4, {16 * half};")
        lines.append("and.b32 index, codes, 0x7777;")
        # Bytes of ones where a code is 8 or more: prmt repeats the sign of bytes chosen with 8 added.
        lines.append(f"prmt.b32 upper, $4, shifted, {0xBFAE if half else 0x9D8C:#x};")
        for byte in (0, 1):
            lines.append(f"prmt.b32 a, t{byte}0, {tables[byte][1]:#010x}, index;")
            lines.append(f"prmt.b32 b, t{byte}1, {tables[byte][3]:#010x}, index;")
            lines.append(f"lop3.b32 p{byte}, upper, b, a, 0xca;")  # upper ? b : a
        lines.append(f"prmt.b32 ${half}, p0, p1, 0x7351;")
        lines.append(f"prmt.b32 ${2 + half}, p0, p1, 0x6240;")
    return "\n".join([*lines, "}"])


def _shuffle_asm(format: str) -> str:
    """The same to fp32: 8 registers. All lanes of a warp have to take part, as they do in Triton's code.

    The lane's own value comes from ``prmt``; ptxas computes it once in a kernel.
    """
    values = _value_bytes(format, torch.float32)
    lines = ["{", ".reg .b32 lane, index, a, b, p0, p1, p2, p3, table, code;", ".reg .pred upper;"]
    lines += ["mov.u32 lane, %laneid;", "and.b32 index, lane, 7;", "and.b32 lane, lane, 8;"]
    lines.append("setp.ne.u32 upper, lane, 0;")
    for byte in range(4):
        words = _table(values, byte)
        lines.append(f"prmt.b32 a, {words[0]:#010x}, {words[1]:#010x}, index;")
        lines.append(f"prmt.b32 b, {words[2]:#010x}, {words[3]:#010x}, index;")
        lines.append(f"selp.b32 p{byte}, b, a, upper;")
    lines += ["prmt.b32 a, p0, p1, 0x4040;", "prmt.b32 b, p2, p3, 0x4040;", "prmt.b32 table, a, b, 0x5410;"]
    for nibble in range(8):  # even ones are low
        lines.append(f"shr.u32 code, $8, {4 * nibble};")
        lines.append(f"shfl.sync.idx.b32 ${nibble // 2 + (0 if nibble % 2 else 4)}, table, code, 0x101f, 0xffffffff;")
    return "\n".join([*lines, "}"])


#: By format and Triton's name of the dtype: what a jitted function may look up while it is compiled.
_ASM = tl.constexpr(
    {
        (format, name): _shuffle_asm(format) if dtype == torch.float32 else _permute_asm(format, dtype)
        for format in fmt.CODEBOOKS
        for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16))
    }
)
_CODEBOOKS = tl.constexpr(fmt.CODEBOOKS)


@triton.constexpr_function
def _asm(format, dtype):
    return _ASM.value[format, str(dtype)]


@triton.constexpr_function
def _both(dtype):
    return (dtype, dtype)


@triton.constexpr_function
def _constraints(dtype):
    outputs = 8 if dtype == tl.float32 else 4
    return ",".join(["=r"] * outputs + ["r"])


@triton.constexpr_function
def _value(format, code):
    return _CODEBOOKS.value[format][code]


@triton.jit
def _either(bit, FORMAT: tl.constexpr, CODE: tl.constexpr):
    return tl.where(bit, _value(FORMAT, CODE + 1), _value(FORMAT, CODE))


@triton.jit
def _select(code, FORMAT: tl.constexpr):
    """fp32 values of codes in 0...15."""
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
    """The codebook's values, rounded to DTYPE, for the high and for the low nibbles of uint8 ``packed``.

    To fp32 lanes exchange values, which the compiler must not move to where some of them do not come: not pure.
    """
    if PORTABLE:
        return round_to(_select(packed >> 4, FORMAT), DTYPE), round_to(_select(packed & 15, FORMAT), DTYPE)
    else:  # said, because Triton compiles what follows a return
        return tl.inline_asm_elementwise(
            _asm(FORMAT, DTYPE), _constraints(DTYPE), [packed], dtype=_both(DTYPE), is_pure=DTYPE != tl.float32, pack=4
        )


@triton.jit
def load_scales(absmax, group_scales, block, mask, DOUBLE_QUANT: tl.constexpr):
    """What is stored of the scales of the blocks numbered ``block`` (zero where not ``mask``), for scales_of."""
    stored = tl.load(absmax + block, mask=mask, other=0)
    group_scale = stored
    if DOUBLE_QUANT:
        group_scale = tl.load(group_scales + block // 256, mask=mask, other=0.0)
    return stored, group_scale


@triton.jit
def scales_of(stored, group_scale, offset, scale_map, DOUBLE_QUANT: tl.constexpr):
    """The fp32 scales of what load_scales returned.

    Double-quantized: the map's entry for the block's code times its group's scale, plus the offset, each rounded.
    (``launch`` keeps the two from being one FMA.) ``scale_map`` is fp32 [256], ``offset`` one number on the device.
    """
    if DOUBLE_QUANT:
        return tl.load(scale_map + stored.to(tl.int32)) * group_scale + tl.load(offset)
    else:
        return stored


@triton.jit
def decode_scales(absmax, group_scales, offset, scale_map, block, mask, DOUBLE_QUANT: tl.constexpr):
    """The fp32 scales of the blocks numbered ``block``; something where not ``mask``."""
    stored, group_scale = load_scales(absmax, group_scales, block, mask, DOUBLE_QUANT)
    return scales_of(stored, group_scale, offset, scale_map, DOUBLE_QUANT)
