"""A batch: some thread blocks executed together, every register one numpy vector with an element per thread.

The blocks of a batch share nothing but global memory. Blocks are padded to whole warps; lanes that pad never live.
"""

import contextlib

import numpy as np

from .async_copies import AsyncCopies
from .compiler import WHOLE_WARP, compile_function
from .engine import Frame
from .errors import EmulatorError, UnsupportedInstruction
from .memory import POISON, BatchMemory, shared_stride
from .parameters import ParameterSpace
from .ptx_types import TYPES, UNSIGNED, decoder
from .races import RaceDetector

_MAX_CALL_DEPTH = 64
_LANE_BITS = np.arange(32, dtype=np.uint32)
_TIMERS = ("%clock", "%globaltimer")


class Batch:
    """State of the running lanes.

    ``active`` marks the lanes executing the current instruction and ``selected`` is the same, or None when it would
    be all lanes: most accesses then skip a gather. Handlers in instructions/ use these, ``registers`` and the parts
    ``memory``, ``copies``, ``parameters`` and ``races``.
    """

    def __init__(self, launch, block_ids, first_block):
        self.launch, self.options = launch, launch.options
        self.block_ids, self.first_block, self.blocks = block_ids, first_block, len(block_ids)
        self.lanes_per_block = launch.lanes_per_block
        self.lanes = self.blocks * self.lanes_per_block

        in_block = np.arange(self.lanes_per_block)
        self.thread_in_block = np.tile(in_block, self.blocks)
        self.block_index = np.repeat(np.arange(self.blocks), self.lanes_per_block)
        self.lane_in_warp = self.thread_in_block & 31
        self.warp_start = np.arange(self.lanes) // 32 * 32
        self.alive = self.thread_in_block < launch.threads

        self.registers = None
        self.active = self.alive.copy()
        self.selected = None
        self.carry = np.zeros(self.lanes, bool)  # CC.CF
        self.steps = launch.steps
        self.arrived = {}  # (block, barrier id) -> threads that passed a bar.arrive
        self.epoch = np.zeros(self.blocks, np.int32)  # block barriers passed
        self.warp_epoch = np.zeros(self.lanes // 32, np.int32)
        self._special = {}
        self._depth = 0
        self.frame = None

        self.shared_stride = shared_stride(launch.shared_size)
        self.shared_start = self.block_index * self.shared_stride
        self.memory = BatchMemory(self)
        self.copies = AsyncCopies(self)
        self.races = RaceDetector(self) if self.options.detect_races else None
        self.parameters = ParameterSpace(*launch.parameter_values, self.lanes, launch.kernel.name)
        # A register holds this until written; never changed in place.
        self.poison = {
            bits: np.full(self.lanes, True)
            if bits == 1
            else np.full(self.lanes * bits // 8, POISON, np.uint8).view(dtype)
            for bits, dtype in UNSIGNED.items()
        }

    def run(self):
        self._run_function(self.launch.kernel, self.alive.copy())
        self.copies.warn_if_never_waited_for()
        self.launch.steps = self.steps

    def _run_function(self, function, mask):
        compile_function(function)  # which also names the registers
        saved = (self.registers, self.selected, self.active, self.frame)
        self.registers = [self.poison[bits] for bits in function.register_bits]
        self.frame = Frame(self, function, mask)
        self.frame.run()
        self.registers, self.selected, self.active, self.frame = saved

    # ---- what instructions ask for

    def symbol_address(self, name):
        address = self.launch.symbols.get(name)
        if address is None:
            raise EmulatorError(f"kernel {self.launch.kernel.name} uses unknown symbol {name}")
        return address

    def special_register(self, name, dtype):
        """%tid.x and the like (PTX ISA 10), one element per lane."""
        if name.startswith(_TIMERS):
            return np.full(self.lanes, self.steps).astype(dtype)
        values = self._special.get((name, dtype))
        if values is None:
            values = np.broadcast_to(np.asarray(self._compute_special(name)), (self.lanes,)).astype(dtype)
            self._special[name, dtype] = values
        return values

    def _compute_special(self, name):
        base, _, component = name.partition(".")
        axis = "xyz".index(component) if component in ("x", "y", "z") else 0
        launch = self.launch
        x, y, _ = launch.block
        if base == "%tid":
            t = self.thread_in_block
            return (t % x, t // x % y, t // (x * y))[axis]
        if base in ("%ctaid", "%clusterid"):
            return np.array([block[axis] for block in self.block_ids])[self.block_index]
        if base.startswith("%lanemask_"):
            one = np.uint64(1)
            lane = self.lane_in_warp.astype(np.uint64)
            bit = one << lane
            below = bit - one
            everything = np.uint64(0xFFFFFFFF)
            masks = {
                "eq": bit,
                "lt": below,
                "le": below | bit,
                "gt": everything & ~(below | bit),
                "ge": everything & ~below,
            }
            return masks[base.rpartition("_")[2]]
        scalars = {
            "%ntid": launch.block[axis],
            "%nctaid": launch.grid[axis],
            "%nclusterid": launch.grid[axis],
            "%laneid": self.lane_in_warp,
            "%warpid": self.thread_in_block // 32,
            "%nwarpid": self.lanes_per_block // 32,
            "%nsmid": launch.device.sm_count,
            "%smid": 0,
            "%gridid": 0,
            "%dynamic_smem_size": launch.dynamic_shared,
            "%total_smem_size": launch.shared_size,
            "%cluster_nctaid": 1,
            "%cluster_nctarank": 1,
            "%cluster_ctaid": 0,
            "%cluster_ctarank": 0,
            "%is_explicit_cluster": 0,
        }
        if base not in scalars:
            raise UnsupportedInstruction(f"special register {name}, in kernel {launch.kernel.name}")
        return scalars[base]

    def members(self, ins):
        """bool[warps, 32 or 1, 32]: which executing lanes are in the membermask group of each lane."""
        active = self.active.reshape(-1, 1, 32)
        if ins.members is WHOLE_WARP:
            return active
        mask = ins.members(self)
        if np.ndim(mask) == 0 and int(mask) == 0xFFFFFFFF:
            return active
        return self.member_bits(ins) & active

    def member_bits(self, ins):
        """bool[warps, 32, 32]: the membermask each lane gives, bit by bit."""
        masks = np.broadcast_to(ins.members(self), (self.lanes,)).reshape(-1, 32, 1)
        return ((masks >> _LANE_BITS) & np.uint32(1)) != 0

    def count_warp_sync(self):
        self.warp_epoch[self.active.reshape(-1, 32).any(1)] += 1

    def set_active(self, mask, everyone=None):
        self.active = mask
        everyone = mask.all() if everyone is None else everyone
        self.selected = None if everyone else mask

    @contextlib.contextmanager
    def restricted_to(self, mask):
        """Run a part of an instruction for some of its lanes only."""
        saved = (self.active, self.selected)
        self.set_active(mask)
        try:
            yield
        finally:
            self.active, self.selected = saved

    def register(self, name, t):
        """Values of a PTX register in the running function, decoded as type t ("f32"): for trace callbacks."""
        registers = self.frame.function.registers
        index = next(register.index for (other, _), register in registers.items() if other == name)
        return decoder(TYPES[t])(self.registers[index])

    def warn(self, ins, message):
        self.launch.hazards.warn(ins, message)

    def describe_lane(self, lane=None):
        lane = int(np.flatnonzero(self.active)[0]) if lane is None else lane
        t, (x, y, _) = int(self.thread_in_block[lane]), self.launch.block
        block = ",".join(str(i) for i in self.block_ids[int(self.block_index[lane])])
        return f"block ({block}) thread ({t % x},{t // x % y},{t // (x * y)})"

    # ---- device function calls

    def call(self, ins, name, results, arguments):
        function = self.launch.module.functions.get(name)
        space = self.parameters
        if name == "vprintf":
            space.call_values[results[0]] = np.zeros((self.lanes, 4), np.uint8)  # prints nothing
            return
        if name == "__assertfail":
            raise EmulatorError(f"device assert failed in {self.describe_lane()}: {ins.where}")
        if function is None or not function.code:
            raise UnsupportedInstruction(f"call of {name}, whose code is not in the PTX: {ins.where}")
        if self._depth == _MAX_CALL_DEPTH:
            raise EmulatorError(f"calls nested deeper than {_MAX_CALL_DEPTH}: {ins.where}")
        caller_values = space.call_values
        space.call_values = {
            p.name: caller_values[argument] for p, argument in zip(function.parameters, arguments, strict=True)
        }
        for p in function.returns:
            space.call_values[p.name] = np.zeros((self.lanes, p.size), np.uint8)
        self._depth += 1
        self._run_function(function, self.active.copy())
        self._depth -= 1
        for p, result in zip(function.returns, results, strict=True):
            returned, before = space.call_values[p.name], caller_values.get(result)
            if before is not None and before.shape == returned.shape:  # other lanes may have called before
                returned = np.where(self.active[:, None], returned, before)
            caller_values[result] = returned
        space.call_values = caller_values

    @property
    def in_call(self):
        return self._depth > 0
