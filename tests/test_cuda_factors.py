"""The CUDA kernel that rounds LoRA's factors, executed by the emulator: bit for bit what torch's ops would make."""

import itertools

import pytest
import torch
from cases import DTYPES, assert_same_bits, factors, rounded_factors
from conftest_cuda import DTYPE_CODES, call, launchers, written


def rounded(low, up, dtype, scaling, is_transposed):
    """The kernel's output. ``is_transposed``: up and its result are transposed in memory."""
    (m, rank), n = low.shape, up.shape[0]
    up = up.T.contiguous() if is_transposed else up
    strides = (1, n) if is_transposed else (rank, 1)
    low_out, up_out = written(m * rank, dtype), written(n * rank, dtype)
    operands = (low, DTYPE_CODES[low.dtype], up, DTYPE_CODES[up.dtype], *strides)
    call("lowbit_rounded_factors", *operands, scaling, m, n, rank, low_out, up_out, DTYPE_CODES[dtype])
    return low_out.view(m, rank), up_out.view(rank, n).T if is_transposed else up_out.view(n, rank)


def assert_equals_torch(low, up, dtype, scaling, is_transposed):
    for ours, theirs in zip(
        rounded(low, up, dtype, scaling, is_transposed), rounded_factors(low, up, dtype, scaling), strict=True
    ):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("rank", [1, 8, 17])
@pytest.mark.parametrize(("m", "n"), [(1, 65), (3, 1), (257, 1030), (1000, 513)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch(m, n, rank, dtype):
    """A row left out, or divided by more than up is multiplied by, is another LoRA than the one being trained."""
    for scaling, is_transposed in ((1.0, True), (0.7, False)):
        assert_equals_torch(*factors(m, n, rank, torch.float32, torch.float32), dtype, scaling, is_transposed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype):
    """LoRA may be kept in any dtype, and t in another: misread, it is noise."""
    for low_dtype, up_dtype in itertools.product(DTYPES, repeat=2):
        assert_equals_torch(*factors(33, 70, 5, low_dtype, up_dtype), dtype, 0.7, False)


@pytest.mark.parametrize("scaling", [0.0, -64.0, 2.0**-10, 1e6])
def test_every_scaling(scaling):
    """A scaling that fp16 does not hold, or that takes low beyond fp16, would not go to up."""
    assert_equals_torch(*factors(40, 50, 8, torch.float32, torch.float32), torch.float16, scaling, True)


def test_ranks_that_share_nothing():
    """From some rank on there is one block of threads for a component, which takes all of its rows."""
    assert_equals_torch(*factors(300, 1100, 130, torch.float32, torch.float32), torch.float16, 0.7, False)
    assert launchers().launches[-1].grid == (130, 1, 1)


def test_nothing_to_do():
    """No rows, no outputs or a LoRA that is off would launch an empty grid, which CUDA refuses."""
    call("lowbit_dequantize", *[None] * 5, 0, 64, 0, None, 0)
    before = len(launchers().launches)
    for m, n, rank in ((0, 4, 2), (3, 0, 2), (3, 4, 0)):
        rounded(torch.ones(m, rank), torch.ones(n, rank), torch.float16, 1.0, False)
    assert len(launchers().launches) == before
