"""The CUDA kernels that choose scales and codes, executed by the emulator: bytes equal to the reference's."""

import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, FORMATS, block_sizes, dtypes, formats, magnitudes, make_weight
from conftest_cuda import DTYPE_CODES, FORMAT_CODES, call, multiprocessors, spec_of, unaligned, written
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowbit import format as fmt
from lowbit import reference

sizes = st.one_of(st.integers(1, 200), st.sampled_from((1023, 1024, 1025, 2048, 3001, 8193)))


def quantize(weight, format, block_size, aligned=True):
    """The kernel's ``(packed, absmax)``."""
    numel = weight.numel()
    packed = written((numel + 1) // 2, torch.uint8, aligned)
    absmax = written(fmt.block_count(numel, block_size), torch.float32)
    source = weight if aligned else unaligned(weight)
    arguments = (DTYPE_CODES[weight.dtype], numel, FORMAT_CODES[format], block_size)
    call("lowbit_quantize", source, *arguments, packed, absmax)
    return packed, absmax


def quantize_int8(weight, aligned=True):
    rows, columns = weight.shape
    codes, absmax = written(rows * columns, torch.uint8, aligned), written(rows, torch.float32)
    source = weight if aligned else unaligned(weight)
    call("lowbit_quantize_int8", source, DTYPE_CODES[weight.dtype], rows, columns, codes, absmax)
    return codes, absmax


def quantize_scales(absmax, offset):
    codes = written(absmax.numel(), torch.uint8)
    group_scales = written(fmt.block_count(absmax.numel(), fmt.GROUP_SIZE), torch.float32)
    call("lowbit_quantize_scales", absmax, offset.reshape(1), absmax.numel(), codes, group_scales)
    return codes, group_scales


def search_scales(weight, importance, format, block_size):
    scales = written(fmt.block_count(weight.numel(), block_size), torch.float32)
    arguments = (DTYPE_CODES[weight.dtype], weight.numel(), FORMAT_CODES[format], block_size)
    call("lowbit_search_scales", weight, *arguments, importance, weight.shape[-1], scales)
    return scales


def encode(weight, scales, format, block_size, aligned=True):
    packed = written((weight.numel() + 1) // 2, torch.uint8, aligned)
    source = weight if aligned else unaligned(weight)
    arguments = (DTYPE_CODES[weight.dtype], weight.numel(), FORMAT_CODES[format], block_size)
    call("lowbit_encode", source, *arguments, scales, packed)
    return packed


def assert_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


@settings(max_examples=40, deadline=None)
@given(
    numel=sizes,
    dtype=dtypes,
    format=formats,
    block_size=block_sizes,
    magnitude=magnitudes,
    seed=st.integers(0, 10),
    aligned=st.booleans(),
)
def test_bytes_equal_the_reference(numel, dtype, format, block_size, magnitude, seed, aligned):
    """A weight quantized on a GPU has to be the same file as one quantized on a CPU."""
    weight = make_weight((numel,), dtype, magnitude, seed)
    assert_same(quantize(weight, format, block_size, aligned), reference.quantize(weight, spec_of(format, block_size)))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_size(dtype, block_size):
    """absmax is reduced within an access, across lanes, across accesses and across tiles: each has its own code."""
    weight = torch.randn(9000, generator=torch.Generator().manual_seed(block_size)).to(dtype)
    assert_same(quantize(weight, "nf4", block_size), reference.quantize(weight, f"nf4:{block_size}"))


def test_more_tiles_than_warps():
    """On a small GPU each warp goes round several times; a wrong stride would leave holes."""
    with multiprocessors(1):
        weight = make_weight((140_001,), torch.bfloat16)
        packed, absmax = reference.quantize(weight, "nf4:32")
        assert_same(quantize(weight, "nf4", 32), (packed, absmax))
        assert torch.equal(encode(weight, absmax, "nf4", 32), reference.encode(weight, absmax, "nf4:32"))
        rows = weight[:4096].view(64, 64)
        assert_same(quantize_int8(rows), reference.quantize(rows, "int8"))


@pytest.mark.parametrize("format", FORMATS)
def test_codes_change_exactly_above_each_threshold(format):
    """A value on a threshold, or one bit beside it, must get bitsandbytes' code, or files differ."""
    midpoints, code_of_rank = fmt.thresholds(format)
    inf = torch.tensor(float("inf"))
    below, above = torch.nextafter(midpoints, -inf), torch.nextafter(midpoints, inf)
    block = torch.cat([torch.ones(1), below, midpoints, above, torch.zeros(18)]).repeat(16)  # one tile
    packed, _ = quantize(block, format, 64)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)
    expected = torch.cat([code_of_rank[:-1], code_of_rank[:-1], code_of_rank[1:]])
    assert torch.equal(codes[1:46], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bad", "index"), [(float("nan"), 0), (float("inf"), 1023), (-float("inf"), 1030)])
def test_non_finite_values_reach_absmax(dtype, bad, index):
    """The public function finds NaN and inf by absmax alone; a block that hid one would be garbage in silence."""
    weight = make_weight((1031,), dtype)
    weight[index] = bad
    _, absmax = quantize(weight, "nf4", 64)
    bad_block = torch.arange(absmax.numel()) == index // 64
    assert bool((~torch.isfinite(absmax) == bad_block).all())
    assert not torch.isfinite(search_scales(weight, None, "nf4", 64)[index // 64])
    assert not torch.isfinite(quantize_int8(weight.view(1, -1))[1][0])


@settings(max_examples=25, deadline=None)
@given(blocks=st.one_of(st.integers(1, 40), st.sampled_from((255, 256, 257, 700))), magnitude=magnitudes)
@example(blocks=300, magnitude=0.0)
def test_double_quantized_scales_equal_the_reference(blocks, magnitude):
    """Scales of full or short groups would be stored as other bytes."""
    absmax = torch.randn(blocks, generator=torch.Generator().manual_seed(blocks)).abs() * magnitude
    offset = absmax.mean()
    assert_same(quantize_scales(absmax, offset), reference.quantize_scales(absmax, offset))


def test_every_position_of_a_scale():
    """A scale at one of the 65536 rounding positions would get another code of the map."""
    positions = torch.arange(258 * 255, dtype=torch.float64).clamp(max=65535) / 32767.5 - 1.0
    # Each group begins with the 1 that is its scale.
    absmax = torch.cat([torch.ones(258, 1), positions.float().view(258, 255)], 1).reshape(-1)
    offset = torch.zeros(1)
    assert_same(quantize_scales(absmax, offset), reference.quantize_scales(absmax, offset))


def test_non_finite_scales_stay_in_bounds():
    """NaN must not index past the tables: the offset of a weight with NaN is NaN."""
    absmax = torch.tensor([1.0, float("nan"), float("inf")])
    codes, _ = quantize_scales(absmax, torch.tensor(0.5))
    assert torch.equal(codes, reference.quantize_scales(absmax, torch.tensor(0.5))[0])
    codes, _ = quantize_scales(absmax, torch.tensor(float("nan")))
    assert torch.equal(codes, torch.zeros(3, dtype=torch.uint8))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 19),
    columns=st.one_of(st.integers(1, 70), st.sampled_from((512, 528, 1024, 1040))),
    dtype=dtypes,
    magnitude=magnitudes,
    aligned=st.booleans(),
)
def test_int8_equals_the_reference(rows, columns, dtype, magnitude, aligned):
    """Rows that 16-byte accesses cannot serve, or a row of zeros, would get other codes."""
    weight = make_weight((rows, columns), dtype, magnitude)
    weight[-1] = 0
    assert_same(quantize_int8(weight, aligned), reference.quantize(weight, "int8"))


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from(((1, 1), (7, 13), (1, 129), (3, 100), (5, 7), (2, 64))),
    dtype=dtypes,
    format=formats,
    block_size=st.sampled_from((32, 64, 128)),
    magnitude=magnitudes,
    weighted=st.booleans(),
)
def test_searched_scales_equal_the_reference(shape, dtype, format, block_size, magnitude, weighted):
    """Every machine has to find the same scale, to the last bit of each block's error sums."""
    weight = make_weight(shape, dtype, magnitude, seed=1)
    importance = None
    if weighted:
        importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(2))
        importance[: shape[1] // 2] = 0  # whole blocks of importance 0, too
    scales = search_scales(weight, importance, format, block_size)
    assert torch.equal(scales, reference.search_scales(weight, importance, spec_of(format, block_size)))


@settings(max_examples=25, deadline=None)
@given(
    numel=sizes,
    dtype=dtypes,
    format=formats,
    block_size=block_sizes,
    magnitude=magnitudes,
    aligned=st.booleans(),
)
def test_encoded_bytes_equal_the_reference(numel, dtype, format, block_size, magnitude, aligned):
    """Negative or tiny scales would get other codes."""
    weight = make_weight((numel,), dtype, magnitude)
    scales = torch.randn(fmt.block_count(numel, block_size), generator=torch.Generator().manual_seed(3)) * magnitude
    scales[::5] = 0
    packed = encode(weight, scales, format, block_size, aligned)
    assert torch.equal(packed, reference.encode(weight, scales, spec_of(format, block_size)))
