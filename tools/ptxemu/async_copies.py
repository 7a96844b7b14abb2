"""cp.async: copies that land in shared memory eagerly, or lazily at the wait that the issuing thread makes for them.

Lazy landing finds missing waits: until a thread waits, its copies have not happened (PTX ISA 9.7.9.25,
"Data movement and conversion: asynchronous copy").
"""

from dataclasses import dataclass

import numpy as np

from .address_space import WINDOW_SHIFT
from .errors import MemoryFault
from .parser import Instruction


@dataclass
class _Pending:
    ins: Instruction
    lanes: np.ndarray
    offsets: np.ndarray
    data: np.ndarray  # uint8[lanes, size]
    group: np.ndarray  # commit group of each lane's copy

    def keep(self, chosen):
        self.lanes, self.offsets = self.lanes[chosen], self.offsets[chosen]
        self.data, self.group = self.data[chosen], self.group[chosen]


class AsyncCopies:
    def __init__(self, batch):
        self.batch = batch
        self.lazy = batch.options.async_mode == "lazy"
        self.pending: list[_Pending] = []
        self._group = np.zeros(batch.lanes, np.int64)  # commit groups closed so far, per lane

    def issue(self, ins, destinations, sources, size, source_sizes):
        """Copy ``size`` bytes per active lane: ``source_sizes`` (None: all) of them are read, the rest are zero."""
        batch = self.batch
        lanes = np.flatnonzero(batch.active)
        if source_sizes is not None and (source_sizes[lanes] > size).any():
            raise MemoryFault(f"cp.async reads more bytes than it copies: {ins.where}")
        data = self._read_source(ins, sources, size, source_sizes)[lanes]
        shared_addresses = (
            destinations.dtype == np.uint32 or not (destinations[lanes] >> destinations.dtype.type(WINDOW_SHIFT)).any()
        )
        space = "shared" if shared_addresses else "generic"
        ((_, offsets, _),) = batch.memory.locate(ins, space, destinations, size, "copy")
        if batch.races:
            batch.races.copy_issued(ins, offsets, lanes, size)
        if not self.lazy:
            self._land(offsets, data)
        if self.lazy or batch.races:
            self.pending.append(_Pending(ins, lanes, offsets, data, self._group[lanes].copy()))

    def _read_source(self, ins, sources, size, source_sizes):
        batch = self.batch
        data = np.zeros((batch.lanes, size), np.uint8)
        full = batch.active if source_sizes is None else batch.active & (source_sizes >= size)
        if full.any():
            with batch.restricted_to(full):
                raw = batch.memory.load(ins, "global", sources, 4, size // 4)
            data[full] = np.stack(raw, 1).view(np.uint8).reshape(batch.lanes, size)[full]
        if source_sizes is None:
            return data
        partial = batch.active & (source_sizes < size) & (source_sizes > 0)
        for byte in range(int(source_sizes[partial].max()) if partial.any() else 0):
            wanted = partial & (source_sizes > byte)
            with batch.restricted_to(wanted):
                (raw,) = batch.memory.load(ins, "global", sources + sources.dtype.type(byte), 1, 1)
            data[wanted, byte] = raw[wanted]
        return data

    def _land(self, offsets, data):
        size = data.shape[1]
        self.batch.memory.shared.reshape(-1, size)[offsets // size] = data

    def commit(self):
        self._group[self.batch.active] += 1

    def wait(self, groups_left):
        """Land the active lanes' copies, except those of their ``groups_left`` latest groups (None: all copies)."""
        still_pending = []
        for copy in self.pending:
            done = self.batch.active[copy.lanes]
            if groups_left is not None:
                done &= copy.group < self._group[copy.lanes] - groups_left
            if done.any():
                if self.lazy:
                    self._land(copy.offsets[done], copy.data[done])
                if self.batch.races:
                    size = copy.data.shape[1]
                    self.batch.races.copy_landed(copy.ins, copy.offsets[done], copy.lanes[done], size)
                if done.all():
                    continue
                copy.keep(~done)
            still_pending.append(copy)
        self.pending = still_pending

    def warn_if_never_waited_for(self):
        if self.pending:
            message = "kernel ended with cp.async copies that were never waited for"
            self.batch.warn(self.pending[0].ins, message)
