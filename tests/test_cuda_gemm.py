"""The CUDA gemm, executed by the emulator: against fp64 arithmetic on the decoded weight."""

import contextlib
import ctypes
import dataclasses

import pytest
import torch
from cases import (
    BLOCK_SIZES,
    FORMATS,
    assert_within,
    block_sizes,
    formats,
    gemm_tolerance,
    make_weight,
)
from conftest_cuda import (
    DTYPE_CODES,
    FORMAT_CODES,
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

from lowbit import format as fmt
from lowbit import reference

NOT_SUPPORTED = 801  # cudaErrorNotSupported
TABLE_BYTES = 32 * 1024  # of decoded pairs
DTYPES = (torch.bfloat16, torch.float16)
RANKS = (0, 1, 8, 17, 64)


def stage_bytes(rows: int, columns: int) -> int:
    """Of the ring: a tile of x and one of packed W, whose 16 warps have 32 x 64 weights each."""
    depth = 16 * 32 * 64 // columns
    return depth * (2 * rows + columns // 2)


@contextlib.contextmanager
def launched_with(**options):
    """Context with other options of the emulator."""
    library = launchers()
    before = library.options
    library.options = before | options
    try:
        yield
    finally:
        library.options = before


@dataclasses.dataclass
class Weight:
    """A quantized weight of random values."""

    n: int
    k: int
    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    magnitude: float = 0.02

    def __post_init__(self):
        weight = make_weight((self.n, self.k), torch.float32, self.magnitude, seed=self.n)
        self.packed, self.absmax = reference.quantize(weight, spec_of(self.format, self.block_size))
        self.group_scales = self.offset = None
        if self.double_quant:
            self.offset = self.absmax.mean()
            self.absmax, self.group_scales = reference.quantize_scales(self.absmax, self.offset)

    @property
    def spec(self) -> str:
        return spec_of(self.format, self.block_size, self.double_quant)

    def scales(self) -> torch.Tensor:
        """One per block, decoded."""
        return reference.decode_scales(self.absmax, self.group_scales, self.offset, self.spec)

    def dense(self) -> torch.Tensor:
        parts = (self.packed, self.absmax, self.group_scales, self.offset)
        return reference.dequantize(*parts, self.spec, [self.n, self.k], torch.float32)

    def scale_arguments(self) -> tuple:
        if self.double_quant:
            return None, self.absmax, self.group_scales, self.offset.reshape(1)
        return self.absmax, None, None, None


def workspace_sizes(x, weight: Weight, packed=None) -> tuple[int, int]:
    """Floats, and counters; -1 floats where the kernel does not serve."""
    m = len(x) if x.dim() == 2 else x.numel() // weight.k
    packed = weight.packed if packed is None else packed
    arguments = (x, DTYPE_CODES[x.dtype], packed, FORMAT_CODES[weight.format], weight.block_size, m, weight.n, weight.k)
    counters = torch.zeros(1, dtype=torch.int64)
    floats = launchers().call("lowbit_linear_gemm_workspace", *arguments, counters, restype=ctypes.c_int64)
    return floats, int(counters)


def gemm(x, weight: Weight, bias=None, t=None, lora_b=None, scaling=1.0, y=None):
    """The kernel's output and its workspace, whose memory has to be written before it is read."""
    m, n = len(x), weight.n
    y = written(m * n, x.dtype) if y is None else y
    floats, blocks = workspace_sizes(x, weight)
    workspace, counters = torch.zeros(floats), torch.zeros(blocks, dtype=torch.int32)
    given = (emulator("address_space").Uninitialized(workspace), counters) if floats else (None, None)
    arguments = (x, DTYPE_CODES[x.dtype], weight.packed, *weight.scale_arguments(), FORMAT_CODES[weight.format])
    sizes = (m, n, weight.k, 0 if t is None else t.shape[1])
    call(
        "lowbit_linear_gemm",
        *arguments,
        weight.block_size,
        *bias_arguments(bias),
        t,
        lora_b,
        scaling,
        *sizes,
        y,
        *given,
    )
    assert not counters.any()
    return y.view(m, n), workspace


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_is_the_product(m, weight: Weight, dtype, rank, bias_dtype=torch.float32, scaling=0.7):
    x, t, lora_b = normal(m, weight.k, dtype=dtype), normal(m, rank, seed=1), normal(weight.n, rank, seed=2)
    bias = None if bias_dtype is None else normal(weight.n, dtype=bias_dtype, seed=3)
    y, _ = gemm(x, weight, bias, t if rank else None, lora_b if rank else None, scaling)
    bias = torch.zeros(weight.n).double() if bias is None else bias.double()
    dense, x, t, lora_b = weight.dense().double(), x.double(), t.double(), lora_b.double()
    exact = x @ dense.T + scaling * t @ lora_b.T + bias
    lora_magnitude = scaling * t.abs() @ lora_b.abs().T
    magnitude = x.abs() @ dense.abs().T + lora_magnitude + bias.abs()
    terms = weight.k + 3 * rank
    assert_within(y, exact, gemm_tolerance(magnitude, lora_magnitude, exact, terms, weight.format, dtype))


@settings(max_examples=25, deadline=None)
@given(
    m=st.one_of(st.integers(1, 40), st.sampled_from((9, 16, 17, 32, 33, 64, 65))),
    n=st.one_of(st.integers(1, 80), st.sampled_from((64, 128, 129, 260))),
    k=st.one_of(st.integers(1, 10), st.sampled_from((16, 40))).map(lambda chunks: chunks * 32),
    dtype=st.sampled_from(DTYPES),
    format=formats,
    block_size=block_sizes,
    double_quant=st.booleans(),
    magnitude=st.sampled_from((1e-6, 0.02, 30.0)),
    rank=st.sampled_from(RANKS),
    bias_dtype=st.sampled_from((None, *DTYPE_CODES)),
    processors=st.sampled_from((1, 3, 16, 132)),
)
def test_is_the_product(m, n, k, dtype, format, block_size, double_quant, magnitude, rank, bias_dtype, processors):
    """A ragged tile, a block that crosses rows, a kind of scale, LoRA or a split would make other numbers."""
    weight = Weight(n, k, format, block_size, double_quant, magnitude)
    with multiprocessors(processors):
        assert_is_the_product(m, weight, dtype, rank, bias_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [16, 32, 64])
def test_every_weight_meets_its_column(m, format, dtype):
    """Columns in another order would multiply other weights; rows of the unit matrix pick single ones, exactly."""
    weight = Weight(70, 192, format)
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).reshape(-1)
    block = torch.arange(codes.numel()) // weight.block_size
    values = fmt.codebook(format).to(dtype).float()[codes.int()] * weight.scales()[block]
    expected = values.to(dtype).view(weight.n, weight.k).T
    unit = torch.eye(weight.k, dtype=dtype)
    for first in range(0, weight.k, m):
        y, _ = gemm(unit[first : first + m].contiguous(), weight)
        assert torch.equal(y, expected[first : first + m])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("k", [320, 352])
def test_every_block_size(k, block_size):
    """Whether a row holds many blocks or a part of one, also where rows start inside a block."""
    assert_is_the_product(33, Weight(40, k, block_size=block_size), torch.bfloat16, rank=8)


@pytest.mark.parametrize(("m", "rows", "columns"), [(9, 16, 128), (30, 32, 128), (70, 64, 256)])
@pytest.mark.parametrize("block_size", [32, 64])
def test_launch_and_bank_conflicts(m, rows, columns, block_size):
    """One block per tile; no two lanes wait for a bank, in any access to shared memory."""
    rows, columns = (min(rows, 32), 128) if block_size == 32 else (rows, columns)
    with multiprocessors(1):
        assert_is_the_product(m, Weight(260, 512, block_size=block_size), torch.bfloat16, rank=17)
    (launch,) = launchers().launches
    assert launch.grid == (-(-m // rows) * -(-260 // columns), 1, 1)
    assert launch.block == (512, 1, 1)
    stages = 2 if rows == 64 else 4  # an A100's blocks have 163 KB
    assert launch.shared == TABLE_BYTES + stages * stage_bytes(rows, columns)
    assert launch.result.bank_conflicts == 0


@pytest.mark.parametrize("m", [16, 32, 64])
def test_small_shared_memory(m):
    """Consumer GPUs' blocks have 99 KB: a launch that wants more fails there. Fewer stages give the same bits."""
    weight, x = Weight(200, 1024), normal(m, 1024, dtype=torch.bfloat16)
    with multiprocessors(1):
        y, _ = gemm(x, weight)
        device = launchers().device
        launchers().device = dataclasses.replace(emulator("device").Device.for_arch("sm_89"), sm_count=1)
        try:
            again, _ = gemm(x, weight)
        finally:
            launchers().device = device
    launch = launchers().launches[-1]
    assert launch.shared == TABLE_BYTES + 2 * stage_bytes(m, 128 if m == 16 else 256)
    assert launch.shared <= 99 * 1024
    assert launch.result.bank_conflicts == 0
    assert torch.equal(again, y)


@pytest.mark.parametrize(("m", "columns"), [(16, 128), (32, 256), (64, 256)])
def test_packed_weights_are_read_once(m, columns):
    """Each byte of W once per tile of rows, x once per tile of columns, in 16-byte pieces that fill their sectors."""
    weight = Weight(512, 1024, double_quant=False)
    with multiprocessors(1):
        gemm(normal(m, 1024, dtype=torch.bfloat16), weight)
    result = launchers().launches[-1].result
    copies = [a for a in result.global_accesses if a.ins.opcode.startswith("cp.async")]
    read = 512 * 1024 // 2 + 512 // columns * m * 1024 * 2
    assert sum(a.bytes for a in copies) == read
    assert sum(a.sectors for a in copies) * 32 == read
    assert result.bank_conflicts == 0


@pytest.mark.parametrize(("m", "n", "k", "processors"), [(9, 70, 2048, 132), (40, 250, 2048, 3), (64, 300, 1536, 132)])
def test_splits_are_added_in_order(m, n, k, processors):
    """Few tiles leave multiprocessors idle, so that k is split; the result has the same bits whoever comes last."""
    weight, x = Weight(n, k), normal(m, k, dtype=torch.bfloat16)
    bias, t, lora_b = normal(n, seed=1), normal(m, 40, seed=2), normal(n, 40, seed=3)
    with multiprocessors(processors):
        y, workspace = gemm(x, weight, bias, t, lora_b)
        with launched_with(schedule="reverse", batch_blocks=3):
            again, _ = gemm(x, weight, bias, t, lora_b)
        assert len(launchers().launches) == 1
        assert_is_the_product(m, weight, torch.float16, rank=40)
    splits = workspace.numel() // (m * n)
    assert splits > 1
    assert torch.equal(y, again)
    total = torch.zeros(m, n)
    for part in workspace.view(splits, m, n):
        total += part
    assert torch.equal(y, (total + bias).to(y.dtype))


def test_lora_is_nearly_fp32():
    """t and lora_b are not simply rounded to 16 bits: the sums before the output's rounding show 3 * 2^-16."""
    m, n, k, rank = 20, 70, 2048, 40
    weight = Weight(n, k, magnitude=0.0, double_quant=False)
    t, lora_b = normal(m, rank, seed=1), normal(n, rank, seed=2)
    with multiprocessors(132):
        _, workspace = gemm(normal(m, k, dtype=torch.bfloat16), weight, None, t, lora_b, 0.7)
    sums = workspace.view(-1, m, n).double().sum(0)
    exact, magnitude = 0.7 * t.double() @ lora_b.double().T, 0.7 * t.double().abs() @ lora_b.double().abs().T
    assert_within(sums, exact, (4 * 2.0**-16 + 6 * rank * 2.0**-24) * magnitude)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("n", [68, 70, 71])
def test_output_at_any_address(n, aligned):
    """Wide stores where the output's rows are aligned, single ones elsewhere."""
    weight, x = Weight(n, 96), normal(21, 96, dtype=torch.bfloat16)
    y, _ = gemm(x, weight, y=written(21 * n, x.dtype, aligned))
    assert torch.equal(y, gemm(x, weight)[0])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_non_finite_x_stays_in_its_row(value):
    """What overflows must be seen, where it happened and nowhere else."""
    weight, x = Weight(70, 512), normal(20, 512, dtype=torch.bfloat16)
    x[3, 40] = value
    y, _ = gemm(x, weight)
    dense = weight.dense()
    expected = (x.float() @ dense.T).to(y.dtype)
    assert torch.equal(y[3].isnan(), expected[3].isnan())
    assert torch.equal(y[3].isinf() * y[3].sign(), expected[3].isinf() * expected[3].sign())
    assert bool(y[torch.arange(20) != 3].isfinite().all())


@pytest.mark.parametrize("double_quant", [False, True])
def test_non_finite_scale_stays_in_its_row(double_quant):
    """The scale of a block of W, or of a group of blocks, reaches the columns of y that it belongs to."""
    weight = Weight(70, 512, double_quant=double_quant)
    (weight.group_scales if double_quant else weight.absmax)[1] = torch.nan
    y, _ = gemm(normal(20, 512, dtype=torch.bfloat16), weight)
    touched = ~weight.dense().isfinite().all(1)
    assert 0 < touched.sum() < 70
    assert torch.equal(y.isnan(), touched.expand(20, 70))


def test_bad_rows_behind_the_end_do_no_harm():
    """The last tile's missing columns are zeros, not what follows in memory, which might be NaN times zero."""
    weight, x = Weight(70, 320), normal(9, 320, dtype=torch.bfloat16)
    y, _ = gemm(x, weight)
    padded = torch.full((10 * 320,), torch.nan, dtype=x.dtype)
    padded[: 9 * 320] = x.view(-1)
    assert torch.equal(gemm(padded[: 9 * 320].view(9, 320), weight)[0], y)


def test_what_it_does_not_serve():
    """Another path has to be taken, and the launcher says so before it launches anything."""
    weight, x = Weight(8, 64), normal(9, 64, dtype=torch.bfloat16)
    assert workspace_sizes(x, weight)[0] >= 0
    assert workspace_sizes(unaligned(x), weight)[0] == -1
    assert workspace_sizes(x, weight, unaligned(weight.packed))[0] == -1
    assert workspace_sizes(x.float(), weight)[0] == -1
    odd = Weight(8, 48)
    assert workspace_sizes(x[:, :48].contiguous(), odd)[0] == -1
    before = len(launchers().launches)
    y = written(72, x.dtype)
    rest = (64, None, 0, None, None, 1.0, 9, 8, 64, 0, y, None, None, None)
    arguments = (DTYPE_CODES[x.dtype], weight.packed, *weight.scale_arguments(), 0, *rest)
    assert launchers().call("lowbit_linear_gemm", unaligned(x), *arguments) == NOT_SUPPORTED
    device = launchers().device
    launchers().device = emulator("device").Device.for_arch("sm_75")
    try:
        assert launchers().call("lowbit_linear_gemm", x, *arguments) == NOT_SUPPORTED
    finally:
        launchers().device = device
    assert len(launchers().launches) == before


@pytest.mark.parametrize(("m", "n"), [(0, 8), (9, 0)])
def test_nothing_to_do(m, n):
    """An empty product would launch an empty grid, which CUDA refuses."""
    x, packed, empty = (
        normal(m, 64, dtype=torch.bfloat16),
        torch.zeros(max(n * 32, 1), dtype=torch.uint8),
        torch.zeros(1),
    )
    before = len(launchers().launches)
    arguments = (
        x,
        2,
        packed,
        empty,
        None,
        None,
        None,
        0,
        64,
        None,
        0,
        None,
        None,
        1.0,
        m,
        n,
        64,
        0,
        empty,
        None,
        None,
        None,
    )
    assert launchers().call("lowbit_linear_gemm", *arguments) == 0
    assert len(launchers().launches) == before
