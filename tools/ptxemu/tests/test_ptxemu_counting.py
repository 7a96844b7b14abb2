"""What the emulator counts: the code-budget tests and the predicted times of the kernels rest on these numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_kernels import HEADER, cuda_module, needs_nvcc
from ptxemu import load

LOOP = load(
    HEADER.format(arch="80")
    + """
.file 1 "folder/loop.cu"
.visible .entry loop(.param .u64 to, .param .u32 rounds) {
  .reg .b64 p; .reg .b32 i, r, n; .reg .pred more;
  .loc 1 7 3
  mov.u32 i, %tid.x; ld.param.u64 p, [to]; mad.wide.u32 p, i, 4, p;
  ld.param.u32 n, [rounds]; mov.u32 r, 0;
NEXT:
  .loc 1 9 5
  add.u32 r, r, 1; setp.lt.u32 more, r, n; @more bra NEXT;
  .loc 1 11 3
  st.global.u32 [p], r; ret;
}
"""
)


@settings(max_examples=20, deadline=None)
@given(rounds=st.integers(1, 20), warps=st.integers(1, 4), blocks=st.integers(1, 5))
def test_instructions_are_counted_exactly(rounds, warps, blocks):
    """Instructions per weight decide whether a kernel meets its budget; also by source line."""
    out = np.zeros(32 * warps, np.uint32)
    result = LOOP.launch("loop", blocks, 32 * warps, [out, rounds])
    issues = warps * blocks
    assert result.warp_instructions == issues * (5 + 3 * rounds + 2)
    assert result.thread_instructions == 32 * result.warp_instructions
    assert result.count("add") == issues * rounds == result.instructions["add.u32"]
    assert result.by_source == {
        ("loop.cu", 7): 5 * issues,
        ("loop.cu", 9): 3 * rounds * issues,
        ("loop.cu", 11): 2 * issues,
    }
    assert "loop.cu:9" in result.source_report() and "add.u32" in result.report()
    assert (out == rounds).all()


BRANCH = load(
    HEADER.format(arch="80")
    + """
.visible .entry branch(.param .u32 from) {
  .reg .pred p; .reg .b32 i, n;
  mov.u32 i, %tid.x; ld.param.u32 n, [from]; setp.ge.u32 p, i, n;
  @p bra ELSE; add.u32 i, i, 1; bra END; ELSE: sub.u32 i, i, 1; END: mul.lo.u32 i, i, 3; ret;
}
"""
)


@settings(max_examples=20, deadline=None)
@given(boundary=st.integers(0, 64))
def test_both_sides_of_a_branch_are_issued_once(boundary):
    """A warp issues both sides where its lanes disagree and joins again behind them: divergence costs, but no more."""
    result = BRANCH.launch("branch", 1, 64, [boundary])
    first_side, second_side = -(-boundary // 32), -(-(64 - boundary) // 32)
    assert result.count("add") == result.count("bra") - 2 == first_side
    assert (result.count("sub"), result.count("mul"), result.count("ret")) == (second_side, 2, 2)


@needs_nvcc
@settings(max_examples=25, deadline=None)
@given(stride=st.integers(0, 40), threads=st.integers(1, 256))
def test_sectors_of_strided_loads(stride, threads):
    """DRAM traffic is counted in 32-byte sectors per warp: predicted times of memory-bound kernels depend on it."""
    x, y = np.arange(threads * stride + 1, dtype=np.float32), np.zeros(threads, np.float32)
    result = cuda_module("memory.cu").launch("strided", 1, threads, [x, y, stride])
    np.testing.assert_array_equal(y, x[np.arange(threads) * stride])
    byte = 4 * stride * np.arange(threads)
    sectors = len(set(zip((np.arange(threads) // 32).tolist(), (byte // 32).tolist(), strict=True)))
    assert result.load_bytes == 4 * threads and result.load_sectors == sectors
    unique = 4 * threads if stride else 4 * -(-threads // 32)
    assert result.load_efficiency == pytest.approx(unique / (32 * sectors))
    assert result.read_footprint == 32 * len(set((byte // 32).tolist()))
    assert result.store_sectors == -(-threads // 8) and result.write_footprint == 32 * -(-threads // 8)


@needs_nvcc
@settings(max_examples=25, deadline=None)
@given(stride=st.integers(1, 40), threads=st.integers(1, 128))
def test_bank_conflicts_of_strided_shared_accesses(stride, threads):
    """A layout with conflicts must not pass as free of them."""
    x, y = np.arange(threads, dtype=np.float32), np.zeros(threads, np.float32)
    shared = 4 * stride * threads
    result = cuda_module("memory.cu").launch("banks", 1, threads, [x, y, stride], shared=shared)
    np.testing.assert_array_equal(y, x)
    wavefronts = sum(
        np.bincount(np.arange(first, min(first + 32, threads)) * stride % 32).max() for first in range(0, threads, 32)
    )
    for access in result.shared_accesses:
        assert (access.wavefronts, access.ideal) == (wavefronts, -(-threads // 32))
    assert result.worst_conflict == np.bincount(np.arange(min(32, threads)) * stride % 32).max()


@needs_nvcc
def test_wide_accesses_are_counted_by_width():
    """16-byte loads of a warp are 16 sectors, all of them used."""
    x, y = np.zeros((32, 4), np.float32), np.zeros((32, 4), np.float32)
    result = cuda_module("hazards.cu").launch("vector_copy", 1, 32, [x, y])
    assert (result.load_bytes, result.load_sectors, result.load_efficiency) == (512, 16, 1.0)
    assert (result.store_bytes, result.store_sectors) == (512, 16)
    (load_access,) = [a for a in result.global_accesses if a.access == "read"]
    assert load_access.ins.opcode.startswith("ld.global") and ".v4" in load_access.ins.opcode
    assert result.count("ld.global") == 1


def test_footprints_do_not_accumulate():
    """Numbers of one launch must not leak into the next."""
    out = np.zeros(32, np.uint32)
    first, second = (LOOP.launch("loop", 1, 32, [out, 2]) for _ in range(2))
    assert (first.write_footprint, first.warp_instructions) == (second.write_footprint, second.warp_instructions)
    quiet = LOOP.launch("loop", 1, 32, [out, 2], counters=False)
    assert quiet.store_bytes == 0 and quiet.warp_instructions == first.warp_instructions
