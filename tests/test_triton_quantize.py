"""The Triton quantize kernels: the same bytes as the reference's."""

import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, FORMATS, block_sizes, dtypes, formats, magnitudes, make_weight
from conftest_triton import compiled_only, emulate, interpreted, launches
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton_calls import tensor, unaligned

from lowbit import format as fmt
from lowbit import reference
from lowbit.backends.triton import quantize as module

ops = torch.ops.lowbit_triton
sizes = st.one_of(st.integers(1, 200), st.sampled_from((1024, 1025, 4096, 4099, 8192, 9001)))


def assert_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype and torch.equal(our, their)


@interpreted
@settings(max_examples=40, deadline=None)
@given(
    numel=sizes,
    dtype=dtypes,
    format=formats,
    block_size=block_sizes,
    magnitude=magnitudes,
    seed=st.integers(0, 5),
)
@example(numel=4133, dtype=torch.float32, format="fp4", block_size=32, magnitude=0.0, seed=0)
def test_bytes_equal_the_reference(numel, dtype, format, block_size, magnitude, seed):
    """A weight quantized on a GPU has to be the same file as one quantized on a CPU."""
    weight = make_weight((numel,), dtype, magnitude, seed)
    assert_same(ops.quantize(weight, f"{format}:{block_size}"), reference.quantize(weight, f"{format}:{block_size}"))


@interpreted
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_block_size(format, block_size):
    """A program holds many short blocks or one long one, and the short last block is a launch of its own."""
    weight = torch.randn(9001, generator=torch.Generator().manual_seed(block_size)).to(torch.bfloat16)
    assert_same(ops.quantize(weight, f"{format}:{block_size}"), reference.quantize(weight, f"{format}:{block_size}"))


@interpreted
@pytest.mark.parametrize("format", FORMATS)
def test_codes_change_exactly_above_each_threshold(format):
    """A value on a threshold, or one bit beside it, must get bitsandbytes' code, or files differ."""
    midpoints, code_of_rank = fmt.thresholds(format)
    inf = torch.tensor(float("inf"))
    below, above = torch.nextafter(midpoints, -inf), torch.nextafter(midpoints, inf)
    block = torch.cat([torch.ones(1), below, midpoints, above, torch.zeros(18)])
    packed, _ = ops.quantize(block, f"{format}:64")
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)
    assert torch.equal(codes[1:46], torch.cat([code_of_rank[:-1], code_of_rank[:-1], code_of_rank[1:]]))


@interpreted
def test_not_contiguous():
    """A transposed weight is quantized in the order of its elements, not of its memory."""
    weight = make_weight((48, 70)).T
    for spec in ("nf4:64", "int8"):
        assert_same(ops.quantize(weight, spec), reference.quantize(weight, spec))


@interpreted
@pytest.mark.parametrize("format", fmt.FORMATS)
@pytest.mark.parametrize("shape", [(0, 64), (4, 0), ()])
def test_empty_and_scalar(format, shape):
    """A model may hold such weights; an empty grid must not be launched."""
    weight, spec = torch.ones(shape), str(fmt.WeightSpec(format))  # of double-quantized scales too: they follow
    assert_same(ops.quantize(weight, spec), reference.quantize(weight, spec))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bad", "index"), [(float("nan"), 0), (float("inf"), 1023), (-float("inf"), 1030)])
def test_non_finite_values_reach_absmax(dtype, bad, index):
    """The public function finds NaN and inf by absmax alone; a block that hid one would be garbage in silence."""
    weight = make_weight((1031,), dtype)
    weight[index] = bad
    _, absmax = ops.quantize(weight, "nf4:64")
    bad_block = torch.arange(absmax.numel()) == index // 64
    assert bool((~torch.isfinite(absmax) == bad_block).all())
    codes, absmax = ops.quantize(weight.view(1, -1), "int8")
    assert not torch.isfinite(absmax[0])
    assert torch.equal(codes, reference.quantize(weight.view(1, -1), "int8")[0])


@interpreted
@settings(max_examples=25, deadline=None)
@given(blocks=st.one_of(st.integers(1, 40), st.sampled_from((255, 256, 257, 700, 3000))), magnitude=magnitudes)
@example(blocks=300, magnitude=0.0)
def test_double_quantized_scales_equal_the_reference(blocks, magnitude):
    """Scales of full or short groups would be stored as other bytes."""
    absmax = torch.randn(blocks, generator=torch.Generator().manual_seed(blocks)).abs() * magnitude
    offset = absmax.mean()
    assert_same(ops.quantize_scales(absmax, offset), reference.quantize_scales(absmax, offset))


