"""csrc/cuda/device/ptx.cuh and layout.h: each instruction does what its name says, on the lanes of the maps."""

import functools
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest_cuda import CSRC, ROOT, emulator, require_nvcc

ARCHS = ("sm_75", "sm_80")


@functools.cache
def probe(arch: str):
    """tests/cuda/probe.cu, compiled to PTX."""
    require_nvcc()
    return emulator("toolchain").compile_ptx(ROOT / "tests" / "cuda" / "probe.cu", arch=arch, include=[CSRC])


def run(arch: str, kernel: str, *args) -> None:
    probe(arch).launch(kernel, grid=1, block=32, args=args)


def test_lane_maps_are_bijective():
    """A map that meets an element twice, or never, would sum it twice, or leave a hole in the output."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler found")
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{CSRC}", ROOT / "tests" / "cuda" / "layout.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_fragments_are_where_the_maps_say(dtype):
    """Fragments filled in another order multiply other elements than those meant."""
    generator = torch.Generator().manual_seed(0)
    # Small integers: the product is exact in any order.
    a = torch.randint(-8, 9, (16, 16), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (16, 8), generator=generator).to(dtype)
    c = torch.full((16, 8), torch.nan)
    run("sm_80", f"probe_mma_{'bf16' if dtype == torch.bfloat16 else 'f16'}", a, b, c)
    assert torch.equal(c, a.float() @ b.float())


@pytest.mark.parametrize("valid", [16, 6, 0])
def test_ldmatrix_fills_an_a_fragment(valid):
    """The staged x has to arrive in the fragment; a partial copy has to read no further and fill up with zeros."""
    a = torch.arange(1, 257, dtype=torch.int16).view(16, 16)
    out = torch.zeros(16, 16, dtype=torch.int16)
    run("sm_80", "probe_ldmatrix", a, valid, out)
    expected = a.clone()
    expected[:, 8 + valid // 2 :] = 0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("arch", ARCHS)
def test_16_byte_accesses(arch):
    """The widest load or store would lose a byte."""
    x = torch.arange(128, dtype=torch.int32)
    out = torch.zeros_like(x)
    run(arch, "probe_global", x, out)
    assert torch.equal(out, x)


@pytest.mark.parametrize("arch", ARCHS)
def test_cached_loads_and_sums(arch):
    """Cached loads, also by some lanes only, and sums over groups of lanes would give other values."""
    x = torch.arange(128, dtype=torch.int32)
    every, alternate, index = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(32, dtype=torch.int32)
    sums4, sums16 = torch.zeros(32), torch.zeros(32)
    run(arch, "probe_cached", x, every, alternate, index, sums4, sums16)
    assert torch.equal(every, x)
    assert torch.equal(alternate.view(32, 4)[::2], x.view(32, 4)[::2]) and (alternate.view(32, 4)[1::2] == 7).all()
    lanes = torch.arange(32)
    assert torch.equal(index, lanes.int())
    assert torch.equal(sums4, lanes.float().view(-1, 4).sum(1).repeat_interleave(4))
    assert torch.equal(sums16, lanes.float().view(-1, 16).sum(1).repeat_interleave(16))


@pytest.mark.parametrize("arch", ARCHS)
def test_narrow_loads_and_halves(arch):
    """Factors of LoRA of 16 bits would be other words, or pairs of other rows."""
    x = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
    out8, (out4, low, high) = np.zeros(64, np.uint32), (np.zeros(32, np.uint32) for _ in range(3))
    run(arch, "probe_narrow_loads", x, out8, out4, low, high)
    assert np.array_equal(out8, x) and np.array_equal(out4, x[:32])
    first, second = x[::2], x[1::2]
    assert np.array_equal(low, first & 0xFFFF | second << 16)
    assert np.array_equal(high, first >> 16 | second & np.uint32(0xFFFF0000))


@pytest.mark.parametrize("arch", ARCHS)
def test_conversions_round_to_nearest_even(arch):
    """Narrowing, with and without the instruction for pairs, has to round as torch does."""
    special = [0.0, -0.0, 1.0, 65504.0, 65520.0, 65519.99, 1e-8, 6e-8, 3.3e38, 3.4e38, float("inf"), -float("inf")]
    special += [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1e-40, 1.5e-40]
    values = torch.cat([torch.tensor(special), torch.randn(46, generator=torch.Generator().manual_seed(0))])
    x = values.view(32, 2)
    bf16, f16 = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.float16)
    widened, single = torch.zeros(32), torch.zeros(32, dtype=torch.float16)
    run(arch, "probe_conversions", x, bf16.view(torch.int32), f16.view(torch.int32), widened, single.view(torch.int16))
    assert torch.equal(bf16.view(torch.int16), values.bfloat16().view(torch.int16))
    assert torch.equal(f16.view(torch.int16), values.half().view(torch.int16))
    assert torch.equal(widened, x[:, 0].half().float())
    assert torch.equal(single, x[:, 0].half())


@pytest.mark.parametrize("arch", ARCHS)
def test_nan_stays_nan(arch):
    """A NaN that rounds to a number would hide where training went wrong."""
    x = torch.full((32, 2), torch.nan)
    bf16, f16 = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.float16)
    widened, single = torch.zeros(32), torch.zeros(32, dtype=torch.float16)
    run(arch, "probe_conversions", x, bf16.view(torch.int32), f16.view(torch.int32), widened, single.view(torch.int16))
    assert bool(bf16.isnan().all() and f16.isnan().all() and widened.isnan().all() and single.isnan().all())


@pytest.mark.parametrize("arch", ARCHS)
def test_bytes_shuffles_and_shared_memory(arch):
    """A lane would get other bytes of a word, of its neighbours or of shared memory."""
    x = np.random.default_rng(0).integers(0, 2**32, 32, dtype=np.uint32)
    products, signed = np.zeros(128, np.uint32), np.zeros(128, np.int32)
    neighbours, following, shared4 = (np.zeros(32, np.uint32) for _ in range(3))
    shared8, shared16 = np.zeros(64, np.uint32), np.zeros(128, np.uint32)
    in_quad = np.zeros(128, np.uint32)
    run(arch, "probe_words", x, products, signed, neighbours, following, shared4, shared8, in_quad, shared16)
    lanes, factors = np.arange(32, dtype=np.uint32)[:, None], np.arange(255, 251, -1, dtype=np.uint32)
    sums = x.view(np.uint8).reshape(32, 4) * factors + np.uint32(0xFFFFFF00) + lanes
    assert np.array_equal(products.reshape(32, 4), sums)
    assert np.array_equal(signed, x.view(np.int8))
    assert np.array_equal(neighbours, x[np.arange(32) ^ 1])
    assert np.array_equal(following, np.roll(x, -1))
    assert np.array_equal(shared4, x)
    assert np.array_equal(shared8, np.concatenate([x, ~x]))
    assert np.array_equal(shared16, np.concatenate([x, ~x, x + np.uint32(1), x + np.uint32(2)]))
    assert np.array_equal(in_quad.reshape(8, 4, 4), np.repeat(x.reshape(8, 1, 4), 4, axis=1))


@pytest.mark.parametrize("mask", [1, 2])
@pytest.mark.parametrize("arch", ARCHS)
def test_words_change_places(arch, mask):
    """An mma would add up weights of two blocks, which have different scales."""
    x = np.arange(64, dtype=np.uint32).reshape(32, 2)
    out = np.zeros_like(x)
    run(arch, "probe_swap", x, mask, out)
    expected = x.copy()
    for lane in (lane for lane in range(32) if not lane & mask):
        expected[lane, 1], expected[lane + mask, 0] = x[lane + mask, 0], x[lane, 1]
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("arch", ARCHS)
def test_indices(arch):
    """A special register would be read by another's name."""
    threads, blocks = np.full((3, 32), -1, np.int32), np.full((3, 32), 7, np.uint32)
    probe(arch).launch("probe_indices", grid=3, block=32, args=(threads, blocks))
    assert (threads == np.arange(32)).all() and (blocks == np.arange(3)[:, None]).all()


@pytest.mark.parametrize("options", [{}, {"batch_blocks": 1}, {"batch_blocks": 2, "schedule": "reverse"}])
@pytest.mark.parametrize("arch", ARCHS)
def test_one_block_is_the_last_to_arrive(arch, options):
    """No block, or one that came too early, would add up a split product; a counter left over would spoil the next."""
    blocks, threads = 5, 96
    counter = torch.zeros(2, dtype=torch.int32)
    for _ in range(2):
        parts, sums = torch.zeros(blocks, threads), torch.full((threads,), torch.nan)
        is_last = torch.full((blocks, threads), -1, dtype=torch.int32)
        arguments = (counter[1:], emulator("address_space").Uninitialized(parts), sums, is_last)
        result = probe(arch).launch("probe_arrival", grid=blocks, block=threads, args=arguments, **options)
        assert not result.warnings
        assert not counter.any()
        assert is_last.float().mean(1).sort().values.tolist() == [0, 0, 0, 0, 1]
        fourths = parts.view(blocks, -1, 4)[:, :, 3:].expand(-1, -1, 4).reshape(blocks, threads)
        assert torch.equal(sums, (parts + fourths).sum(0).flip(0))
