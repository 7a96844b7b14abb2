"""Branches, calls, returns and block barriers (PTX ISA 9.7.12 and 9.7.13 bar). The engine does the work."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..compiler import Kind, instruction, warp_synchronous
from ..errors import EmulatorError
from ..ptx_types import PRED, U32


@instruction("bra")
def branch(build, ins):
    ins.kind, ins.target = Kind.BRANCH, build.label(ins.operands[0])


@instruction("brx")
def indexed_branch(build, ins):
    ins.kind = Kind.INDEXED_BRANCH
    targets = np.array([build.label(name) for name in build.function.branch_targets[ins.operands[1]]], np.int64)
    index = build.all_lanes(ins.operands[0], U32)
    return lambda batch, mask: targets[np.minimum(index(batch), np.uint32(len(targets) - 1))]


@instruction("ret", "exit")
def leave(build, ins):
    ins.kind, ins.target = Kind.RETURN, ins.parts[0]


@instruction("trap", "brkpt")
def trap(build, ins):
    def run(batch, mask):
        raise EmulatorError(f"{ins.parts[0]} executed by {batch.describe_lane()}: {ins.where}")

    return run


@instruction("call")
def call(build, ins):
    ins.kind = Kind.CALL
    operands = list(ins.operands)
    results = _names_in_parentheses(operands.pop(0)) if operands[0].startswith("(") else []
    callee = operands.pop(0)
    arguments = _names_in_parentheses(operands.pop(0)) if operands and operands[0].startswith("(") else []
    if build.register(callee) is not None:
        raise build.unsupported()  # through a pointer
    return lambda batch, mask: batch.call(ins, callee, results, arguments)


def _names_in_parentheses(text):
    return [name.strip() for name in text[1:-1].split(",") if name.strip()]


@dataclass
class Barrier:
    """Operands of a bar instruction as functions of the batch (None: not written)."""

    action: str  # sync, arrive or red
    identifier: Any
    threads: Any
    reduction: str | None = None  # popc, and, or
    put_result: Any = None
    predicate: Any = None


@instruction("bar", "barrier")
def barrier(build, ins):
    if build.has("warp"):
        warp_synchronous(ins, build.warp_members(0))
        return lambda batch, mask: batch.count_warp_sync()
    if build.has("cluster"):
        raise build.unsupported()
    ins.kind = Kind.BARRIER
    operands = list(ins.operands)
    fields = {}
    action = build.one_of(("sync", "arrive", "red"))
    if action == "red":
        reduction = build.one_of(("popc", "and", "or"))
        fields = {
            "reduction": reduction,
            "put_result": build.destination(operands.pop(0), U32 if reduction == "popc" else PRED),
            "predicate": build.predicate(operands.pop()),
        }
    ins.barrier = Barrier(
        action,
        identifier=build.all_lanes(operands[0] if operands else "0", U32),
        threads=build.all_lanes(operands[1], U32) if len(operands) > 1 else None,
        **fields,
    )
