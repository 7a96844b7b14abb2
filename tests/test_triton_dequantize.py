"""The Triton dequantize kernels: bit for bit what the reference decodes."""

import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, FORMATS, block_sizes, dtypes, formats, magnitudes, make_weight
from conftest_triton import compiled_only, emulate, interpreted, launches
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_calls import parts_of, unaligned
from triton_calls import weight as meta_weight

from lowbit import format as fmt
from lowbit import reference
from lowbit.backends.triton import dequantize as module

sizes = st.one_of(st.integers(1, 200), st.sampled_from((1023, 1024, 1025, 3001, 8193, 16384, 17_000)))


@interpreted
@settings(max_examples=40, deadline=None)
@given(
    numel=sizes,
    dtype=dtypes,
    format=formats,
    block_size=block_sizes,
    double_quant=st.booleans(),
    magnitude=magnitudes,
)
def test_equals_the_reference(numel, dtype, format, block_size, double_quant, magnitude):
    """A GPU that decodes other bits trains on another model than the one saved."""
    parts = parts_of(make_weight((numel,), torch.float32, magnitude), format, block_size, double_quant)
    decoded = torch.ops.lowbit_triton.dequantize(*parts, [numel], dtype)
    assert torch.equal(decoded, reference.dequantize(*parts, [numel], dtype))


@interpreted
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size(block_size):
    """Each block's scale has to reach all of its elements, whether a thread's bytes fill a block or a part of one."""
    parts = parts_of(torch.randn(9000, generator=torch.Generator().manual_seed(block_size)), "nf4", block_size)
    decoded = torch.ops.lowbit_triton.dequantize(*parts, [9000], torch.bfloat16)
    assert torch.equal(decoded, reference.dequantize(*parts, [9000], torch.bfloat16))


@interpreted
def test_every_code_of_the_scale_map():
    """One of the 256 entries of the map on the device would be wrong."""
    codes = torch.arange(256, dtype=torch.uint8)
    packed = torch.full((256 * 16,), 0xFF, dtype=torch.uint8)  # NF4 code 15 is 1.0
    parts = (packed, codes, torch.ones(1), torch.zeros(()), "nf4:32:double_quant")
    decoded = torch.ops.lowbit_triton.dequantize(*parts, [256 * 32], torch.float32)
    assert torch.equal(decoded[::32], fmt.SCALE_MAP)


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 19),
    columns=st.one_of(st.integers(1, 70), st.sampled_from((512, 528, 1024, 1040, 5000))),
    dtype=dtypes,
    magnitude=magnitudes,
)
def test_int8_equals_the_reference(rows, columns, dtype, magnitude):
    """Rows that fill a tile, that share one, and that take several; a row's scale must reach that row only."""
    parts = parts_of(make_weight((rows, columns), torch.float32, magnitude), "int8")
    decoded = torch.ops.lowbit_triton.dequantize(*parts, [rows, columns], dtype)
    assert torch.equal(decoded, reference.dequantize(*parts, [rows, columns], dtype))


@interpreted
@pytest.mark.parametrize("format", fmt.FORMATS)
def test_into_a_tensor(format):
    """Decoding into a given buffer would write other bits, or around the buffer."""
    parts = parts_of(make_weight((33, 131)), format, 64)
    buffer = torch.full((35, 131), 7.0)
    torch.ops.lowbit_triton.dequantize_out(*parts, buffer[1:34])
    assert torch.equal(buffer[1:34], reference.dequantize(*parts, [33, 131], torch.float32))
    assert bool((buffer[[0, 34]] == 7).all())


@interpreted
@pytest.mark.parametrize("format", fmt.FORMATS)
@pytest.mark.parametrize("shape", [(0, 64), (4, 0), ()])
def test_empty_and_scalar(format, shape):
    """A model may hold such weights; an empty grid must not be launched."""
    parts = parts_of(torch.ones(shape), format, double_quant=False)
    assert torch.equal(
        torch.ops.lowbit_triton.dequantize(*parts, list(shape), torch.float16),
        reference.dequantize(*parts, list(shape), torch.float16),
    )


def emulated(parts, shape, dtype):
    with launches("sm_80") as made:
        out = module.dequantize(*parts, shape, dtype)
    (launch,) = made
    emulate(launch)
    return out


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("format", "block_size", "double_quant", "numel"),
    [("nf4", 64, True, 8192), ("nf4", 4096, False, 9001), ("fp4", 32, True, 1057), ("fp4", 64, False, 3)],
)
def test_machine_instructions(dtype, format, block_size, double_quant, numel):
    """What NVIDIA's GPUs run is inline assembly that the interpreter never sees: aligned and ragged, bit for bit."""
    parts = parts_of(make_weight((numel,)), format, block_size, double_quant)
    decoded = emulated(parts, [numel], dtype)
    assert torch.equal(decoded, reference.dequantize(*parts, [numel], dtype))


@compiled_only
@pytest.mark.parametrize("format", FORMATS)
def test_machine_instructions_every_code(format):
    """One of the 256 bytes, at some place in a word, would be decoded wrongly."""
    packed = torch.arange(4 * 256).mul(0x9D).to(torch.uint8)
    parts = (packed, torch.ones(32), None, None, f"{format}:64")
    decoded = emulated(parts, [2048], torch.float32)
    assert torch.equal(decoded, reference.dequantize(*parts, [2048], torch.float32))


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1024), (5, 77), (1, 5000)])
def test_int8_machine_instructions(shape, dtype):
    """int8 on NVIDIA's GPUs, whose code the interpreter never sees, would decode other bits."""
    parts = parts_of(make_weight(shape), "int8")
    decoded = emulated(parts, list(shape), dtype)
    assert torch.equal(decoded, reference.dequantize(*parts, list(shape), dtype))


@compiled_only
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_unaligned_memory(format):
    """A slice of a file mapped into memory begins anywhere; a 16-byte access there would be a fault."""
    parts = parts_of(make_weight((2, 256)), format, 64)
    packed, out = unaligned(parts[0]).copy_(parts[0]), unaligned(torch.empty(2, 256, dtype=torch.float16))
    with launches("sm_80") as made:
        module.dequantize_out(packed, *parts[1:], out)
    emulate(made[0])
    assert torch.equal(out, reference.dequantize(*parts, [2, 256], torch.float16))


@compiled_only
def test_more_than_31_bits():
    """A stack of experts may have more elements than 32 bits can number: the last program of such a tensor."""
    numel, end = 2**31 + 16384, 16384
    parts = parts_of(make_weight((end,)), "nf4", 4096)
    with launches("sm_80") as made:
        module.dequantize(*meta_weight((numel,), "nf4", 4096), [numel], torch.float16)
    ends = dict(zip(("packed", "absmax", "group_scales", "offset"), parts, strict=False))
    ends |= {"scale_map": fmt.SCALE_MAP, "out": torch.empty(end, dtype=torch.float16)}
    emulate(made[0], ends, blocks=[made[0].grid[0] - 1])
    assert torch.equal(ends["out"], reference.dequantize(*parts, [end], torch.float16))
