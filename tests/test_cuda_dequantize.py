"""The CUDA dequantize kernel, executed by the emulator: bit for bit against the reference."""

import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, FORMATS, block_sizes, dtypes, formats, magnitudes, make_weight
from conftest_cuda import DTYPE_CODES, FORMAT_CODES, call, launchers, multiprocessors, spec_of, unaligned, written
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import format as fmt
from lowbit import reference

sizes = st.one_of(st.integers(1, 200), st.sampled_from((1023, 1024, 1025, 2048, 3001, 8193)))


def decode(packed, absmax, group_scales, offset, format, block_size, numel, dtype, aligned=True):
    """The kernel's output."""
    out = written(numel, dtype, aligned)
    if not aligned:
        packed = unaligned(packed)
    scales = (absmax, None, None, None) if group_scales is None else (None, absmax, group_scales, offset.reshape(1))
    call("lowbit_dequantize", packed, *scales, FORMAT_CODES[format], block_size, numel, out, DTYPE_CODES[dtype])
    return out


def assert_equals_the_reference(weight, dtype, format, block_size, double_quant, aligned=True):
    packed, absmax = reference.quantize(weight, spec_of(format, block_size))
    group_scales = offset = None
    if double_quant:
        offset = absmax.mean()
        absmax, group_scales = reference.quantize_scales(absmax, offset)
    parts = (packed, absmax, group_scales, offset)
    decoded = decode(*parts, format, block_size, weight.numel(), dtype, aligned)
    spec = spec_of(format, block_size, double_quant)
    assert torch.equal(decoded, reference.dequantize(*parts, spec, list(weight.shape), dtype).reshape(-1))


@settings(max_examples=40, deadline=None)
@given(
    numel=sizes,
    dtype=dtypes,
    format=formats,
    block_size=block_sizes,
    double_quant=st.booleans(),
    magnitude=magnitudes,
    aligned=st.booleans(),
)
def test_equals_the_reference(numel, dtype, format, block_size, double_quant, magnitude, aligned):
    """A GPU that decodes other bits trains on another model than the one saved; also from a slice at any address."""
    weight = make_weight((numel,), torch.float32, magnitude)
    assert_equals_the_reference(weight, dtype, format, block_size, double_quant, aligned)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size(block_size):
    """Each block's scale has to reach all of its elements, whether a tile holds many blocks or a part of one."""
    weight = torch.randn(9000, generator=torch.Generator().manual_seed(block_size))
    assert_equals_the_reference(weight, torch.bfloat16, "nf4", block_size, double_quant=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_tiles_than_warps(format, dtype):
    """On a small GPU each warp goes round several times; a wrong stride would leave holes."""
    with multiprocessors(1):
        weight = make_weight((75_001,))
        assert_equals_the_reference(weight, dtype, format, 32, double_quant=True)


def decode_columns(weight, format, block_size, double_quant, dtype, first, count, aligned=True):
    """(the kernel's output, the reference's) of some columns of a quantized matrix."""
    rows, columns = weight.shape
    spec = spec_of(format, block_size, double_quant)
    packed, absmax = reference.quantize(weight, spec_of(format, block_size))
    group_scales = offset = None
    if double_quant:
        offset = absmax.mean()
        absmax, group_scales = reference.quantize_scales(absmax, offset)
    expected = reference.dequantize(packed, absmax, group_scales, offset, spec, [rows, columns], dtype)
    out = written(rows * count, dtype, aligned)
    scales = (absmax, None, None, None) if group_scales is None else (None, absmax, group_scales, offset.reshape(1))
    sizes = (columns if format == "int8" else block_size, rows, columns, first, count)
    packed = packed if aligned else unaligned(packed)
    call("lowbit_dequantize_columns", packed, *scales, FORMAT_CODES[format], *sizes, out, DTYPE_CODES[dtype])
    return out.view(rows, count), expected[:, first : first + count]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 21),
    blocks=st.integers(1, 9),
    data=st.data(),
    dtype=dtypes,
    format=formats,
    block_size=st.sampled_from((32, 64, 256)),
    double_quant=st.booleans(),
    aligned=st.booleans(),
)
def test_columns_equal_the_reference(rows, blocks, data, dtype, format, block_size, double_quant, aligned):
    """The gradient of a layer would come from another part of its weight, or from that part with another's scales."""
    columns = blocks * block_size
    first = data.draw(st.integers(0, columns // 32 - 1)) * 32
    count = data.draw(st.integers(1, (columns - first) // 32)) * 32
    weight = make_weight((rows, columns))
    decoded, expected = decode_columns(weight, format, block_size, double_quant, dtype, first, count, aligned)
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_in_more_tiles_than_warps(dtype):
    """A warp that goes round again would begin in another row."""
    with multiprocessors(1):
        weight = make_weight((70, 3 * 512))
        decoded, expected = decode_columns(weight, "nf4", 128, True, dtype, 256, 1024)
        assert torch.equal(decoded, expected)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 19),
    columns=st.sampled_from((70, 512, 1040, 1600)),
    data=st.data(),
    dtype=dtypes,
    aligned=st.booleans(),
)
def test_columns_of_int8_equal_the_reference(rows, columns, data, dtype, aligned):
    """As for 4 bits: the stride of the codes' rows is not the output's."""
    first = data.draw(st.sampled_from((0, 16, 33)))
    count = data.draw(st.integers(0, columns - first))
    weight = make_weight((rows, columns))
    decoded, expected = decode_columns(weight, "int8", columns, False, dtype, first, count, aligned)
    assert torch.equal(decoded, expected)


def test_every_code_of_the_scale_map():
    """One of the 256 entries of the kernel's own map would be wrong."""
    codes = torch.arange(256, dtype=torch.uint8)
    packed = torch.full((256 * 16,), 0xFF, dtype=torch.uint8)  # NF4 code 15 is 1.0
    decoded = decode(packed, codes, torch.ones(1), torch.zeros(1), "nf4", 32, 256 * 32, torch.float32)
    assert torch.equal(decoded[::32], fmt.SCALE_MAP)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 19),
    columns=st.one_of(st.integers(1, 70), st.sampled_from((512, 528, 1024, 1040))),
    dtype=dtypes,
    magnitude=magnitudes,
    aligned=st.booleans(),
)
def test_int8_equals_the_reference(rows, columns, dtype, magnitude, aligned):
    """Rows that 16-byte accesses cannot serve would be decoded wrongly."""
    weight = make_weight((rows, columns), torch.float32, magnitude)
    codes, absmax = reference.quantize(weight, "int8")
    decoded = decode(codes, absmax, None, None, "int8", columns, rows * columns, dtype, aligned)
    expected = reference.dequantize(codes, absmax, None, None, "int8", [rows, columns], dtype)
    assert torch.equal(decoded, expected.reshape(-1))


def test_int8_long_row():
    """A row of many tiles, which the grid's second dimension shares out, would be decoded in part."""
    codes = torch.randint(-127, 128, (20_000,), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    parts = (codes.view(torch.uint8), torch.tensor([0.3]), None, None, "int8")
    expected = reference.dequantize(*parts, [20_000], torch.float16)
    assert torch.equal(decode(*parts, 20_000, 20_000, torch.float16), expected)
    assert launchers().launches[-1].grid == (1, 4, 1)
