"""quantize: bytes against the reference, golden vectors and live bitsandbytes; errors."""

import json
from pathlib import Path

import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, FORMATS, KERNELS, block_sizes, dtypes, formats, kernels, magnitudes, make_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import lowbit

GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes_0_50_2.safetensors"


def assert_same_bytes(q, other):
    for name, ours, theirs in zip(
        ("packed", "absmax", "group_scales", "offset"), q.parts(), other.parts(), strict=True
    ):
        assert (ours is None) == (theirs is None), name
        assert ours is None or torch.equal(ours, theirs), name


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=80, deadline=None)
@given(
    numel=st.one_of(st.integers(0, 200), st.sampled_from((255, 4095, 4097, 20001))),
    dtype=dtypes,
    format=formats,
    block_size=block_sizes,
    double_quant=st.booleans(),
    magnitude=magnitudes,
    seed=st.integers(0, 10),
)
def test_bytes_equal_the_reference(name, numel, dtype, format, block_size, double_quant, magnitude, seed):
    """A backend that packs other bytes writes files that other readers decode to other weights."""
    weight = make_weight((numel,), dtype, magnitude, seed)
    options = {"format": format, "block_size": block_size, "double_quant": double_quant}
    with kernels("reference"):
        expected = lowbit.quantize(weight, **options)
    with kernels(name):
        assert_same_bytes(lowbit.quantize(weight, **options), expected)


@pytest.mark.parametrize("name", KERNELS)
def test_bytes_equal_golden_vectors(name):
    """Files must stay readable by, and identical to, bitsandbytes 0.50.2's."""
    with safe_open(GOLDEN, "pt") as golden, kernels(name):
        cases = json.loads(golden.metadata()["cases"])
        for index, case in enumerate(cases):
            weight = golden.get_tensor(f"{index}.weight")
            plain = lowbit.quantize(weight, double_quant=False, **case)
            assert torch.equal(plain.packed.reshape(-1), golden.get_tensor(f"{index}.plain.packed"))
            assert torch.equal(plain.absmax.reshape(-1), golden.get_tensor(f"{index}.plain.absmax"))

            offset = golden.get_tensor(f"{index}.dq.offset")
            ops = torch.ops.lowbit_reference if name == "reference" else torch.ops.lowbit
            codes, group_scales = ops.quantize_scales(plain.absmax.reshape(-1), offset)
            assert torch.equal(codes, golden.get_tensor(f"{index}.dq.absmax"))
            assert torch.equal(group_scales, golden.get_tensor(f"{index}.dq.group_scales"))
            ulp = torch.nextafter(offset, torch.tensor(float("inf"))) - offset
            assert (lowbit.quantize(weight, **case).offset - offset).abs() <= 2 * ulp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_bytes_equal_live_bitsandbytes(format, dtype):
    """For any block size, bytes would differ from those of the bitsandbytes installed here."""
    bnb = pytest.importorskip("bitsandbytes").functional
    for block_size in BLOCK_SIZES:
        for shape in ((130, 97), (300, 64), (3, 40, 50), (33,)):
            weight = make_weight(shape, dtype, seed=block_size)
            packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=format, compress_statistics=True)
            plain = lowbit.quantize(weight, format=format, block_size=block_size, double_quant=False)
            assert torch.equal(plain.packed.reshape(-1), packed.reshape(-1))
            codes, group_scales = torch.ops.lowbit.quantize_scales(plain.absmax.reshape(-1), state.offset)
            assert torch.equal(codes, state.absmax)
            assert torch.equal(group_scales, state.state2.absmax)


@pytest.mark.parametrize("name", KERNELS)
def test_non_contiguous_weight(name):
    """A transposed weight must be read in its logical order, not in memory order."""
    weight = make_weight((96, 70))
    with kernels(name):
        assert_same_bytes(lowbit.quantize(weight.T), lowbit.quantize(weight.T.contiguous()))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 63, 64, 1000, 1026])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_weight_is_an_error(name, bad, index, dtype):
    """A NaN would silently turn a whole block of weights into garbage."""
    weight = make_weight((13, 79), dtype)
    weight.view(-1)[index] = bad
    with kernels(name), pytest.raises(ValueError, match=f"weight.*finite.*index {index}"):
        lowbit.quantize(weight)


def test_sizes_on_disk():
    """A weight would take more than the promised 0.516 bytes (0.563 with fp32 scales)."""
    weight = make_weight((1024, 1024))
    assert lowbit.quantize(weight).nbytes / weight.numel() == pytest.approx(0.516, abs=5e-4)
    assert lowbit.quantize(weight, double_quant=False).nbytes / weight.numel() == 0.5625


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 48}, ValueError, "block_size.*power of two.*48"),
        ({"block_size": 16}, ValueError, "block_size.*32 to 4096.*16"),
        ({"block_size": 8192}, ValueError, "block_size.*8192"),
        ({"block_size": 64.0}, TypeError, "block_size.*int.*64.0"),
        ({"format": "nf5"}, ValueError, "format.*nf4.*nf5"),
        ({"scale": "max"}, ValueError, "scale.*absmax.*max"),
        ({"format": "int4"}, ValueError, "format.*nf4, fp4, int8.*int4"),
        ({"scale": "search", "format": "int8"}, ValueError, "scale: expected 'absmax' for format 'int8'"),
        ({"importance": torch.ones(64)}, ValueError, "importance: expected scale='search' with it"),
    ],
)
def test_bad_options(options, error, message):
    """A user's slip is named before any work."""
    with pytest.raises(error, match=message):
        lowbit.quantize(torch.ones(64, 64), **options)


@pytest.mark.parametrize("weight", [torch.ones(4, dtype=torch.int32), torch.ones(4, dtype=torch.float64), [1.0, 2.0]])
def test_bad_weight(weight):
    """Integer, double or non-tensor weights are refused, not converted behind the user's back."""
    with pytest.raises(TypeError, match="weight: expected"):
        lowbit.quantize(weight)
