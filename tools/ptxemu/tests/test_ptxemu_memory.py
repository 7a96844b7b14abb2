"""Memory of the emulator: how kernels reach it, and that every wrong access is an error that says where."""

import struct

import numpy as np
import pytest
import torch
from ptx_kernels import HEADER, cuda_module, elementwise_module, needs_nvcc
from ptxemu import LaunchError, MemoryFault, Pointer, RaceError, Uninitialized, address_space, load


@pytest.fixture
def random():
    return np.random.default_rng(0)


COPY = load(
    HEADER.format(arch="80")
    + """
.visible .entry copy(.param .u64 to, .param .u64 from) {
  .reg .b64 pt, pf; .reg .b32 i; .reg .f32 v;
  mov.u32 i, %tid.x;
  ld.param.u64 pt, [to]; mad.wide.u32 pt, i, 4, pt;
  ld.param.u64 pf, [from]; mad.wide.u32 pf, i, 4, pf;
  ld.global.f32 v, [pf]; st.global.f32 [pt], v; ret;
}
"""
)


# Threads from 16 on ignore their source: zeros land.
IGNORE = load(
    HEADER.format(arch="80")
    + """
.visible .entry ignore(.param .u64 to, .param .u64 from) {
  .reg .b64 pt, pf; .reg .b32 i, s; .reg .f32 v; .reg .pred absent;
  .shared .align 16 .b8 tile[128];
  mov.u32 i, %tid.x; setp.ge.u32 absent, i, 16;
  ld.param.u64 pt, [to]; mad.wide.u32 pt, i, 4, pt;
  ld.param.u64 pf, [from]; mad.wide.u32 pf, i, 4, pf;
  mov.u32 s, tile; mad.lo.u32 s, i, 4, s;
  cp.async.ca.shared.global [s], [pf], 4, absent; cp.async.wait_all;
  ld.shared.f32 v, [s]; st.global.f32 [pt], v; ret;
}
"""
)


def copy(to, source, count):
    return COPY.launch("copy", 1, count, [to, source])


def test_arrays_tensors_and_pointers_are_memory(random):
    """Every way to hand over data reaches the same bytes, and only they change."""
    x = random.random(64, np.float32)
    y, tensor = np.zeros(64, np.float32), torch.zeros(64)
    copy(y, x, 64)
    np.testing.assert_array_equal(y, x)
    copy(tensor, x, 32)
    np.testing.assert_array_equal(tensor.numpy(), np.where(np.arange(64) < 32, x, 0))
    y[:] = 0
    copy(Pointer(y, 128), Pointer(x, 64), 32)
    np.testing.assert_array_equal(y, np.concatenate([np.zeros(32, np.float32), x[16:48]]))


@pytest.mark.parametrize("count, excess", [(33, 1), (64, 32)])
def test_out_of_bounds_names_thread_and_place(count, excess):
    """A wrong guard for ragged shapes reads the neighbour's memory on a GPU, silently."""
    access = r"out of bounds: 4-byte access at arg1\+128 \(size 128 bytes\)"
    message = rf"{access} by block \(0,0,0\) thread \(32,0,0\), {excess} lanes: kernel copy, PTX line \d+: ld.global"
    with pytest.raises(MemoryFault, match=message):
        copy(np.zeros(64, np.float32), np.zeros(32, np.float32), count)
    with pytest.raises(MemoryFault, match=r"at arg0-4 "):
        copy(Pointer(np.zeros(64, np.float32), -4), np.zeros(64, np.float32), 32)


def test_a_slice_keeps_its_misalignment():
    """A tensor that starts at an odd byte faults on a GPU; a launcher must notice before."""
    data = np.zeros(260, np.uint8)
    for argument in (data[1:257], Pointer(data, 2)):
        with pytest.raises(MemoryFault, match="misaligned: 4-byte access"):
            copy(np.zeros(64, np.float32), argument, 32)
    copy(np.zeros(64, np.float32), data[4:260], 64)
    with pytest.raises(MemoryFault, match="out of bounds: 4-byte access at arg1-4 "):
        copy(np.zeros(64, np.float32), Pointer(data[4:260], -4), 64)


