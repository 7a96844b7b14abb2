"""wgmma.mma_async of f16 and bf16 as Triton emits it for sm_90a (PTX ISA 9.7.15, "Warpgroup matrix instructions").

Executed at issue: the asynchrony, and so a missing fence or wait, is not modelled.
"""

import re

import numpy as np

from ..compiler import WHOLE_WARPGROUP, instruction, warp_synchronous
from ..errors import EmulatorError, MemoryFault, UnsupportedInstruction
from ..numerics import bf16_to_f32
from ..parser import parse_constant
from ..ptx_types import B64, TYPES
from .matrix import GROUP, IN_GROUP, fragment_index

_DEPTH = 16
# Field "layout type" of a matrix descriptor -> width in bytes of the swizzled rows, and which address bits it mixes.
_SWIZZLE_WIDTH = {0: 16, 1: 128, 2: 64, 3: 32}
_SWIZZLE_MASK = {0: 0, 1: 7, 2: 3, 3: 1}


def _decode(raw, element):
    return raw.view(np.float16).astype(np.float64) if element == "f16" else bf16_to_f32(raw).astype(np.float64)


@instruction("wgmma")
def wgmma(build, ins):
    warp_synchronous(ins, WHOLE_WARPGROUP)
    if ins.parts[1] in ("fence", "commit_group", "wait_group"):
        return lambda batch, mask: None
    shape = next((i for i, part in enumerate(ins.parts) if re.fullmatch(r"m64n\d+k16", part)), None)
    if shape is None or ins.parts[1] != "mma_async" or build.has("sp"):
        raise build.unsupported()
    columns = int(re.findall(r"\d+", ins.parts[shape])[1])
    result_type, element, element_b = ins.parts[shape + 1 : shape + 4]
    if element not in ("f16", "bf16") or element_b != element or result_type != "f32":
        raise build.unsupported()
    return _multiply(build, ins, columns, element)


def _accumulator_index(columns):
    """(row, column) of accumulator register i of each of the 128 threads; D is 64 x columns."""
    register = np.arange(columns // 2)
    warp = np.arange(4)[:, None, None]
    row = 16 * warp + GROUP[None, :, None] + 8 * ((register // 2) % 2)
    column = np.broadcast_to(8 * (register // 4) + 2 * IN_GROUP[:, None] + (register & 1), (4, 32, columns // 2))
    return row.reshape(128, -1), column.reshape(128, -1)


def _multiply(build, ins, columns, element):
    accumulators = build.names(ins.operands[0])
    gather_d = build.register_file(accumulators, TYPES["f32"])
    puts = [build.destination(name, TYPES["f32"]) for name in accumulators]
    a_in_registers = ins.operands[1].startswith("{")
    if a_in_registers:
        gather_a = build.register_file(build.names(ins.operands[1]))
    else:
        descriptor_a = build.all_lanes(ins.operands[1], B64)
    descriptor_b = build.all_lanes(ins.operands[2], B64)
    accumulate = build.predicate(ins.operands[3])
    immediates = [parse_constant(text).value for text in ins.operands[4:]]
    sign = immediates[0] * immediates[1]
    transpose_a = 0 if a_in_registers else immediates[2]
    transpose_b = immediates[2 if a_in_registers else 3]
    lane, register, part = fragment_index("A", _DEPTH, 2)
    row, column = _accumulator_index(columns)

    def run(batch, mask):
        if batch.lanes % 128:
            raise EmulatorError(f"wgmma needs blocks of whole warpgroups of 128 threads: {ins.where}")
        old = gather_d(batch)
        result = old.copy()
        adds = np.broadcast_to(accumulate(batch), (batch.lanes,))
        for first in range(0, batch.lanes, 128):
            if not batch.active[first]:
                continue
            group = slice(first, first + 128)
            b = _read_tile(batch, ins, int(descriptor_b(batch)[first]), columns, transpose_b, first, element)
            if a_in_registers:
                raw = np.ascontiguousarray(gather_a(batch)[group]).view(np.uint16).reshape(4, 32, 4, 2)
                a = _decode(np.ascontiguousarray(raw[:, lane, register, part]), element).reshape(64, _DEPTH)
            else:
                a = _read_tile(batch, ins, int(descriptor_a(batch)[first]), 64, transpose_a, first, element)
            product = (sign * (a @ b.T))[row, column]
            result[group] = (product + old[group] if adds[first] else product).astype(np.float32)
        for k, put in enumerate(puts):
            put(batch, mask, np.ascontiguousarray(result[:, k]))

    return run


def _read_tile(batch, ins, descriptor, rows, transposed, first_lane, element):
    """[rows, 16] elements addressed by a shared-memory matrix descriptor (PTX ISA, "Matrix Descriptor Format")."""
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = descriptor >> 62
    if descriptor >> 49 & 7:
        raise UnsupportedInstruction(f"wgmma descriptor with a base offset: {ins.where}")
    r, k = np.arange(rows)[:, None], np.arange(_DEPTH)[None, :]
    width = _SWIZZLE_WIDTH[swizzle]
    if swizzle == 0 and not transposed:
        address = (r % 8) * 16 + (r // 8) * stride + (k % 8) * 2 + (k // 8) * leading
    elif swizzle == 0:
        address = (r % 8) * 2 + (r // 8) * stride + (k % 8) * 16 + (k // 8) * leading
    elif not transposed:
        address = (r % 8) * width + (r // 8) * stride + k * 2
    else:
        per_row = width // 2
        address = (r % per_row) * 2 + (r // per_row) * leading + (k % 8) * width + (k // 8) * stride
    address = address + start
    address = address ^ ((address >> 7 & _SWIZZLE_MASK[swizzle]) << 4)
    if address.max() + 2 > batch.launch.shared_size:
        raise MemoryFault(
            f"wgmma descriptor 0x{descriptor:x} reaches shared byte {int(address.max())} of "
            f"{batch.launch.shared_size}: {ins.where}"
        )
    address = address + int(batch.shared_start[first_lane])
    if batch.races:
        for warp_offset in (0, 32):  # two warps stand for the four, so that other warps' writes count as races
            lanes = np.full(address.size, first_lane + warp_offset)
            batch.races.read(ins, address.ravel(), lanes, 2)
    return _decode(batch.memory.shared.view(np.uint16)[address // 2], element)
