"""The formats' tables are right, and equal in Python and C++."""

import pytest
import torch
from cases import FORMATS, KERNELS, kernels

import lowbit
from lowbit import format as fmt


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("format", FORMATS)
def test_codebook_is_what_kernels_decode(name, format):
    """A differing codebook would decode every file to other weights."""
    packed = torch.tensor([(2 * i) << 4 | (2 * i + 1) for i in range(8)], dtype=torch.uint8)
    spec = lowbit.WeightSpec(format, double_quant=False)
    q = lowbit.QuantizedTensor(packed, torch.ones(1), shape=(16,), dtype=torch.float32, spec=spec)
    with kernels(name):
        assert torch.equal(q.dequantize(), fmt.codebook(format))


@pytest.mark.parametrize("name", KERNELS)
def test_scale_map_is_what_kernels_decode(name):
    """A differing scale map would decode every double-quantized file to other weights."""
    codes = torch.arange(256, dtype=torch.uint8)
    packed = torch.full((256 * 16,), 0xFF, dtype=torch.uint8)  # NF4 code 15 is 1.0
    parts = (packed, codes, torch.ones(1), torch.zeros(()))
    q = lowbit.QuantizedTensor(*parts, shape=(256 * 32,), dtype=torch.float32, spec=lowbit.WeightSpec("nf4", 32))
    with kernels(name):
        assert torch.equal(q.dequantize()[::32], fmt.SCALE_MAP)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("format", FORMATS)
def test_codes_change_exactly_above_each_threshold(name, format):
    """A value on a threshold, or one bit beside it, must get bitsandbytes' code, or files differ."""
    midpoints, code_of_rank = fmt.thresholds(format)
    inf = torch.tensor(float("inf"))
    below, above = torch.nextafter(midpoints, -inf), torch.nextafter(midpoints, inf)
    block = torch.cat([torch.ones(1), below, midpoints, above, torch.zeros(18)])
    with kernels(name):
        q = lowbit.quantize(block, format=format, double_quant=False)
    codes = torch.stack([q.packed >> 4, q.packed & 15], 1).reshape(-1)
    expected = torch.cat([code_of_rank[:-1], code_of_rank[:-1], code_of_rank[1:]])
    assert torch.equal(codes[1:46], expected)


def test_zero_codes():
    """bitsandbytes stores an all-zero NF4 block as code 7 and an FP4 one as code 0."""
    for format, byte in (("nf4", 0x77), ("fp4", 0x00)):
        assert lowbit.quantize(torch.zeros(128), format=format).packed.tolist() == [byte] * 64


def test_scale_map_is_sorted_and_signed():
    """The table of nearest entries assumes a sorted map."""
    assert fmt.SCALE_MAP.numel() == 256
    assert bool((fmt.SCALE_MAP.diff() > 0).all())
    assert fmt.SCALE_MAP[127] == 0 and fmt.SCALE_MAP[255] == 1
