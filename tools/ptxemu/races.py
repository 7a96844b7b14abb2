"""Race detector for shared memory, one record per byte.

An *epoch* is the time between two block barriers. Two accesses to a byte in one epoch by different warps race unless
both read. A warp's lanes are ordered by its own execution; option warp_races also wants a __syncwarp between them.
Named barriers count as full ones, so races between groups that use different ones may be missed.
"""

import numpy as np


class Hazards:
    """Races and warnings of a launch, each kind at each place once, with a count and the first example."""

    def __init__(self):
        self._races = {}  # (kind, line, other line) -> [count, example]
        self._warnings = {}  # (message, where) -> count

    def add_race(self, kind, ins, other_line, count, example):
        entry = self._races.setdefault((kind, ins.line, other_line), [0, None])
        entry[0] += count
        if entry[1] is None:
            other = f"  <-> PTX line {other_line}" if other_line else ""
            entry[1] = f"{example()}, {ins.where}{other}"

    def warn(self, ins, message):
        self._warnings[message, ins.where] = self._warnings.get((message, ins.where), 0) + 1

    @property
    def races(self):
        return [f"{kind} (x{count}): {example}" for (kind, _, _), (count, example) in self._races.items()]

    @property
    def warnings(self):
        return [f"{message} (x{count}): {where}" for (message, where), count in self._warnings.items()]


def each_byte(offsets, size):
    """First byte of each access -> all bytes, access by access."""
    return (offsets[:, None] + np.arange(size)).ravel()


class RaceDetector:
    def __init__(self, batch):
        self.batch, self.hazards = batch, batch.launch.hazards
        self.check_warps = batch.options.warp_races
        size = batch.memory.shared.size

        def per_byte(dtype, value=0):
            return np.full(size, value, dtype)

        self._write_epoch, self._write_lane, self._write_line = (
            per_byte(np.int32, -1),
            per_byte(np.int32),
            per_byte(np.int32),
        )
        self._write_warp_epoch, self._write_atomic = per_byte(np.int32, -1), per_byte(bool)
        self._read_epoch, self._read_warp, self._read_line = (
            per_byte(np.int32, -1),
            per_byte(np.int32),
            per_byte(np.int32),
        )
        self._read_by_several = per_byte(bool)
        self._initialized, self._in_flight = per_byte(bool), per_byte(bool)

    def _flag(self, bad, kind, ins, lines, lanes, bytes_):
        if not bad.any():
            return
        first = int(np.flatnonzero(bad)[0])
        batch = self.batch

        def example():
            byte = int(bytes_[first]) % batch.shared_stride
            return f"shared byte {byte}, {batch.describe_lane(int(lanes[first]))}"

        other_line = int(lines[first]) if lines is not None else 0
        self.hazards.add_race(kind, ins, other_line, int(np.count_nonzero(bad)), example)

    def read(self, ins, offsets, lanes, size):
        index, lanes = each_byte(offsets, size), np.repeat(lanes, size)
        warps, epoch = lanes >> 5, self.batch.epoch[self.batch.block_index[lanes]]
        in_flight = self._in_flight[index]
        self._flag(in_flight, "read of shared memory with a cp.async still in flight", ins, None, lanes, index)
        unset = ~self._initialized[index] & ~in_flight
        self._flag(unset, "read of uninitialised shared memory", ins, None, lanes, index)
        recent = self._write_epoch[index] == epoch
        same_warp = (self._write_lane[index] >> 5) == warps
        kind = "read after write by another warp without a barrier"
        self._flag(recent & ~same_warp, kind, ins, self._write_line[index], lanes, index)
        if self.check_warps:
            other_lane = same_warp & (self._write_lane[index] != lanes)
            unordered = self._write_warp_epoch[index] == self.batch.warp_epoch[warps]
            kind = "read after write by another lane of the warp without __syncwarp"
            self._flag(recent & other_lane & unordered, kind, ins, self._write_line[index], lanes, index)
        new = self._read_epoch[index] != epoch
        first_reads = index[new]
        self._read_epoch[first_reads], self._read_warp[first_reads] = epoch[new], warps[new]
        self._read_by_several[first_reads] = False
        self._read_by_several[index[self._read_warp[index] != warps]] = True
        self._read_line[index] = ins.line

    def write(self, ins, offsets, lanes, size, *, values=None, atomic=False):
        """Record writes before memory changes. Equal ``values`` (uint8[accesses, size]) race harmlessly."""
        index, lanes = each_byte(offsets, size), np.repeat(lanes, size)
        self._check_write(ins, index, lanes, values, atomic)
        self._record_write(ins, index, lanes, atomic)
        if not atomic:
            self._check_lanes_agree(ins, index, lanes, values)

    def _check_write(self, ins, index, lanes, values, atomic):
        warps, epoch = lanes >> 5, self.batch.epoch[self.batch.block_index[lanes]]
        kind = "write to shared memory with a cp.async still in flight"
        self._flag(self._in_flight[index], kind, ins, None, lanes, index)
        race = (self._write_epoch[index] == epoch) & ((self._write_lane[index] >> 5) != warps)
        if values is not None:
            race &= self.batch.memory.shared[index] != values.ravel()
        if atomic:
            race &= ~self._write_atomic[index]
        kind = "write after write by another warp without a barrier"
        self._flag(race, kind, ins, self._write_line[index], lanes, index)
        read = (self._read_epoch[index] == epoch) & (self._read_by_several[index] | (self._read_warp[index] != warps))
        kind = "write after read by another warp without a barrier"
        self._flag(read, kind, ins, self._read_line[index], lanes, index)

    def _record_write(self, ins, index, lanes, atomic):
        self._write_epoch[index], self._write_lane[index] = self.batch.epoch[self.batch.block_index[lanes]], lanes
        self._write_atomic[index], self._write_line[index] = atomic, ins.line
        self._write_warp_epoch[index] = self.batch.warp_epoch[lanes >> 5]
        self._initialized[index] = True

    def _check_lanes_agree(self, ins, index, lanes, values):
        overwritten = self._write_lane[index] != lanes  # another lane of this very instruction came later
        if values is None or not overwritten.any():
            return
        values = values.ravel()
        last_value = dict(zip(index.tolist(), values.tolist(), strict=True))
        overwritten &= np.array([last_value[i] for i in index.tolist()], np.uint8) != values
        kind = "two threads store different values to one address in one instruction"
        self._flag(overwritten, kind, ins, None, lanes, index)

    def copy_issued(self, ins, offsets, lanes, size):
        index, lanes = each_byte(offsets, size), np.repeat(lanes, size)
        self._check_write(ins, index, lanes, None, False)
        self._in_flight[index] = True

    def copy_landed(self, ins, offsets, lanes, size):
        """Record a copy when its thread has waited for it: to all others it is a write by that thread, now."""
        index = each_byte(offsets, size)
        self._in_flight[index] = False
        self._record_write(ins, index, np.repeat(lanes, size), False)