@interpreted
def test_every_position_of_a_scale():
    """A scale at one of the 65536 rounding positions would get another code of the map."""
    positions = torch.arange(258 * 255, dtype=torch.float64).clamp(max=65535) / 32767.5 - 1.0
    # Each group begins with the 1 that is its scale.
    absmax = torch.cat([torch.ones(258, 1), positions.float().view(258, 255)], 1).reshape(-1)
    assert_same(ops.quantize_scales(absmax, torch.zeros(())), reference.quantize_scales(absmax, torch.zeros(())))


@interpreted
@pytest.mark.parametrize("offset", [0.5, float("nan")])
def test_non_finite_scales_stay_in_bounds(offset):
    """NaN must not index past the table: the offset of a weight with NaN is NaN."""
    absmax = torch.tensor([1.0, float("nan"), float("inf")])
    codes, _ = ops.quantize_scales(absmax, torch.tensor(offset))
    assert torch.equal(codes, reference.quantize_scales(absmax, torch.tensor(offset))[0])


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.one_of(st.integers(1, 70), st.sampled_from((512, 1040, 4097))),
    dtype=dtypes,
    magnitude=magnitudes,
)
def test_int8_equals_the_reference(rows, columns, dtype, magnitude):
    """Rows that share a program, rows in several pieces, or a row of zeros would get other codes."""
    weight = make_weight((rows, columns), dtype, magnitude)
    weight[-1] = 0
    assert_same(ops.quantize(weight, "int8"), reference.quantize(weight, "int8"))


@compiled_only
@pytest.mark.parametrize(
    ("dtype", "format", "block_size", "numel"),
    [
        (torch.bfloat16, "nf4", 64, 8192),
        (torch.float32, "fp4", 4096, 4097),
        (torch.float16, "fp4", 32, 4133),
        (torch.float32, "nf4", 128, 255),
    ],
)
def test_machine_instructions(dtype, format, block_size, numel):
    """Divisions, reciprocals and comparisons as NVIDIA's GPUs execute them; an approximate division moves codes."""
    weight = make_weight((numel,), dtype, 1.0)
    with launches("sm_80") as made:
        ours = module.quantize(weight, f"{format}:{block_size}")
    assert len(made) == (numel >= block_size) + (numel % block_size > 0)
    for launch in made:
        emulate(launch)
    assert_same(ours, reference.quantize(weight, f"{format}:{block_size}"))


@compiled_only
def test_unaligned_memory():
    """A weight may be a slice that begins anywhere; a 16-byte access there would be a fault."""
    weight = make_weight((4096,), torch.bfloat16)
    with launches("sm_80") as made:
        ours = module.quantize(unaligned(weight).copy_(weight), "nf4:64")
    emulate(made[0])
    assert_same(ours, reference.quantize(weight, "nf4:64"))


@compiled_only
@pytest.mark.parametrize("blocks", [2048, 259])
def test_scales_machine_instructions(blocks):
    """One FMA where the format has a product and a sum would change scales' codes."""
    absmax = torch.randn(blocks, generator=torch.Generator().manual_seed(0)).abs()
    with launches("sm_80") as made:
        ours = module.quantize_scales(absmax, absmax.mean())
    emulate(made[0])
    assert_same(ours, reference.quantize_scales(absmax, absmax.mean()))


@compiled_only
@pytest.mark.parametrize(("shape", "dtype"), [((5, 77), torch.float32), ((3, 5008), torch.bfloat16)])
def test_int8_machine_instructions(shape, dtype):
    """Rounding half to even, which is an addition and a subtraction that no compiler may cancel."""
    weight = make_weight(shape, dtype)
    weight[0] = torch.arange(shape[1]) % 127 + 0.5
    weight[0, 0] = 127  # the scale is 1
    with launches("sm_80") as made:
        ours = module.quantize(weight, "int8")
    emulate(made[0])
    assert_same(ours, reference.quantize(weight, "int8"))


@compiled_only
def test_more_than_31_bits():
    """A stack of experts may have more elements than 32 bits can number: the last programs of such a tensor."""
    weight = make_weight((4096 + 129,), torch.float16)
    packed, absmax = reference.quantize(weight, "nf4:4096")
    large = tensor(2**31 + 4096 + 129, dtype=torch.float16)
    ends = {"weight": weight, "packed": torch.zeros_like(packed), "absmax": torch.zeros(2)}
    with launches("sm_80") as made:
        module.quantize(large, "nf4:4096")
    for launch in made:
        emulate(launch, ends, blocks=[launch.grid[0] - 1])
    assert_same((ends["packed"], ends["absmax"]), (packed, absmax))

    short, scale = weight[-129:].clone(), absmax[-1:].clone()
    ends = {"weight": short, "scales": scale, "packed": torch.zeros(65, dtype=torch.uint8)}
    with launches("sm_80") as made:
        module.encode(large, tensor(fmt.block_count(large.numel(), 4096)), "nf4:4096")
    emulate(made[0], ends, blocks=[made[0].grid[0] - 1])
    assert torch.equal(ends["packed"], reference.encode(short, scale, "nf4:4096"))
