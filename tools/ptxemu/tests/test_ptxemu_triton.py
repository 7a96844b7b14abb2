"""Triton kernels on the emulator: their PTX is another compiler's, with other habits."""

import sys

import numpy as np
import pytest
from ptx_kernels import KERNELS, bf16_bits, bf16_values
from ptxemu import Device, load

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def compile_ptx(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(KERNELS), *sys.path])
    from matmul_triton import compile_ptx

    return compile_ptx


@pytest.mark.parametrize("tile", [(32, 32, 32, 2, 2), (64, 64, 64, 4, 3), (128, 32, 32, 4, 2)])
@pytest.mark.parametrize("capability, instruction", [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_triton_matmul(compile_ptx, capability, instruction, tile):
    """mma.sync with ldmatrix on sm_80, wgmma on swizzled tiles on sm_90, both behind lazy cp.async; ragged sizes."""
    m_size, n_size, k_size = tile[0] + 5, tile[1] + 8, 2 * tile[2] + 16
    ptx, metadata = compile_ptx(capability, *tile)
    random = np.random.default_rng(0)
    a, b = (bf16_bits(random.normal(0, 1, shape)) for shape in ((m_size, k_size), (k_size, n_size)))
    c = np.full((m_size, n_size), np.nan, np.float32)
    result = load(ptx).launch(
        "matmul",
        grid=(2, 2),
        block=32 * metadata.num_warps,
        args=[a, b, c, m_size, n_size, k_size],
        shared=metadata.shared,
        pad_args=True,
        device=Device.for_arch(capability),
    )
    expected = bf16_values(a).astype(np.float64) @ bf16_values(b).astype(np.float64)
    np.testing.assert_allclose(c, expected, rtol=1e-4, atol=1e-3)
    assert not result.warnings
    if tile[0] >= 64:  # a warpgroup's tile
        assert result.count(instruction)
