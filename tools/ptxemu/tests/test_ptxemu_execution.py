"""Control flow and cooperation between threads: divergence, calls, warps, barriers, atomics, orders of execution."""

import numpy as np
import pytest
from ptx_kernels import HEADER, cuda_module, needs_nvcc
from ptxemu import Deadlock, EmulatorError, RaceError, load

pytestmark = needs_nvcc

TOO_FEW = load(
    HEADER.format(arch="80")
    + """
.visible .entry too_few() { bar.sync 1, 96; ret; }
"""
)

_SPECIAL = ("laneid", "warpid", "nwarpid", "lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge")
SPECIAL = load(
    HEADER.format(arch="80")
    + f"""
.visible .entry special(.param .u64 to) {{
  .reg .b64 p; .reg .b32 i, v;
  mov.u32 i, %tid.x; ld.param.u64 p, [to]; mad.wide.u32 p, i, {4 * len(_SPECIAL)}, p;
  {" ".join(f"mov.u32 v, %{name}; st.global.u32 [p+{4 * k}], v;" for k, name in enumerate(_SPECIAL))}
  ret;
}}
"""
)

# Odd threads meet the barrier elsewhere than even ones: each kernel's barrier is divergent.
DIVERGED = load(
    HEADER.format(arch="80")
    + """
.visible .entry diverged() {
  .reg .pred odd; .reg .b32 i;
  mov.u32 i, %tid.x; and.b32 i, i, 1; setp.ne.u32 odd, i, 0;
  @odd bra ELSE; bar.sync 0; bra END; ELSE: bar.sync 0; END: ret;
}
"""
)

LANE = np.arange(32)


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def kernels():
    return cuda_module("execution.cu")


def bits(rows):
    """bool[..., n] -> the integer whose bit i is column i."""
    return [sum(1 << i for i, bit in enumerate(row) if bit) for row in rows]


def collatz_steps(v):
    steps = 0
    while v != 1:
        v = 3 * v + 1 if v & 1 else v >> 1
        steps += 1
        if steps > 200:
            break
    return steps


def test_threads_that_part_come_together_again(kernels, random):
    """A kernel with loops of different lengths per thread would give wrong numbers, or never end."""
    x, steps = random.integers(1, 5000, 300).astype(np.int32), np.zeros(300, np.int32)
    kernels.launch("collatz", 3, 128, [x, steps, 300])
    assert steps.tolist() == [collatz_steps(int(v)) for v in x]


def test_calls_and_recursion(kernels):
    """Functions that nvcc does not inline must still return to their own callers, thread by thread."""
    y = np.zeros(64, np.int32)
    kernels.launch("recursion", 1, 64, [y])
    assert y.tolist() == [(0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89)[i % 12] for i in range(64)]


def test_local_arrays_are_private(kernels, random):
    """A spilled array that leaked into another thread's would corrupt decoded weights."""
    x, y = random.integers(0, 100, 16).astype(np.int32), np.zeros(64, np.int32)
    kernels.launch("local_array", 1, 64, [x, y])
    for t in range(64):
        a = {(j * 7 + t) & 15: int(x[j]) + j for j in range(16)}
        expected = 0
        for j in range(t & 15):
            expected = (expected * 3 + a[int(x[j]) & 15]) & 0xFFFFFFFF
        assert int(y.view(np.uint32)[t]) == expected


def test_block_and_thread_coordinates(kernels):
    """Swapped x, y or z would make every tile land in the wrong place."""
    y = np.zeros(2 * 3 * 2 * 60, np.int32)
    kernels.launch("coordinates", (2, 3, 2), (5, 4, 3), [y])
    bz, by, bx, tz, ty, tx = np.meshgrid(*map(np.arange, (2, 3, 2, 3, 4, 5)), indexing="ij")
    expected = tx + 10 * ty + 100 * tz + 1000 * bx + 10000 * by + 100000 * bz
    np.testing.assert_array_equal(y, expected.ravel())


def test_a_barrier_in_a_diverged_warp_is_warned_of():
    """Undefined before sm_70 and slow after: __syncthreads inside a branch is a mistake."""
    warnings = "\n".join(DIVERGED.launch("diverged", 1, 32, []).warnings)
    assert "barrier executed by a diverged warp" in warnings
    assert "threads met one barrier at different bar instructions" in warnings


