"""The execution engine: which lanes run next, divergence, reconvergence, warp-synchronous instructions, barriers.

Every lane has a pc. The lanes at the lowest pc run together until they branch apart, block, or reach the pc of other
lanes, with which they then reconverge. That order is one of those the PTX memory model allows; options schedule=
"random" and "reverse" give others, one warp at a time.
"""

import numpy as np

from .compiler import WHOLE_WARP, WHOLE_WARPGROUP, Kind
from .errors import Deadlock, EmulatorError

RUNNING, AT_BARRIER, DONE, AT_WARP_SYNC = range(4)  # states of a lane

_NOWHERE = 1 << 60  # a pc beyond every instruction
_SPINS_BEFORE_YIELDING = 1000


class Frame:
    """One function being executed by some lanes of a batch."""

    def __init__(self, batch, function, mask):
        self.batch, self.function, self.code = batch, function, function.code
        for ins, message in function.never_written:
            batch.warn(ins, message)
        self.pc = np.zeros(batch.lanes, np.int64)
        self.state = np.where(mask, RUNNING, DONE)
        self.barrier_id, self.barrier_threads, self.barrier_pc = (np.zeros(batch.lanes, np.int64) for _ in range(3))
        self.yielding = None  # lanes that were spinning: the others go first
        self.group = self.write_mask = None  # see _set_group
        self.group_size = self.group_warps = self.backward_jumps = 0
        self.others_wait = False

    def run(self):
        while True:
            runnable = self.state == RUNNING
            if runnable.any():
                self._run_group(self._choose(runnable))
            elif (self.state == DONE).all():
                return
            else:
                self._release_waiting()

    def _choose(self, runnable):
        """The lanes among which the lowest pc is sought."""
        chosen = runnable
        if self.yielding is not None:
            chosen = runnable & ~self.yielding
            if not chosen.any():
                chosen, self.yielding = runnable, None
        schedule = self.batch.options.schedule
        if schedule != "lockstep":
            warps = np.unique(np.flatnonzero(chosen) >> 5)
            warp = int(warps[-1] if schedule == "reverse" else self.batch.launch.generator.choice(warps))
            one_warp = np.zeros(self.batch.lanes, bool)
            lanes = slice(32 * warp, 32 * warp + 32)
            one_warp[lanes] = chosen[lanes]
            return one_warp
        return chosen

    # ---- the group being executed

    def _set_group(self, group):
        """``write_mask`` is None where every live lane of this function runs: dead lanes' registers do not matter."""
        self.group, self.group_size = group, int(np.count_nonzero(group))
        self.group_warps = int(np.count_nonzero(group.reshape(-1, 32).any(1)))
        all_live = self.group_size == int(np.count_nonzero(self.state != DONE))
        self.write_mask = None if all_live else group
        self.batch.set_active(group, self.group_size == self.batch.lanes)

    def _run_group(self, chosen):
        """Run the chosen lanes of lowest pc, for as long as they stay together and below everybody else."""
        pc, state, code, batch, registers = self.pc, self.state, self.code, self.batch, self.batch.registers
        ip = int(pc[chosen].min())
        group = (pc == ip) & (chosen | (state == AT_WARP_SYNC))
        state[group] = RUNNING
        self._set_group(group)
        others = (state == RUNNING) & ~group
        self.others_wait = bool(others.any())
        waiting_pcs = pc[others & chosen]
        stop = int(waiting_pcs.min()) if waiting_pcs.size else _NOWHERE
        self.backward_jumps = 0

        warp_counts, thread_counts = batch.launch.counters.of_function(self.function)
        max_steps, trace = batch.options.max_steps, batch.options.trace
        plain, branch, end = Kind.PLAIN, Kind.BRANCH, len(code)
        while True:
            if ip >= end:
                state[self.group] = DONE
                return
            ins = code[ip]
            size = self.group_size
            warp_counts[ip] += self.group_warps
            thread_counts[ip] += size
            batch.steps += 1
            if batch.steps > max_steps:
                raise EmulatorError(f"more than {max_steps} steps, an endless loop? at {ins.where}")
            guard = ins.guard
            if guard is None:
                taken, taken_size = self.group, size
            else:
                predicate = registers[guard[0]]
                taken = (~predicate if guard[1] else predicate) & self.group
                taken_size = int(np.count_nonzero(taken))
            if trace:
                trace(batch, ins, taken)
            kind = ins.kind
            if kind is plain:
                if taken_size == size:
                    ins.run(batch, self.write_mask)
                elif taken_size:
                    self._run_for(ins, taken)
                ip += 1
            elif kind is branch:
                ip = self._branch(ins, taken, taken_size)
            else:
                ip = self._CONTROL[kind](self, ins, taken, taken_size)
            if ip is None:
                return
            if ip >= stop:
                pc[self.group] = ip
                return

    # Each of these returns the pc at which the whole group goes on, or None after setting the lanes' own pc.

    def _run_for(self, ins, lanes):
        """Execute for some lanes of the group."""
        batch = self.batch
        active, selected = batch.active, batch.selected
        batch.active = batch.selected = lanes
        ins.run(batch, lanes)
        batch.active, batch.selected = active, selected

    def _part(self, lanes, target, ins):
        """``lanes`` go on at ``target``, the rest of the group behind ``ins``."""
        self.pc[lanes] = target[lanes] if isinstance(target, np.ndarray) else target
        self.pc[self.group & ~lanes] = ins.index + 1

    def _branch(self, ins, taken, taken_size):
        if taken_size == 0:
            return ins.index + 1
        if taken_size < self.group_size:
            return self._part(taken, ins.target, ins)
        if ins.target <= ins.index:
            self.backward_jumps += 1
            if self.others_wait and self.backward_jumps > _SPINS_BEFORE_YIELDING:
                self.pc[self.group] = ins.target
                self.yielding = self.group
                return None
        return ins.target

    def _indexed_branch(self, ins, taken, taken_size):
        return self._part(taken, ins.run(self.batch, None), ins)

    def _return(self, ins, taken, taken_size):
        self.state[taken] = DONE
        if ins.target == "exit" or not self.batch.in_call:
            self.batch.alive[taken] = False
        if taken_size < self.group_size:
            self.pc[self.group & ~taken] = ins.index + 1

    def _call(self, ins, taken, taken_size):
        if taken_size == 0:
            return ins.index + 1
        with self.batch.restricted_to(taken):
            ins.run(self.batch, taken)
        dead = self.group & ~self.batch.alive
        if not dead.any():
            return ins.index + 1
        self.state[dead] = DONE
        self.pc[self.group & ~dead] = ins.index + 1
        return None

    def _warp_sync(self, ins, taken, taken_size):
        if self.write_mask is not None:
            blocked = self._not_yet_together(ins, self.group)
            if blocked is not None:
                self.state[blocked], self.pc[blocked] = AT_WARP_SYNC, ins.index
                rest = self.group & ~blocked
                self.pc[rest] = ins.index
                if not rest.any():
                    return None
                self._set_group(rest)
                self.others_wait = True
                taken = taken & rest
                taken_size = int(np.count_nonzero(taken))
        if taken_size == self.group_size:
            ins.run(self.batch, self.write_mask)
        elif taken_size:
            self._run_for(ins, taken)
        return ins.index + 1

    def _barrier(self, ins, taken, taken_size):
        batch, barrier = self.batch, ins.barrier
        everyone = taken_size == self.group_size == int(np.count_nonzero(batch.alive))
        if barrier.action == "sync" and barrier.threads is None and everyone:
            batch.epoch += 1
            return ins.index + 1
        identifiers = barrier.identifier(batch)
        self.pc[self.group] = ins.index + 1
        if barrier.action == "arrive":
            for block in np.unique(batch.block_index[taken]):
                here = taken & (batch.block_index == block)
                key = (int(block), int(identifiers[here][0]))
                batch.arrived[key] = batch.arrived.get(key, 0) + int(np.count_nonzero(here))
            return None
        self.state[taken] = AT_BARRIER
        self.barrier_id[taken] = identifiers[taken]
        self.barrier_threads[taken] = barrier.threads(batch)[taken] if barrier.threads else 0
        self.barrier_pc[taken] = ins.index
        return None

    _CONTROL = {
        Kind.INDEXED_BRANCH: _indexed_branch,
        Kind.RETURN: _return,
        Kind.CALL: _call,
        Kind.WARP_SYNC: _warp_sync,
        Kind.BARRIER: _barrier,
    }

    # ---- waiting

    def _not_yet_together(self, ins, group):
        """Lanes of the group that must wait because a live lane they name has not arrived, or None."""
        batch = self.batch
        if ins.members is WHOLE_WARP or ins.members is WHOLE_WARPGROUP:
            size = 32 if ins.members is WHOLE_WARP else 128
            here, alive = group.reshape(-1, size), batch.alive.reshape(-1, size)
            incomplete = (alive & ~here).any(1) & here.any(1)
            blocked = np.repeat(incomplete, size) & group
        else:
            here, alive = group.reshape(-1, 32), batch.alive.reshape(-1, 32)
            missing = (alive & ~here)[:, None, :]
            blocked = ((batch.member_bits(ins) & missing).any(2) & here).ravel()
        return blocked if blocked.any() else None

    def _release_waiting(self):
        """If nobody can run, release the lanes whose wait is over."""
        released = self._release_warp_syncs()
        released = self._release_barriers() or released
        if not released:
            raise Deadlock(self._describe_deadlock())

    def _release_warp_syncs(self):
        released = False
        waiting = self.state == AT_WARP_SYNC
        for pc in np.unique(self.pc[waiting]):
            group = waiting & (self.pc == pc)
            self.batch.set_active(group)
            blocked = self._not_yet_together(self.code[int(pc)], group)
            free = group if blocked is None else group & ~blocked
            if free.any():
                self.state[free] = RUNNING
                released = True
        return released

    def _release_barriers(self):
        released, batch = False, self.batch
        waiting = self.state == AT_BARRIER
        for block in np.unique(batch.block_index[waiting]):
            in_block = batch.block_index == block
            for identifier in np.unique(self.barrier_id[waiting & in_block]):
                lanes = waiting & in_block & (self.barrier_id == identifier)
                key = (int(block), int(identifier))
                if not self._is_complete(lanes, in_block, key):
                    continue
                batch.arrived.pop(key, None)
                self._pass_barrier(lanes)
                batch.epoch[block] += 1
                released = True
        return released

    def _is_complete(self, lanes, in_block, key):
        named = int(self.barrier_threads[lanes].max())
        if named:  # a count of threads, but hardware counts whole warps
            here, expected = 32 * int(np.count_nonzero(lanes.reshape(-1, 32).any(1))), named
        else:
            here, expected = int(lanes.sum()), int(np.count_nonzero(self.batch.alive & in_block))
        return here + self.batch.arrived.get(key, 0) >= expected

    def _pass_barrier(self, lanes):
        batch = self.batch
        places = np.unique(self.barrier_pc[lanes])
        for pc in places:
            ins = self.code[int(pc)]
            here = lanes & (self.barrier_pc == pc)
            by_warp = here.reshape(-1, 32)
            absent = batch.alive.reshape(-1, 32) & ~by_warp
            if (by_warp.any(1) & absent.any(1)).any():
                batch.warn(ins, "barrier executed by a diverged warp")
            barrier = ins.barrier
            if barrier.reduction:
                values = np.broadcast_to(barrier.predicate(batch), (batch.lanes,))[lanes]
                if barrier.reduction == "popc":
                    result = np.uint32(values.sum())
                else:
                    result = np.bool_(values.all() if barrier.reduction == "and" else values.any())
                barrier.put_result(batch, here, np.full(batch.lanes, result))
        if len(places) > 1:
            batch.warn(self.code[int(places[0])], "threads met one barrier at different bar instructions")
        self.state[lanes] = RUNNING

    def _describe_deadlock(self):
        parts = []
        for state, name, pcs in ((AT_BARRIER, "barrier", self.barrier_pc), (AT_WARP_SYNC, "warp sync", self.pc)):
            for pc in np.unique(pcs[self.state == state]):
                lanes = np.flatnonzero((self.state == state) & (pcs == pc))
                first = self.batch.describe_lane(int(lanes[0]))
                parts.append(f"{len(lanes)} lanes (first: {first}) wait in a {name} at {self.code[int(pc)].where}")
        return "deadlock: " + "; ".join(parts)