@pytest.mark.parametrize("in_place", [False, True])
def test_large_arrays_are_used_in_place(random, monkeypatch, in_place):
    """A copy of an array that is mapped but not filled would fill it. The same is seen, and the same is an error."""
    monkeypatch.setattr(address_space, "_LARGEST_COPY", 64 if in_place else 1 << 30)
    x, y = random.random(64, np.float32), np.zeros(32, np.float32)
    COPY.launch("copy", 1, 32, [y, Pointer(x, 128)])
    np.testing.assert_array_equal(y, x[32:])
    with pytest.raises(MemoryFault, match="out of bounds"):
        COPY.launch("copy", 1, 48, [np.zeros(64, np.float32), Pointer(x, 128)])
    buffer = address_space.Buffer("x", x.view(np.uint8), 16)
    assert np.shares_memory(buffer.data, x) == in_place
    assert not np.shares_memory(address_space.Buffer("x", x.view(np.uint8)[:-4], 16).data, x)  # would need padding


def test_null_and_read_only_memory():
    """A null pointer for an absent bias, dereferenced; a store into constant input."""
    with pytest.raises(MemoryFault, match="unmapped address: 4-byte access at address 0x0"):
        copy(np.zeros(4, np.float32), None, 4)
    frozen = np.zeros(4, np.float32)
    frozen.setflags(write=False)
    with pytest.raises(MemoryFault, match="write to read-only memory"):
        copy(frozen, np.zeros(4, np.float32), 4)


def test_reads_of_memory_never_written():
    """A workspace holds another tensor's data on a GPU: a kernel must write what it reads."""
    workspace, y = Uninitialized(np.zeros(64, np.float32)), np.zeros(64, np.float32)
    copy(workspace, np.ones(64, np.float32), 32)
    assert not workspace.all_written()
    copy(y, workspace, 32)
    with pytest.raises(MemoryFault, match=r"read of memory never written.*thread \(32,0,0\)"):
        copy(y, workspace, 33)
    copy(Pointer(workspace, 128), y, 32)
    copy(y, workspace, 64)
    assert workspace.all_written()


def test_overlapping_arguments_are_refused():
    """Two arrays over the same bytes would be two memories here and one on a GPU."""
    x = np.zeros(64, np.float32)
    with pytest.raises(LaunchError, match=r"kernel copy: arg1 overlaps arg0; pass Pointer"):
        copy(x[:40], x[32:], 8)
    copy(x, x, 8)


def test_strided_arguments_are_refused():
    """A non-contiguous tensor's pointer does not describe it."""
    with pytest.raises(LaunchError, match="contiguous"):
        copy(np.zeros((8, 8), np.float32).T, np.zeros(64, np.float32), 8)
    with pytest.raises(LaunchError, match="contiguous"):
        copy(torch.zeros(8, 8).T, np.zeros(64, np.float32), 8)


def test_fresh_registers_and_shared_memory_are_poison():
    """Zeros would hide a forgotten initialization until it meets a GPU."""
    module = elementwise_module(
        {
            "register": ("u32", ["u32"], ".reg .b32 never; mov.u32 d, never;"),
            "shared": ("u32", ["u32"], ".shared .b32 s[32]; .reg .b32 p; mov.u32 p, s; ld.shared.u32 d, [p];"),
        }
    )
    x, out = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    result = module.launch("register", 1, 32, [x, out])
    assert (out == 0xFFFFFFFF).all() and "never is read but never written" in result.warnings[0]
    result = module.launch("shared", 1, 32, [x, out], raise_on_race=False)
    assert (out == 0xFFFFFFFF).all() and "uninitialised shared memory" in result.races[0]
    with pytest.raises(RaceError, match="kernel shared, PTX line"):
        module.launch("shared", 1, 32, [x, out])


@needs_nvcc
def test_faults_name_the_source_line():
    """The person who fixes the kernel works in the .cu file, not in PTX; also inside functions it calls."""
    hazards, x = cuda_module("hazards.cu"), np.zeros(128, np.float32)
    place = r"kernel past_the_end, PTX line \d+ \(hazards.cu:\d+\): ld.global"
    with pytest.raises(MemoryFault, match=rf"block \(1,0,0\) thread \(36,0,0\).*{place}"):
        hazards.launch("past_the_end", 2, 64, [x[:100], np.zeros(128, np.float32), 100])
    with pytest.raises(MemoryFault, match=r"at shared\+256 \(size 256 bytes\).*thread \(63,0,0\)"):
        hazards.launch("past_shared", 1, 64, [x, 1])
    with pytest.raises(MemoryFault, match=r"function \w*bad_call\w*, PTX line \d+ \(hazards.cu:\d+\)"):
        hazards.launch("through_a_call", 1, 32, [np.zeros(32, np.float32), x])
    with pytest.raises(MemoryFault, match="misaligned: 16-byte access"):
        hazards.launch("vector_copy", 1, 8, [Pointer(x, 4), np.zeros(32, np.float32)])
    with pytest.raises(RaceError, match="uninitialised shared memory"):
        hazards.launch("never_written", 1, 64, [np.zeros(64, np.float32)])