@pytest.mark.parametrize("schedule", ["lockstep", "random", "reverse"])
def test_warp_operations(kernels, random, schedule):
    """Absmax and dot products are reduced through shuffles: each must read exactly the lane it names."""
    x, out = random.integers(0, 100, 64).astype(np.int32), np.zeros(14 * 64, np.uint32)
    result = kernels.launch("warp_operations", 1, 64, [x, out], schedule=schedule)
    assert not result.warnings
    out = out.reshape(14, 2, 32)
    for w, v in enumerate(x.reshape(2, 32)):
        odd, eight = (v & 1) == 1, LANE[:, None] // 8 == LANE[None, :] // 8
        expected = [
            bits([odd]) * 32,
            np.where(LANE >= 3, v[np.maximum(LANE - 3, 0)], v),
            v[LANE & ~7 | 5],
            np.where((LANE & 15) + 2 < 16, v[np.minimum(LANE + 2, 31)], v),
            v[LANE ^ 5],
            [v.sum()] * 32,
            [v.max()] * 32,
            bits((v & 3)[:, None] == (v & 3)[None, :]),
            [int((v < 1000).all()) + 2 * int((v > 90).any())] * 32,
            np.where(LANE < 10, int(v[9]) + (bits([v[:10] & 2])[0] << 16), 0),
            (eight * v).sum(1),
            bits(eight & odd[None, :]),
            [int((x & 1).sum()) + 1000 + 10000] * 32,
        ]
        for row, values in enumerate(expected):
            np.testing.assert_array_equal(out[row, w], values, err_msg=f"row {row}")
        if schedule == "lockstep":
            np.testing.assert_array_equal(out[13, w], np.where(LANE & 1, 0xAAAAAAAA, 0xFFFFFFFF))


def test_block_reduction(kernels, random):
    """Shuffles, shared memory and a barrier together, over a grid that does not divide the data."""
    x, y = random.random(5000, np.float32), np.zeros(3, np.float32)
    result = kernels.launch("block_sum", 3, 256, [x, y, 5000])
    np.testing.assert_allclose(y.sum(), x.sum(dtype=np.float64), rtol=1e-5)
    assert not result.warnings


def test_atomics(kernels, random):
    """Two lanes that add to one address must both count; a lost update is a wrong split-K sum."""
    x, counts = random.integers(0, 256, 3000).astype(np.uint8), np.zeros(16, np.int32)
    kernels.launch("histogram", 4, 128, [x, counts, 3000])
    np.testing.assert_array_equal(counts, np.bincount(x & 15, minlength=16))
    a, f, u = np.zeros(6, np.int32), np.zeros(1, np.float32), np.zeros(1, np.uint64)
    kernels.launch("atomics", 1, 64, [a, f, u])
    t = np.arange(64)
    assert a.tolist() == [(t * 37 % 101).max(), -63, -1, 0, 64 % 11, 2 * t.sum()]
    assert f[0] == 0.5 * t.sum() and u[0] == 64 << 33


@pytest.mark.parametrize("batch_blocks", [None, 3])
def test_the_last_block_sums_up(kernels, random, batch_blocks):
    """The way split-K kernels finish: right however the blocks are spread over time."""
    x = random.random(32 * 20, np.float32)
    partial, out, arrived = np.zeros(20, np.float32), np.zeros(1, np.float32), np.zeros(1, np.uint32)
    kernels.launch("last_block", 20, 32, [x, partial, out, arrived], batch_blocks=batch_blocks)
    np.testing.assert_allclose(out[0], x.sum(), rtol=1e-5)


def test_named_barriers(kernels, random):
    """Producer and consumer warps that meet at bar.arrive and bar.sync."""
    x, y = random.integers(0, 99, 64).astype(np.int32), np.zeros(64, np.int32)
    kernels.launch("named_barriers", 1, 128, [x, y])
    np.testing.assert_array_equal(y, x[::-1])


def test_spinning_threads_let_others_run(kernels):
    """A wait on a flag must end once another warp sets it, as it does on a GPU."""
    y = np.arange(128, dtype=np.int32)
    kernels.launch("spin", 1, 64, [y], detect_races=False, max_steps=100_000)
    np.testing.assert_array_equal(y[:32], np.arange(64, 114).sum() + 7)


def test_threads_that_left_do_not_hold_up_a_barrier(kernels):
    """Kernels return early for rows past the end; those behind them must get through __syncthreads."""
    y = np.zeros(64, np.int32)
    kernels.launch("leave_early", 1, 64, [y])
    np.testing.assert_array_equal(y, np.where(np.isin(np.arange(64), (3, 5)), 0, 2))


def test_schedules_show_order_dependence(kernels):
    """A result that depends on which warp runs first is a bug no single order can show."""
    x = np.full((3, 512), -1, np.int32)
    for row, schedule in zip(x, ("lockstep", "reverse", "random"), strict=True):
        kernels.launch("order_dependent", 1, 128, [row], schedule=schedule, seed=1)
    t = np.arange(128)
    assert (x[0, 256:384] == -1).all()  # everybody reads before anybody writes
    np.testing.assert_array_equal(x[1, 256:384], np.where(t < 64, t ^ 96, -1))  # the last two warps come first
    assert set(np.unique(x[2, 256:384] == -1).tolist()) == {True, False}


