"""The CUDA matrix-vector kernels, executed by the emulator: products within the bound of tests/cases.py."""

import dataclasses
import shutil
import subprocess

import numpy as np
import pytest
import torch
from cases import (
    BLOCK_SIZES,
    DTYPES,
    FORMATS,
    assert_within,
    block_sizes,
    dtypes,
    formats,
    make_weight,
    product_tolerance,
    weight_error_cuda,
)
from conftest_cuda import (
    CSRC,
    DTYPE_CODES,
    FORMAT_CODES,
    ROOT,
    bias_arguments,
    call,
    emulator,
    launchers,
    multiprocessors,
    spec_of,
    unaligned,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import reference

RANKS = (0, 1, 8, 17, 64)


@dataclasses.dataclass
class Case:
    """Operands of one product; ``aligned`` is about packed and x."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    rank: int = 0
    bias: torch.dtype | None = None
    scaling: float = 0.7
    magnitude: float = 0.02
    aligned: bool = True

    def __post_init__(self):
        weight = make_weight((self.n, self.k), torch.float32, self.magnitude)
        if self.format == "int8":
            self.block_size = self.k
        self.packed, self.absmax = reference.quantize(weight, spec_of(self.format, self.block_size))
        self.group_scales = self.offset = None
        if self.double_quant and self.format != "int8":
            self.offset = self.absmax.mean()
            self.absmax, self.group_scales = reference.quantize_scales(self.absmax, self.offset)
        generator = torch.Generator().manual_seed(self.m)

        def made(*shape):
            return torch.randn(shape, generator=generator)

        self.x = made(self.m, self.k).to(self.dtype)
        self.t, self.lora_b = (made(self.m, self.rank), made(self.n, self.rank)) if self.rank else (None, None)
        self.bias = None if self.bias is None else made(self.n).to(self.bias)

    def run(self):
        """The kernel's y [m, n]."""
        packed, x = self.packed, self.x.reshape(-1)
        if not self.aligned:
            packed, x = unaligned(packed), unaligned(x)
        y = written(self.m * self.n, self.dtype, self.aligned)
        scales = (self.absmax, None, None, None)
        if self.group_scales is not None:
            scales = (None, self.absmax, self.group_scales, self.offset.reshape(1))
        weight = (packed, *scales, FORMAT_CODES[self.format], self.block_size)
        lora = (*bias_arguments(self.bias), self.t, self.lora_b, self.scaling, self.m, self.n, self.k, self.rank)
        sizes = np.zeros(2, np.int64)
        arguments = ("lowbit_linear_gemv", x, DTYPE_CODES[self.dtype], *weight, *lora)
        assert launchers().call(*arguments, None, None, None, sizes, None) == 0
        self.workspace, self.counters = map(int, sizes)
        # Full of anything: a partial sum that is not written would be a fault when it is read.
        memory = np.full(self.workspace, np.nan, np.float32)
        workspace = emulator("address_space").Uninitialized(memory) if self.workspace else None
        counters = np.zeros(self.counters, np.uint32)
        call(*arguments, y, workspace, counters if self.counters else None, sizes)
        assert not counters.any()  # what the next product finds
        return y.view(self.m, self.n)

    def decoded(self):
        spec = spec_of(self.format, self.block_size, self.group_scales is not None)
        parts = (self.packed, self.absmax, self.group_scales, self.offset, spec)
        return reference.dequantize(*parts, [self.n, self.k], torch.float32).double()

    def check(self, roundings: int = 1):
        """Run, and compare with fp64 arithmetic on the decoded weight; each addition may round ``roundings`` times."""
        weight, x = self.decoded(), self.x.double()
        exact, magnitude = x @ weight.T, x.abs() @ weight.abs().T
        rounding = weight_error_cuda(self.format, self.dtype) * magnitude
        if self.rank:
            exact = exact + self.scaling * self.t.double() @ self.lora_b.double().T
            magnitude = magnitude + self.scaling * self.t.double().abs() @ self.lora_b.double().abs().T
        if self.bias is not None:
            exact, magnitude = exact + self.bias.double(), magnitude + self.bias.double().abs()
        tolerance = product_tolerance(magnitude, exact, roundings * (self.k + self.rank), self.dtype) + 1.01 * rounding
        assert_within(self.run(), exact, tolerance)


def test_routing(tmp_path):
    """csrc/cuda/plan.h: a wrong path would be right, and slow."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler found")
    source, program = ROOT / "tests" / "cuda" / "plan.cpp", tmp_path / "plan"
    subprocess.run([compiler, "-std=c++17", f"-I{CSRC}", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def kernels_run() -> str:
    return launchers().launches[-1].kernel


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 8),
    n=st.sampled_from((16, 17, 31, 40)),
    blocks=st.integers(1, 9),
    block_size=st.sampled_from((32, 64, 128, 256)),
    dtype=dtypes,
    format=formats,
    double_quant=st.booleans(),
    rank=st.sampled_from(RANKS),
    bias=st.sampled_from((None, *DTYPE_CODES)),
    magnitude=st.sampled_from((1e-6, 0.02, 30.0)),
)
def test_fast_shapes(m, n, blocks, block_size, dtype, format, double_quant, rank, bias, magnitude):
    """Rows that do not fill a tile, and columns that do not fill a step, must not leak into the others."""
    k = blocks * block_size
    case = Case(m, n, k, dtype, format, block_size, double_quant, rank, bias, magnitude=magnitude)
    case.check()
    assert ("gemv_fma" if dtype == torch.float32 else "gemv_mma") in kernels_run()


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 19),
    k=st.integers(1, 140),
    dtype=dtypes,
    format=st.sampled_from((*FORMATS, "int8")),
    block_size=block_sizes,
    double_quant=st.booleans(),
    rank=st.sampled_from(RANKS),
    bias=st.sampled_from((None, *DTYPE_CODES)),
    aligned=st.booleans(),
)
def test_any_shape(m, n, k, dtype, format, block_size, double_quant, rank, bias, aligned):
    """Blocks that cross rows, rows that start inside a byte, or unaligned memory would be misread."""
    Case(m, n, k, dtype, format, block_size, double_quant, rank, bias, aligned=aligned).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size(block_size, dtype):
    """A step spans several blocks or a part of one; each sum has to meet its own scale."""
    Case(3, 16, max(block_size, 128), dtype, block_size=block_size, rank=8).check()


@pytest.mark.parametrize("m", [1, 2, 4, 5, 8, 9, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_x(m, dtype):
    """Rows beyond what a block takes, or beyond a group, would be left out or repeated."""
    Case(m, 33, 192, dtype, rank=17, bias=torch.float32).check()


@pytest.mark.parametrize("m", [3, 8])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("block_size", [32, 64])
def test_rows_that_end_within_a_step(block_size, blocks, m):
    """The blocks of a step that a row lacks would be those of the row after it, or the last of the step before it."""
    for tail in (0, 8 * 128 * 2):
        Case(m, 18, tail + blocks * block_size, torch.bfloat16, block_size=block_size).check()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("dtype", "m"), [(torch.float32, 2), (torch.float16, 2), (torch.bfloat16, 5)])
@pytest.mark.parametrize("block_size", [32, 64])
def test_several_panels(block_size, dtype, m, double_quant):
    """The scales of the next panel must not overwrite those that a slower warp still reads."""
    k, panel = 2 * 128 * block_size + 2048 + 192, 128 * block_size
    with multiprocessors(1):
        Case(m, 16, k, dtype, block_size=block_size, double_quant=double_quant).check()
    assert launchers().launches[-1].grid[1] * panel < k


@pytest.mark.parametrize("block_size", [32, 64, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_shared_out_over_blocks(dtype, block_size):
    """Partial sums meet in a workspace: each block writes its own, and the last adds up all of them once."""
    k = 6 * 2048 if block_size == 2048 else 6 * 2048 + 64
    shares = 6 if block_size == 2048 else 13
    case = Case(5, 20, k, dtype, block_size=block_size, rank=8, bias=torch.float32)
    case.check()
    assert case.workspace == shares * 5 * 20
    tiles = 2 * (3 if dtype == torch.float32 else 1)
    assert case.counters == tiles and len(launchers().launches) == 1 and "gemv" in kernels_run()
    assert launchers().launches[-1].grid == (2, shares, tiles // 2)


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_order_of_arrival(order):
    """Which block comes last differs from run to run; the sum must not, and no share may be missing."""
    case = Case(3, 20, 5 * 1024, torch.bfloat16, rank=8, bias=torch.float32)
    expected, options = case.run(), launchers().options

    def blocks(grid):
        every = [(x, y, 0) for y in range(grid[1]) for x in range(grid[0])]
        return (
            every
            if order == "forward"
            else every[::-1]
            if order == "backward"
            else every[1::3] + every[::3] + every[2::3]
        )

    launchers().options = {**options, "blocks": blocks, "batch_blocks": 1}
    try:
        assert torch.equal(case.run().view(torch.uint8), expected.view(torch.uint8))
    finally:
        launchers().options = options
    assert launchers().launches[-1].grid == (2, 5, 1)


def test_shape_of_the_launch():
    """A tile of rows each, all columns in one block of threads where the GPU is full, groups of rows of x in z."""
    with multiprocessors(2):
        Case(11, 40, 4096 + 128, torch.bfloat16).run()
        assert launchers().launches[-1].grid == (3, 1, 2)
        assert launchers().launches[-1].block == (256, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 3])
def test_16_bits_before_sm_80(m, dtype):
    """Where the tensor cores cannot take them, x is widened and multiplied in fp32: the same code, run for sm_80."""
    device = launchers().device
    launchers().device = dataclasses.replace(device, compute_capability=(7, 5))
    try:
        Case(m, 24, 320, dtype, rank=1).check()
    finally:
        launchers().device = device
    assert "gemv_fma" in kernels_run()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores_that_truncate(dtype):
    """A GPU may cut off what does not fit when it adds, which is an error of twice a rounding's."""
    options = launchers().options
    launchers().options = {**options, "mma_mode": "trunc"}
    try:
        Case(4, 16, 1024, dtype, rank=8, bias=torch.float32).check(roundings=2)
    finally:
        launchers().options = options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinity_and_nan_stay_in_their_row(value, format, dtype):
    """An overflow in one sample must show up there, and nowhere else."""
    for m in (3, 8):
        case = Case(m, 18, 256, dtype, format)
        clean = case.run()
        case.x[1, 200] = value
        y = case.run()
        others = [row for row in range(m) if row != 1]
        assert torch.equal(y[others], clean[others])
        expected = case.x.double() @ case.decoded().T
        assert torch.equal(y[1].isfinite(), expected[1].isfinite())
        assert torch.equal(y[1].isnan(), expected[1].isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_that_is_not_finite(dtype):
    """A weight that had overflowed must not come out as a number."""
    case = Case(2, 16, 256, dtype, double_quant=False)
    case.absmax[3 * 4 + 1] = float("nan")
    case.absmax[5 * 4 + 3] = float("inf")
    y = case.run()
    assert not y[:, [3, 5]].isfinite().any()
    assert y[:, [row for row in range(16) if row not in (3, 5)]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [16, 512, 528, 1040])
@pytest.mark.parametrize("m", [1, 2, 6])
def test_int8(m, k, dtype):
    """int8 rows, also those shorter than what a warp reads, would be summed wrongly."""
    Case(m, 19, k, dtype, "int8", rank=17, bias=torch.float32).check()
    assert "gemv_int8" in kernels_run()


@pytest.mark.parametrize("shape", [(0, 16, 64), (3, 0, 64), (3, 16, 0)])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_nothing_to_multiply(shape, format):
    """Without rows or outputs an empty grid would be launched; sums of nothing would lose LoRA and bias."""
    m, n, k = shape
    packed = torch.zeros(n * k // (2 if format == "nf4" else 1), dtype=torch.uint8)
    t, lora_b, bias = torch.ones(m, 2), torch.ones(n, 2), torch.ones(n)
    y = written(m * n, torch.float32)
    empty = torch.zeros(0)
    absmax = torch.zeros(n if format == "int8" else n * k // 64)
    weight = (packed, absmax, None, None, None, FORMAT_CODES[format], 64 if format == "nf4" else max(k, 1))
    arguments = (*bias_arguments(bias), t, lora_b, 0.5, m, n, k, 2, y, None, None, np.zeros(2, np.int64))
    x = torch.zeros(m * k) if m * k else empty
    assert launchers().call("lowbit_linear_gemv", x, 0, *weight, *arguments, None) == 0
    assert torch.equal(y, torch.full((m * n,), 2.0))