@needs_nvcc
def test_variables_and_structs(random):
    """Codebooks in constant memory and argument structs that hold pointers."""
    kernels = cuda_module("memory.cu")
    x, y, constants = random.random(64, np.float32), np.zeros(64, np.float32), random.random(16, np.float32)
    kernels.set_symbol("constants", constants)
    arguments = address_space.Struct(struct.pack("<ifQhhh2x", 6, 0.5, 0, 1, 2, 3), {8: address_space.Pointer(x)})
    kernels.launch("variables", 1, 64, [arguments, y, 3])
    i = np.arange(64)
    np.testing.assert_allclose(y, 3 + x + (i % 3 + 1) + constants[i & 15] + (i & 3) + 1 + 3, rtol=1e-6)
    assert kernels.get_symbol("counter", np.int32)[0] == 5
    with pytest.raises(LaunchError, match="do not fit variable constants"):
        kernels.set_symbol("constants", np.zeros(17, np.float32))


@needs_nvcc
def test_vector_and_narrow_accesses(random):
    """16-byte loads with cache hints, bytes with and without sign: how packed weights are read."""
    x = random.integers(0, 2**32, (64, 4), dtype=np.uint64).astype(np.uint32)
    bytes_, words = random.integers(0, 256, 32).astype(np.uint8), random.integers(0, 2**63, (32, 2)).astype(np.uint64)
    y = np.zeros((96, 4), np.uint32)
    cuda_module("memory.cu").launch("vectors", 1, 32, [x, y, bytes_, words])
    a, b = x[:32], x[32:]
    np.testing.assert_array_equal(y[:32], np.stack([a[:, 0] ^ b[:, 0], a[:, 1] + b[:, 1], b[:, 2], a[:, 3]], 1))
    np.testing.assert_array_equal(y[32:64, 0], bytes_)
    np.testing.assert_array_equal(y[32:64, 1].view(np.int32), bytes_.view(np.int8))
    swapped = np.stack([words[:, 1], words[:, 0] + np.uint64(1)], 1)
    np.testing.assert_array_equal(y[64:].view(np.uint64).reshape(32, 2), swapped)


@needs_nvcc
def test_generic_pointers(random):
    """One instruction whose lanes touch global, shared and local memory."""
    g, x, y = np.arange(100, 164, dtype=np.int32), np.arange(64, dtype=np.int32) * 1000, np.zeros(64, np.int32)
    cuda_module("memory.cu").launch("generic", 1, 64, [g, x, y])
    t = np.arange(64)
    added = np.where(t % 2, t * 1000, np.where(t % 5 == 0, t, 7)) + 1
    np.testing.assert_array_equal(y, np.where(t % 3 == 0, t + added, t))
    np.testing.assert_array_equal(g, np.where(t % 3 == 0, t + 100, t + 100 + added))


@needs_nvcc
@pytest.mark.parametrize("async_mode", ["lazy", "eager"])
def test_async_copies_of_every_size(random, async_mode):
    """cp.async of 4 and 8 bytes, and with fewer bytes read than written: ragged edges are zero-filled this way."""
    x, y = random.integers(1, 256, (32, 16)).astype(np.uint8), np.zeros((32, 16), np.uint8)
    cuda_module("memory.cu").launch("async_sizes", 1, 32, [x, y], async_mode=async_mode)
    read = np.arange(4) < (np.arange(32) % 5)[:, None]
    np.testing.assert_array_equal(y, np.concatenate([x[:, :4], np.where(read, x[:, :4], 0), x[:, :8]], 1))


def test_async_copies_may_ignore_their_source():
    """Rows past the end are filled with zeros without their address being read."""
    y = np.ones(32, np.float32)
    IGNORE.launch("ignore", 1, 32, [y, np.arange(1, 17, dtype=np.float32)])
    np.testing.assert_array_equal(y, np.where(np.arange(32) < 16, np.arange(1, 33), 0))
