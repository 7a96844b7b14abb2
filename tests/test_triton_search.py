"""The Triton kernels of ``scale="search"``: the same scales and codes as the reference's, bit for bit."""

import pytest
import torch
from cases import BLOCK_SIZES, block_sizes, dtypes, formats, magnitudes, make_weight
from conftest_triton import compiled_only, emulate, interpreted, launches
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit
from lowbit import format as fmt
from lowbit import reference
from lowbit.backends.triton import quantize as module

ops = torch.ops.lowbit_triton


def importance_of(columns: int) -> torch.Tensor:
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(2))
    importance[: columns // 2] = 0  # whole blocks of importance 0, too
    return importance


def scales_of(numel: int, block_size: int, magnitude: float) -> torch.Tensor:
    """Scales of either sign, tiny ones among them."""
    scales = torch.randn(fmt.block_count(numel, block_size), generator=torch.Generator().manual_seed(3)) * magnitude
    scales[::5] = 0
    return scales


@interpreted
@settings(max_examples=6, deadline=None)  # the interpreter takes 2 seconds for a search of blocks of 64
@given(
    shape=st.sampled_from(((1, 1), (7, 13), (70, 1), (40, 3), (1, 129), (3, 100), (2, 64))),
    dtype=dtypes,
    format=formats,
    block_size=st.sampled_from((32, 64)),
    magnitude=magnitudes,
    weighted=st.booleans(),
)
def test_searched_scales_equal_the_reference(shape, dtype, format, block_size, magnitude, weighted):
    """Every machine has to find the same scale, to the last bit of each block's error sums."""
    weight = make_weight(shape, dtype, magnitude, seed=1)
    importance = importance_of(shape[1]) if weighted else None
    scales = ops.search_scales(weight, importance, f"{format}:{block_size}")
    assert torch.equal(scales, reference.search_scales(weight, importance, f"{format}:{block_size}"))


@interpreted
def test_non_finite_values_reach_the_scale():
    """The public function finds NaN and inf by the scales alone."""
    weight = torch.ones(3, 32)
    weight[0, 7], weight[2, 31] = float("nan"), -float("inf")
    assert torch.isfinite(ops.search_scales(weight, None, "nf4:32")).tolist() == [False, True, False]


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    numel=st.one_of(st.integers(1, 200), st.sampled_from((4096, 4099, 9001))),
    dtype=dtypes,
    format=formats,
    block_size=block_sizes,
    magnitude=magnitudes,
)
def test_encoded_bytes_equal_the_reference(numel, dtype, format, block_size, magnitude):
    """Negative or tiny scales would get other codes."""
    weight, scales = make_weight((numel,), dtype, magnitude), scales_of(numel, block_size, magnitude)
    packed = ops.encode(weight, scales, f"{format}:{block_size}")
    assert torch.equal(packed, reference.encode(weight, scales, f"{format}:{block_size}"))


@interpreted
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_encode_every_block_size(block_size):
    """Each block's scale has to reach all of its elements."""
    weight, scales = make_weight((9000,)), scales_of(9000, block_size, 0.1)
    assert torch.equal(
        ops.encode(weight, scales, f"fp4:{block_size}"), reference.encode(weight, scales, f"fp4:{block_size}")
    )


@interpreted
def test_public_function():
    """``quantize(scale="search")`` puts the kernels together; under another backend it must give the same bytes."""
    weight, found = make_weight((6, 96)), {}
    for backend in ("triton", "reference"):
        with lowbit.use_backend(backend):
            found[backend] = lowbit.quantize(weight, block_size=32, scale="search", importance=importance_of(96))
    for ours, theirs in zip(found["triton"].parts(), found["reference"].parts(), strict=True):
        assert torch.equal(ours, theirs)


@compiled_only
@pytest.mark.parametrize(
    ("shape", "dtype", "format", "block_size", "weighted"),
    [
        ((2, 1024), torch.bfloat16, "nf4", 64, False),
        ((7, 45), torch.float32, "fp4", 32, True),
        ((40, 70), torch.float32, "nf4", 32, True),
        ((3, 400), torch.float32, "nf4", 512, True),
        ((9, 1), torch.float16, "fp4", 128, True),
    ],
)
def test_machine_instructions(shape, dtype, format, block_size, weighted):
    """Products, sums and their order as NVIDIA's GPUs execute them, in short and long blocks; one FMA moves a sum."""
    weight, importance = make_weight(shape, dtype, 1.0), importance_of(shape[1]) if weighted else None
    with launches("sm_80") as made:
        scales = module.search_scales(weight, importance, f"{format}:{block_size}")
    emulate(made[0])
    assert torch.equal(scales, reference.search_scales(weight, importance, f"{format}:{block_size}"))


@compiled_only
@pytest.mark.parametrize("numel", [4096, 333])
def test_encode_machine_instructions(numel):
    """encode, as NVIDIA's GPUs execute it, would choose other codes."""
    weight, scales = make_weight((numel,), torch.bfloat16, 1.0), scales_of(numel, 64, 1.0)
    with launches("sm_80") as made:
        packed = module.encode(weight, scales, "fp4:64")
    emulate(made[0])
    assert torch.equal(packed, reference.encode(weight, scales, "fp4:64"))
