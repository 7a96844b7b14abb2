"""mma.sync, ldmatrix, stmatrix and movmatrix (PTX ISA 9.7.14, "Warp-level matrix instructions").

Products are exact and summed with the accumulator in float64, then rounded once; the hardware's order of summation
is undocumented and it drops low bits, so last bits differ. Option mma_mode="trunc" is a pessimistic stand-in.
"""

import re

import numpy as np

from ..compiler import WHOLE_WARP, instruction, warp_synchronous
from ..errors import EmulatorError
from ..numerics import bf16_to_f32, narrow
from ..ptx_types import B32, S32

LANE = np.arange(32)
GROUP, IN_GROUP = LANE // 4, LANE % 4  # groupID and threadID_in_group of the PTX ISA's figures

_ELEMENT_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8}


def fragment_index(operand, depth, per_register):
    """Where element (row, column) of A (16 x depth) or B (depth x 8) lies, as index arrays (lane, register, part).

    One pattern serves every type: a quad covers 4 * per_register consecutive k, rows (or columns, for B) follow the
    groups, and the next register moves to row + 8 (A only), then to the next k.
    """
    rows, columns = (16, depth) if operand == "A" else (depth, 8)
    lane_of, register_of, part_of = (np.empty((rows, columns), int) for _ in range(3))
    for register in range(rows * columns // (32 * per_register)):
        for part in range(per_register):
            if operand == "A":
                row = GROUP + 8 * (register % 2)
                column = IN_GROUP * per_register + part + 4 * per_register * (register // 2)
            else:
                row = IN_GROUP * per_register + part + 4 * per_register * register
                column = GROUP
            lane_of[row, column], register_of[row, column], part_of[row, column] = LANE, register, part
    return lane_of, register_of, part_of


# Accumulator element i of each lane: C is 16 x 8.
_C_ROW = np.stack([GROUP, GROUP, GROUP + 8, GROUP + 8], 1)
_C_COLUMN = np.stack([2 * IN_GROUP, 2 * IN_GROUP + 1] * 2, 1)


def _decode_elements(raw, element):
    """uint32[..., registers] -> float64[..., registers, elements per register]."""
    if element == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32)[..., None].astype(np.float64)
    if element == "f16":
        return raw.view(np.float16).reshape(*raw.shape, 2).astype(np.float64)
    if element == "bf16":
        return bf16_to_f32(raw.view(np.uint16)).reshape(*raw.shape, 2).astype(np.float64)
    return raw.view(np.int8 if element == "s8" else np.uint8).reshape(*raw.shape, 4).astype(np.float64)


_ACCUMULATOR = {"f32": np.float32, "f16": np.float16, "s32": np.int32}


def _truncating_product(a, b, c, step=8):
    """Accumulate as tensor cores are measured to: per 8 k, every term is aligned to the largest exponent, cut to 25
    bits, and the sum truncated to float32 (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor
    cores", PeerJ CS 7:e330, 2021). Not exact for any one chip: pessimistic for all.
    """
    for k in range(0, a.shape[2], step):
        products = a[:, :, None, k : k + step] * b.transpose(0, 2, 1)[:, None, :, k : k + step]
        terms = np.concatenate([products, c[..., None]], 3)
        quantum = np.ldexp(1.0, np.frexp(np.abs(terms).max(3))[1] - 25)[..., None]
        c = narrow((np.trunc(terms / quantum) * quantum).sum(3), np.float32, "rz").astype(np.float64)
    return c


@instruction("mma")
def mma(build, ins):
    shape = next(part for part in ins.parts if re.fullmatch(r"m\d+n\d+k\d+", part))
    m, n, depth = (int(size) for size in re.findall(r"\d+", shape))
    types = [part for part in ins.parts[ins.parts.index("col") + 1 :] if part in _ELEMENT_BITS or part in _ACCUMULATOR]
    saturate = build.has("satfinite")
    if (
        (m, n) != (16, 8)
        or len(types) != 4
        or types[1] not in _ELEMENT_BITS
        or types[2] not in _ELEMENT_BITS
        or build.has("sp")
        or (saturate and types[0] != "s32")
    ):
        raise build.unsupported()
    result_type, type_a, type_b, type_c = types
    per_register = 32 // _ELEMENT_BITS[type_a]
    index_a, index_b = (fragment_index(operand, depth, per_register) for operand in "AB")
    names = [build.names(text) for text in ins.operands[:4]]
    if len(names[1]) != 16 * depth // (32 * per_register) or len(names[2]) != 8 * depth // (32 * per_register):
        raise EmulatorError(f"wrong number of mma operands: {ins.where}")
    gather_a, gather_b, gather_c = (build.register_file(operand) for operand in names[1:])
    puts = [build.destination(name, B32) for name in names[0]]
    accumulator, result = _ACCUMULATOR[type_c], _ACCUMULATOR[result_type]
    warp_synchronous(ins, WHOLE_WARP)

    def run(batch, mask):
        def by_warp(gather):
            raw = gather(batch)
            return raw.reshape(-1, 32, raw.shape[1])

        lane, register, part = index_a
        a = _decode_elements(by_warp(gather_a), type_a)[:, lane, register, part]
        lane, register, part = index_b
        b = _decode_elements(by_warp(gather_b), type_b)[:, lane, register, part]
        c = by_warp(gather_c).view(accumulator)
        if batch.options.mma_mode == "trunc" and result_type == "f32":
            c_matrix = np.zeros((len(a), 16, 8))
            c_matrix[:, _C_ROW, _C_COLUMN] = c
            d = _truncating_product(a, b, c_matrix)[:, _C_ROW, _C_COLUMN]
        else:
            d = np.matmul(a, b)[:, _C_ROW, _C_COLUMN] + c
        if result_type == "s32":  # float64 holds the sum exactly; without .satfinite it wraps
            d = np.clip(d, *S32.limits).astype(np.int64) if saturate else d.astype(np.int64)
        raw = np.ascontiguousarray(d.astype(result)).view(np.uint32)
        for k, put in enumerate(puts):
            put(batch, mask, np.ascontiguousarray(raw[:, :, k]).ravel())

    return run


@instruction("ldmatrix", "stmatrix")
def matrix_transfer(build, ins):
    """8 x 8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i."""
    loads = ins.parts[0] == "ldmatrix"
    count = next(int(part[1:]) for part in ins.parts if re.fullmatch(r"x[124]", part))
    transpose, space = build.has("trans"), build.space()
    names = build.names(ins.operands[0 if loads else 1])
    if not build.has("m8n8") or not build.has("b16") or len(names) != count:
        raise build.unsupported()
    address = build.address(ins.operands[1 if loads else 0])[0]
    warp_synchronous(ins, WHOLE_WARP)
    if loads:
        puts = [build.destination(name, B32) for name in names]

        def run(batch, mask):
            matrices = batch.memory.load_matrices(ins, space, address(batch), count)
            if transpose:
                matrices = matrices.swapaxes(2, 3)
            raw = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
            for k, put in enumerate(puts):
                put(batch, mask, raw[:, k].ravel())

    else:
        gather = build.register_file(names)

        def run(batch, mask):
            raw = np.ascontiguousarray(gather(batch).reshape(-1, 32, count).swapaxes(1, 2))
            matrices = raw.view(np.uint16).reshape(-1, count, 8, 8)
            if transpose:
                matrices = matrices.swapaxes(2, 3)
            batch.memory.store_matrices(ins, space, address(batch), count, np.ascontiguousarray(matrices))

    return run


@instruction("movmatrix")
def transpose_matrix(build, ins):
    value, put = build.all_lanes(ins.operands[1], B32), build.destination(ins.operands[0], B32)
    warp_synchronous(ins, WHOLE_WARP)

    def run(batch, mask):
        matrices = np.ascontiguousarray(value(batch)).view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)
        put(batch, mask, np.ascontiguousarray(matrices).view(np.uint32).ravel())

    return run
