"""Instructions by which the lanes of a warp exchange values (PTX ISA 9.7.9 shfl, 9.7.13 vote, match, redux, elect)."""

import numpy as np

from ..compiler import instruction, warp_synchronous
from ..ptx_types import B32, PRED, U32

# What a lane reads from a lane that does not execute the shuffle: undefined on hardware, recognizable here.
UNDEFINED = np.uint32(0xDEADBEEF)

_BIT = np.arange(32, dtype=np.uint64)


@instruction("shfl")
def shuffle(build, ins):
    mode = build.one_of(("up", "down", "bfly", "idx"))
    names = build.pair(ins.operands[0])
    put = build.destination(names[0], B32)
    put_in_range = build.destination(names[1], PRED) if len(names) > 1 else None
    value = build.all_lanes(ins.operands[1], B32)
    distance, clamp = (build.source(text, U32) for text in ins.operands[2:4])
    warp_synchronous(ins, build.warp_members(4))

    def run(batch, mask):
        lane = batch.lane_in_warp
        packed, b = clamp(batch).astype(np.int64), distance(batch).astype(np.int64) & 31
        segment, limit = (packed >> 8) & 31, packed & 31
        last = (lane & segment) | (limit & ~segment)
        if mode == "up":
            source = lane - b
            in_range = source >= last
        else:
            if mode == "down":
                source = lane + b
            elif mode == "bfly":
                source = lane ^ b
            else:
                source = (lane & segment) | (b & ~segment)
            in_range = source <= last
        index = batch.warp_start + np.where(in_range, source, lane)
        result = value(batch)[index]
        if batch.selected is not None:
            undefined = batch.selected & ~batch.selected[index]
            if undefined.any():
                batch.warn(ins, "shfl reads a lane that is not executing it (undefined value)")
                result = np.where(undefined, UNDEFINED, result)
        put(batch, mask, result)
        if put_in_range:
            put_in_range(batch, mask, in_range)

    return run


def _to_bits(lanes):
    """bool[..., 32] -> uint32[...]: bit i is lane i."""
    return (lanes.astype(np.uint64) << _BIT).sum(-1).astype(np.uint32)


def _one_per_warp(result):
    """[warps, 1 or 32] -> one element per lane."""
    return np.ascontiguousarray(np.broadcast_to(result, (result.shape[0], 32))).ravel()


@instruction("vote")
def vote(build, ins):
    mode = build.one_of(("all", "any", "uni", "ballot"))
    put = build.destination(ins.operands[0], B32 if mode == "ballot" else PRED)
    predicate = build.predicate(ins.operands[1])
    warp_synchronous(ins, build.warp_members(2))

    def run(batch, mask):
        votes = np.broadcast_to(predicate(batch), (batch.lanes,)).reshape(-1, 1, 32)
        members = batch.members(ins)
        ballot, voters = _to_bits(members & votes), _to_bits(members)
        if mode == "ballot":
            result = ballot
        elif mode == "any":
            result = ballot != 0
        elif mode == "all":
            result = ballot == voters
        else:
            result = (ballot == voters) | (ballot == 0)
        put(batch, mask, _one_per_warp(result))

    return run


@instruction("activemask")
def active_mask(build, ins):
    put = build.destination(ins.operands[0], B32)
    return lambda batch, mask: put(batch, mask, np.repeat(_to_bits(batch.active.reshape(-1, 32)), 32))


@instruction("match")
def match(build, ins):
    t, wants_all = build.types()[-1], build.has("all")
    names = build.pair(ins.operands[0])
    put = build.destination(names[0], B32)
    put_same = build.destination(names[1], PRED) if len(names) > 1 else None
    value = build.all_lanes(ins.operands[1], t)
    warp_synchronous(ins, build.warp_members(2))

    def run(batch, mask):
        values, members = value(batch).reshape(-1, 32), batch.members(ins)
        equal = _to_bits((values[:, :, None] == values[:, None, :]) & members)
        if wants_all:
            everyone = np.broadcast_to(_to_bits(members), equal.shape)
            same = np.where(members, equal[:, None, :] == everyone[:, :, None], True).all(2)
            same = np.broadcast_to(same, equal.shape)
            if put_same:
                put_same(batch, mask, same.ravel())
            equal = np.where(same, everyone, np.uint32(0))
        put(batch, mask, np.ascontiguousarray(equal).ravel())

    return run


@instruction("redux")
def reduce_warp(build, ins):
    t, operation = build.types()[-1], ins.parts[2]
    if t.is_float:
        raise build.unsupported()  # sm_100
    put, value = build.destination(ins.operands[0], t), build.all_lanes(ins.operands[1], t)
    warp_synchronous(ins, build.warp_members(2))
    low, high = t.limits
    reduction, identity = {
        "add": (np.add, 0),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
        "and": (np.bitwise_and, -1 if t.is_signed else high),
        "min": (np.minimum, high),
        "max": (np.maximum, low),
    }[operation]
    identity = t.dtype(identity)

    def run(batch, mask):
        values = np.where(batch.members(ins), value(batch).reshape(-1, 1, 32), identity)
        put(batch, mask, _one_per_warp(reduction.reduce(values, axis=2, dtype=t.dtype)))

    return run


@instruction("elect")
def elect(build, ins):
    names = build.pair(ins.operands[0])
    put, put_elected = build.destination(names[0], B32), build.destination(names[1], PRED)
    warp_synchronous(ins, build.warp_members(1))

    def run(batch, mask):
        first = _one_per_warp(batch.members(ins).argmax(2))
        put(batch, mask, first.astype(np.uint32))
        put_elected(batch, mask, batch.lane_in_warp == first)

    return run