def test_only_the_blocks_asked_for_run(kernels):
    """Counting runs of large grids use a few blocks; the others' output must stay as it was."""
    y = np.zeros(4 * 60, np.int32)
    result = kernels.launch("coordinates", 4, (5, 4, 3), [y], blocks=[2])
    assert result.blocks == 1 and y.reshape(4, 60)[2].all() and not y.reshape(4, 60)[[0, 1, 3]].any()
    kernels.launch("coordinates", 4, (5, 4, 3), [y], blocks=lambda grid: [(grid[0] - 1, 0, 0)])
    assert y.reshape(4, 60)[3].all() and not y.reshape(4, 60)[[0, 1]].any()


def test_trace_sees_every_instruction(kernels):
    """The way to find the first wrong register of a kernel."""
    seen = []

    def trace(batch, ins, lanes):
        if ins.opcode.startswith("st.global"):
            seen.append((ins.location[0], int(lanes.sum()), batch.register(ins.operands[1], "s32")[:3].tolist()))

    kernels.launch("recursion", 1, 32, [np.zeros(32, np.int32)], trace=trace)
    assert seen == [("execution.cu", 32, [0, 1, 1])]


def test_a_named_barrier_counts_its_threads():
    """A barrier for more threads than will come hangs a GPU; it must not open early here."""
    with pytest.raises(Deadlock, match=r"64 lanes .* wait in a barrier at kernel too_few"):
        TOO_FEW.launch("too_few", 1, 64, [])
    TOO_FEW.launch("too_few", 1, 96, [])


def test_special_registers():
    """Lane masks choose who writes after a ballot: one bit off, and two lanes share a slot."""
    out = np.zeros((80, len(_SPECIAL)), np.uint32)
    SPECIAL.launch("special", 1, 80, [out])
    for t, row in enumerate(out.tolist()):
        lane = t % 32
        below, everyone = (1 << lane) - 1, (1 << 32) - 1
        through = below | 1 << lane
        assert row == [lane, t // 32, 3, 1 << lane, below, through, everyone - through, everyone - below]


def test_deadlock_is_reported():
    """Threads waiting at different barriers hang a GPU: here both places are named."""
    with pytest.raises(Deadlock, match=r"barrier at kernel deadlock.*hazards.cu.*warp sync at kernel deadlock.*shfl"):
        cuda_module("hazards.cu").launch("deadlock", 1, 32, [np.zeros(32, np.int32)])


def test_endless_loops_end():
    """Otherwise a wrong loop bound hangs the whole test run."""
    with pytest.raises(EmulatorError, match="more than 20000 steps.*kernel endless"):
        cuda_module("hazards.cu").launch("endless", 1, 32, [np.zeros(1, np.int32)], max_steps=20000)


def test_a_trap_names_its_thread():
    """A failed device assertion must say where."""
    with pytest.raises(EmulatorError, match=r"trap executed by block \(0,0,0\) thread \(9,0,0\)"):
        cuda_module("hazards.cu").launch("trap_at_nine", 1, 32, [np.zeros(32, np.int32)])


def test_races_are_found_only_where_there_are_any():
    """The detector must see a missing barrier, and must not cry wolf once the barrier is there."""
    x, y = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    broken, fixed = cuda_module("hazards.cu"), cuda_module("hazards.cu", flags=("-DFIXED",))
    with pytest.raises(RaceError, match=r"read after write by another warp.*missing_barrier.*hazards.cu:\d+.*PTX line"):
        broken.launch("missing_barrier", 1, 128, [x, y])
    assert broken.launch("missing_barrier", 1, 128, [x, y], raise_on_race=False).races
    fixed.launch("missing_barrier", 1, 128, [x, y])
    np.testing.assert_array_equal(y, x[::-1])
    xi, yi = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    with pytest.raises(RaceError, match="without __syncwarp"):
        broken.launch("missing_syncwarp", 1, 32, [xi, yi], warp_races=True)
    fixed.launch("missing_syncwarp", 1, 32, [xi, yi], warp_races=True)


def test_double_writes_to_global_memory_are_found():
    """Two blocks that store one output element: whichever comes last wins on a GPU."""
    with pytest.raises(RaceError, match="global memory written by two threads"):
        cuda_module("hazards.cu").launch("written_twice", 1, 64, [np.zeros(64, np.int32)], detect_global_waw=True)
