"""Memory accesses of a batch: every one is checked for mapping, bounds, alignment and permission, then counted."""

import numpy as np

from .address_space import (
    FIRST_GLOBAL_WINDOW,
    LOCAL_WINDOW,
    SHARED_BASE,
    SHARED_WINDOW,
    WINDOW_SHIFT,
    in_window,
    window_base,
)
from .errors import MemoryFault
from .parser import align_up
from .ptx_types import UNSIGNED
from .races import each_byte

POISON = 0xFF  # fresh shared and local memory: NaN as a float, -1 as an integer


class BatchMemory:
    """Shared memory of each block and local memory of each thread, and the way to the launch's global memory."""

    def __init__(self, batch):
        self.batch, self.launch = batch, batch.launch
        self.local_size = batch.launch.layout.local_size
        self.shared = np.full(batch.blocks * batch.shared_stride, POISON, np.uint8)
        self.local = np.full(max(batch.lanes * self.local_size, 64), POISON, np.uint8)
        self._all_lanes = np.arange(batch.lanes)

    # ---- finding and checking

    def locate(self, ins, space, addresses, size, access):
        """Check an access of ``size`` bytes per active lane.

        ``access`` is "read", "write", "atomic" or "copy" (the shared side of cp.async). Returns a list of
        (bytes array, offset per lane, lanes or None for all): one entry, or one per memory that the lanes touch.
        """
        lanes = None if self.batch.selected is None else np.flatnonzero(self.batch.selected)
        if lanes is not None:
            addresses = addresses[lanes]
        if space == "shared":
            return [self._shared(ins, addresses.astype(np.int64), lanes, size, access)]
        if space == "local":
            return [self._local(ins, addresses.astype(np.int64), lanes, size)]
        if addresses.dtype != np.uint64:
            addresses = addresses.astype(np.uint64)
        windows = addresses >> np.uint64(WINDOW_SHIFT)
        if (windows == windows[0]).all():
            return [self._window(ins, int(windows[0]), addresses, lanes, size, access, space)]
        lanes = self._all_lanes if lanes is None else lanes
        return [
            self._window(ins, int(w), addresses[windows == w], lanes[windows == w], size, access, space)
            for w in np.unique(windows)
        ]

    def _window(self, ins, window, addresses, lanes, size, access, space):
        if window in (SHARED_WINDOW, LOCAL_WINDOW):
            name = "shared" if window == SHARED_WINDOW else "local"
            offsets = (addresses - np.uint64(window_base(window))).view(np.int64)
            if space != "generic":
                self._fault(ins, f"{space} access with an address of {name} memory", size, lanes, offsets, name)
            if window == SHARED_WINDOW:
                return self._shared(ins, offsets, lanes, size, access)
            return self._local(ins, offsets, lanes, size)
        buffer = self.launch.global_memory.buffers.get(window)
        if buffer is None:
            self._fault(ins, "access to unmapped address", size, lanes, addresses.view(np.int64), "address")
        offsets = (addresses - np.uint64(buffer.aligned_base)).view(np.int64)
        self._check_range(ins, offsets, lanes, size, buffer.name, buffer.size, buffer.lead)
        if access != "read":
            if not buffer.writable:
                where = (buffer.name, buffer.size, None, buffer.lead)
                self._fault(ins, "write to read-only memory", size, lanes, offsets, *where)
            buffer.dirty = True
            if self.batch.options.detect_global_waw and access == "write":
                self._check_double_writes(ins, buffer, offsets, lanes, size)
        if buffer.written is not None:
            self._check_written(ins, buffer, offsets, lanes, size, access)
        if (
            self.batch.options.counters
            and window >= FIRST_GLOBAL_WINDOW
            and buffer.counted
            and space not in ("const", "param")
        ):
            access_lanes = self._all_lanes if lanes is None else lanes
            self.launch.counters.count_global(ins, access, addresses, access_lanes, size)
            sectors = offsets >> 5
            if access != "write":
                buffer.sectors_read[sectors] = True
            if access != "read":
                buffer.sectors_written[sectors] = True
        return buffer.data, offsets, lanes

    def _shared(self, ins, offsets, lanes, size, access):
        self._check_range(ins, offsets, lanes, size, "shared", self.launch.shared_size)
        access_lanes = self._all_lanes if lanes is None else lanes
        if self.batch.options.counters:
            self.launch.counters.count_shared(ins, offsets, access_lanes, size)
        offsets = offsets + (self.batch.shared_start if lanes is None else self.batch.shared_start[lanes])
        if self.batch.races:
            if access == "read":
                self.batch.races.read(ins, offsets, access_lanes, size)
            elif access == "atomic":
                self.batch.races.write(ins, offsets, access_lanes, size, atomic=True)
        return self.shared, offsets, lanes

    def _local(self, ins, offsets, lanes, size):
        self._check_range(ins, offsets, lanes, size, "local", self.local_size)
        access_lanes = self._all_lanes if lanes is None else lanes
        return self.local, offsets + access_lanes * self.local_size, lanes

    def _check_range(self, ins, offsets, lanes, size, name, limit, lead=0):
        outside = (offsets < lead) | (offsets > lead + limit - size)
        if outside.any():
            self._fault(ins, "out of bounds", size, lanes, offsets, name, limit, outside, lead)
        misaligned = (offsets & (size - 1)) != 0
        if misaligned.any():
            self._fault(ins, "misaligned", size, lanes, offsets, name, limit, misaligned, lead)

    def _check_written(self, ins, buffer, offsets, lanes, size, access):
        index = each_byte(offsets - buffer.lead, size)
        if access in ("read", "atomic"):
            unset = ~buffer.written[index].reshape(-1, size).all(1)
            if unset.any():
                message = "read of memory never written"
                self._fault(ins, message, size, lanes, offsets, buffer.name, buffer.size, unset, buffer.lead)
        if access != "read":
            buffer.written[index] = True

    def _check_double_writes(self, ins, buffer, offsets, lanes, size):
        batch = self.batch
        if buffer.writer is None:
            buffer.writer = np.full(buffer.data.size, -1, np.int64)
        lanes = self._all_lanes if lanes is None else lanes
        block = batch.block_index[lanes] + batch.first_block
        thread = np.repeat(block * batch.lanes_per_block + batch.thread_in_block[lanes], size)
        index = each_byte(offsets, size)
        before = buffer.writer[index]
        buffer.writer[index] = thread
        twice = ((before >= 0) & (before != thread)) | (buffer.writer[index] != thread)
        if twice.any():
            first = int(np.flatnonzero(twice)[0])
            byte, lane = int(index[first]) - buffer.lead, int(lanes[first // size])
            self.launch.hazards.add_race(
                "global memory written by two threads",
                ins,
                0,
                int(np.count_nonzero(twice)),
                lambda: f"{buffer.name} byte {byte}, {batch.describe_lane(lane)}",
            )

    def _fault(self, ins, what, size, lanes, offsets, name, limit=None, bad=None, lead=0):
        if bad is None:
            bad = np.ones(len(offsets), bool)
        first = int(np.flatnonzero(bad)[0])
        lane = first if lanes is None else int(lanes[first])
        place = f"{name} {int(offsets[first]):#x}" if limit is None else f"{name}{int(offsets[first]) - lead:+d}"
        extent = "" if limit is None else f" (size {limit} bytes)"
        raise MemoryFault(
            f"{what}: {size}-byte access at {place}{extent} by {self.batch.describe_lane(lane)}, "
            f"{int(np.count_nonzero(bad))} lanes: {ins.where}"
        )

    # ---- the accesses

    def load(self, ins, space, addresses, element_size, count):
        """Return ``count`` arrays of unsigned elements, one element per lane; inactive lanes get zero."""
        size, dtype = element_size * count, UNSIGNED[element_size * 8]
        loaded = None
        for data, offsets, lanes in self.locate(ins, space, addresses, size, "read"):
            if element_size < 8:
                data = self.launch.global_memory.in_pieces(data)
            elements = data.view(dtype)
            elements = elements.reshape(-1, count)[offsets // size]
            if lanes is None:
                return [np.ascontiguousarray(elements[:, k]) for k in range(count)]
            if loaded is None:
                loaded = [np.zeros(self.batch.lanes, dtype) for _ in range(count)]
            for k in range(count):
                loaded[k][lanes] = elements[:, k]
        return loaded

    def store(self, ins, space, addresses, element_size, values):
        count, dtype = len(values), UNSIGNED[element_size * 8]
        size = element_size * count
        for data, offsets, lanes in self.locate(ins, space, addresses, size, "write"):
            elements = np.empty((len(offsets), count), dtype)
            for k, value in enumerate(values):
                per_lane = np.broadcast_to(value, (self.batch.lanes,))
                elements[:, k] = per_lane if lanes is None else per_lane[lanes]
            if self.batch.races and data is self.shared:
                access_lanes = self._all_lanes if lanes is None else lanes
                raw = elements.view(np.uint8).reshape(len(offsets), size)
                self.batch.races.write(ins, offsets, access_lanes, size, values=raw)
            data.view(dtype).reshape(-1, count)[offsets // size] = elements

    def atomic(self, ins, space, addresses, size, operand, second, update):
        """Return the old values. Lanes that meet at one address take turns in lane order."""
        dtype = UNSIGNED[size * 8]
        old_values = np.zeros(self.batch.lanes, dtype)
        for data, offsets, lanes in self.locate(ins, space, addresses, size, "atomic"):
            elements, index = data.view(dtype), offsets // size
            lanes = self._all_lanes if lanes is None else lanes
            order, turn = _turns(index)
            for this_turn in range(int(turn.max()) + 1):
                chosen = order[turn == this_turn]
                old, chosen_lanes = elements[index[chosen]], lanes[chosen]
                old_values[chosen_lanes] = old
                new = None if second is None else second[chosen_lanes]
                elements[index[chosen]] = update(old, operand[chosen_lanes], new)
        return old_values

    # ---- 8 x 8 matrices of 16-bit elements

    def _matrix_rows(self, ins, space, addresses, count, access):
        """Return (offset of each 16-byte row, the lane that names it): lanes 0 to 8 * count - 1 of active warps."""
        warps = self.batch.active.reshape(-1, 32).any(1)[:, None]
        with self.batch.restricted_to((warps & (np.arange(32) < 8 * count)).ravel()):
            if space == "generic":
                named = addresses[self.batch.active].astype(np.uint64)
                if not in_window(named, SHARED_BASE).all():
                    raise MemoryFault(f"matrix address is not in shared memory: {ins.where}")
                addresses = addresses - np.uint64(SHARED_BASE)
            ((_, offsets, lanes),) = self.locate(ins, "shared", addresses, 16, access)
        return offsets, self._all_lanes if lanes is None else lanes

    def load_matrices(self, ins, space, addresses, count):
        """Return the matrices, uint16[warps, count, 8, 8]."""
        offsets, lanes = self._matrix_rows(ins, space, addresses, count, "read")
        rows = np.zeros((self.batch.lanes // 32, 8 * count, 8), np.uint16)
        rows[lanes // 32, lanes % 32] = self.shared.view(np.uint16).reshape(-1, 8)[offsets // 16]
        return rows.reshape(-1, count, 8, 8)

    def store_matrices(self, ins, space, addresses, count, matrices):
        offsets, lanes = self._matrix_rows(ins, space, addresses, count, "write")
        rows = matrices.reshape(-1, 8 * count, 8)[lanes // 32, lanes % 32]
        if self.batch.races:
            raw = np.ascontiguousarray(rows).view(np.uint8).reshape(len(offsets), 16)
            self.batch.races.write(ins, offsets, lanes, 16, values=raw)
        self.shared.view(np.uint16).reshape(-1, 8)[offsets // 16] = rows


def _turns(index):
    """Return (order that sorts ``index``, position of each sorted element among its equals)."""
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    position = np.arange(len(ordered))
    starts = np.r_[True, ordered[1:] != ordered[:-1]]
    return order, position - np.maximum.accumulate(np.where(starts, position, 0))


def shared_stride(shared_size):
    """Bytes between the shared memories of two blocks of a batch."""
    return max(64, align_up(shared_size, 64))
