"""linear in Triton: against fp64 arithmetic on the decoded weight, by Triton's interpreter and by the emulator."""

import dataclasses

import pytest
import torch
from cases import (
    BLOCK_SIZES,
    FORMATS,
    UNIT_ROUNDOFF,
    assert_within,
    dtypes,
    formats,
    gemm_tolerance,
    make_weight,
    product_tolerance,
    tensor_core_tolerance,
)
from conftest_triton import (
    A100,
    compiled_only,
    emulate,
    every_kind,
    function,
    interpreted,
    launches,
    tile_of_a_layer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_calls import RANKS, parts_of

from lowbit import reference
from lowbit.backends.triton import shapes
from lowbit.backends.triton.shapes import Gpu, Problem, rows_of
from lowbit.format import WeightSpec

ROWS = (1, 2, 5, 16, 17, 33)
H100, MI300 = Gpu(90, 132), Gpu(0, 304, 64)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclasses.dataclass
class Case:
    """A product with all its operands; ``exact()`` and ``tolerance()`` in fp64."""

    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    rank: int = 8
    lora_dtype: torch.dtype = torch.float32
    has_bias: bool = True
    scaling: float = 0.7

    def __post_init__(self):
        weight = make_weight((self.n, self.k), torch.float32, seed=self.n)
        self.parts = parts_of(weight, self.format, self.block_size, self.double_quant)
        self.x = normal(self.m, self.k, dtype=self.dtype)
        self.t = normal(self.m, self.rank, dtype=self.lora_dtype, seed=1) if self.rank else None
        self.lora_b = normal(self.n, self.rank, dtype=self.lora_dtype, seed=2) if self.rank else None
        self.bias = normal(self.n, seed=3) if self.has_bias else None

    def arguments(self) -> tuple:
        return self.x, *self.parts, self.n, self.bias, self.t, self.lora_b, self.scaling

    def products(self):
        """(exact, its magnitude, LoRA's part of that, bias's)"""
        dense = reference.dequantize(*self.parts, [self.n, self.k], torch.float32).double()
        x = self.x.double()
        exact, magnitude = x @ dense.T, x.abs() @ dense.abs().T
        lora = bias = torch.zeros(())
        if self.rank:
            t, lora_b = self.t.double(), self.lora_b.double()
            exact = exact + self.scaling * t @ lora_b.T
            lora = self.scaling * t.abs() @ lora_b.abs().T
        if self.has_bias:
            exact, bias = exact + self.bias.double(), self.bias.double().abs()
        return exact, magnitude + lora + bias, lora, bias

    def check(self, y):
        exact, magnitude, lora, _ = self.products()
        terms = self.k + 3 * self.rank
        if self.dtype == torch.float32:
            tolerance = product_tolerance(magnitude, exact, terms, self.dtype)
        elif self.format == "int8":  # codes are exact in 16 bits
            tolerance = product_tolerance(magnitude, exact, 2 * terms, self.dtype) + 4 * 2.0**-16 * lora
        else:
            tolerance = gemm_tolerance(magnitude, lora, exact, terms, self.format, self.dtype)
        assert y.dtype == self.dtype and y.shape == exact.shape
        assert_within(y, exact, tolerance)

    def check_decoded(self, y):
        """Check y if W is rounded to 16 bits, and so are scaling * t, lora_b, bias, and the sum of LoRA and bias."""
        exact, magnitude, lora, bias = self.products()
        terms = self.k + self.rank
        if self.dtype == torch.float32:
            return assert_within(y, exact, product_tolerance(magnitude, exact, terms, self.dtype))
        tolerance = tensor_core_tolerance(magnitude, exact, terms, self.dtype, self.x.double().abs().sum(1)[:, None])
        return assert_within(y, exact, tolerance + 1.01 * UNIT_ROUNDOFF[self.dtype] * (3 * lora + 2 * bias))


def triton_linear(case: Case) -> torch.Tensor:
    return torch.ops.lowbit_triton.linear.default(*case.arguments())


@interpreted
@settings(max_examples=12, deadline=None)
@given(
    m=st.sampled_from(ROWS),
    n=st.one_of(st.integers(1, 80), st.sampled_from((64, 65))),
    blocks=st.integers(1, 9),
    dtype=dtypes,
    format=formats,
    block_size=st.sampled_from((32, 64, 128, 256)),
    double_quant=st.booleans(),
    rank=st.sampled_from(RANKS),
    lora_dtype=dtypes,
    has_bias=st.booleans(),
)
def test_is_the_product(m, n, blocks, dtype, format, block_size, double_quant, rank, lora_dtype, has_bias):
    """A layer's output would be wrong for a ragged tile, or for k in several parts (from 8 steps on)."""
    if dtype == torch.float32:
        m = min(m, shapes.MOST_FMA_ROWS["linear"])
    case = Case(m, n, blocks * block_size, dtype, format, block_size, double_quant, rank, lora_dtype, has_bias)
    case.check(triton_linear(case))


@interpreted
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size(block_size):
    """One that the loop steps over wrongly would scale by the neighbour's."""
    case = Case(3, 33, max(block_size, 128), block_size=block_size)
    case.check(triton_linear(case))


@interpreted
def test_many_rows():
    """The ragged tiles of training batches would be wrong."""
    case = Case(130, 131, 64, rank=17)
    case.check(triton_linear(case))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 33, 77), (17, 65, 192), (2, 3, 1), (1, 64, 512)])
def test_int8(shape, dtype):
    """int8 rows of some length, or at odd addresses, would be misread."""
    case = Case(*shape, dtype, "int8", rank=8)
    (case.check_decoded if dtype == torch.float32 and shape[0] > shapes.MOST_FMA_ROWS["linear"] else case.check)(
        triton_linear(case)
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 7, 65), (33, 5, 513), (600, 8, 64), (5, 1, 1)])
@pytest.mark.parametrize("rank", [0, 8])
def test_decodes_what_the_kernel_does_not_take(shape, dtype, rank):
    """Blocks that cross rows, and more rows than decoding on the way is worth."""
    if shape == (600, 8, 64) and dtype == torch.bfloat16:
        assert shapes.decodes_first(Problem("linear", 1024, 8, 64, dtype, WeightSpec()), A100)
    case = Case(*shape, dtype, rank=rank)
    case.check_decoded(triton_linear(case))


@interpreted
@pytest.mark.parametrize("scaling", [64.0, -64.0, 2.0**-10])
def test_fp16_holds_what_is_scaled(scaling):
    """t grows with x: scaled first it could leave fp16's range where the product does not."""
    x, parts = torch.zeros(3, 65, dtype=torch.float16), parts_of(make_weight((7, 65)))
    t, lora_b = torch.full((3, 4), 3000.0), torch.full((7, 4), 0.01 / scaling)
    y = torch.ops.lowbit_triton.linear(x, *parts, 7, None, t, lora_b, scaling)
    torch.testing.assert_close(y, torch.full_like(y, 120.0), rtol=2e-3, atol=0)


@interpreted
@pytest.mark.parametrize("shape", [(600, 8, 64), (3, 7, 65)])
@pytest.mark.parametrize("scaling", [0.7, 16.0])
@pytest.mark.parametrize("size", [1.0, 1e5, 1e7])
def test_decoded_fp16_holds_a_large_t(shape, scaling, size):
    """t is fp32, and where its product with a small lora_b is an fp16, an infinite output would end the training."""
    case = Case(*shape, torch.float16, scaling=scaling)
    case.t[:, ::2] *= size
    case.lora_b[:, ::2] *= 30 / size
    case.check_decoded(triton_linear(case))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("shape", [(600, 8, 64), (3, 7, 65)])
@pytest.mark.parametrize(
    ("bad", "of_t", "of_b"),
    [(float("inf"), 1.0, 10.0), (float("nan"), 1.0, 10.0), (float("nan"), 1e5, 1e-3), (1e30, 1.0, 0.5)],
)
def test_decoded_fp16_rows_are_apart(shape, bad, of_t, of_b):
    """A token that went wrong, or far out of range, must not spoil those of other sequences in the batch."""
    case = Case(*shape, torch.float16)
    case.t *= of_t
    case.lora_b *= of_b
    right, good = triton_linear(case), case.t[1, 0].item()
    case.t[1, 0] = bad
    y, expected = triton_linear(case), torch.ops.lowbit_reference.linear(*case.arguments())
    assert not y[1].isfinite().any()
    assert torch.equal(y[1].nan_to_num(), expected[1].nan_to_num())
    case.t[1, 0], y[1] = good, right[1]
    case.check_decoded(y)


@interpreted
@pytest.mark.parametrize("shape", [(0, 8, 64), (3, 0, 64), (3, 4, 0)])
def test_empty(shape):
    """A batch without tokens would fail, or k = 0 would lose LoRA and bias."""
    m, n, k = shape
    empty = torch.empty(0)
    weight = (torch.empty(n * k // 2, dtype=torch.uint8), torch.zeros(n * k // 64), None, None, "nf4:64")
    x, bias, t, lora_b = empty.new_zeros(m, k), normal(n), normal(m, 2), normal(n, 2)
    y = torch.ops.lowbit_triton.linear.default(x, *weight, n, bias, t, lora_b, 0.5)
    torch.testing.assert_close(y, bias + 0.5 * t @ lora_b.T if n and m else x.new_empty(m, n))


@interpreted
def test_any_layout_of_x():
    """A transposed or sliced activation, in three dimensions, gives what its copy gives."""
    case = Case(6, 40, 128, rank=4)
    x = case.x.reshape(2, 3, 128)
    wanted = torch.ops.lowbit_triton.linear.default(x, *case.arguments()[1:])
    wide = torch.empty(2, 3, 256, dtype=x.dtype)[:, :, ::2].copy_(x)
    swapped = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for view in (wide, swapped):
        assert not view.is_contiguous()
        assert torch.equal(torch.ops.lowbit_triton.linear.default(view, *case.arguments()[1:]), wanted)
    assert wanted.shape == (2, 3, 40)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lora_linear(dtype):
    """lora_linear would return another y or t than the two calls that it stands for."""
    case, lora_a = Case(3, 33, 128, dtype, rank=8), normal(8, 128, seed=5)
    y, t = torch.ops.lowbit_triton.lora_linear.default(*case.arguments()[:8], lora_a, case.lora_b, case.scaling)
    torch.testing.assert_close(t, case.x.float() @ lora_a.T)  # on a CPU
    case.t = t
    assert torch.equal(y, triton_linear(case))


@interpreted
def test_lora_of_rank_zero():
    """A rank of zero, which LoRA's layers pass when they are off, would fail."""
    case = Case(3, 8, 64, rank=0)
    plain = triton_linear(case)
    case.t, case.lora_b = normal(3, 0), normal(8, 0)
    assert torch.equal(triton_linear(case), plain)


def check_infinite_lora(run):
    """``run``: linear, of a case whose factors are infinite, together or beside ones that bf16 holds or does not."""
    case = Case(2, 8, 64, rank=1, has_bias=False)
    case.t[0], case.lora_b[:] = float("inf"), 1.0
    case.lora_b[:2] = torch.tensor([[float("inf")], [-0.3]])
    expected = torch.tensor([1.0, -1.0, *[1.0] * 6]) * float("inf")
    assert torch.equal(run(case)[0], expected.bfloat16())


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinite_lora_stays_infinite():
    """Split into two bf16, an infinity must not become NaN, nor a finite output."""
    check_infinite_lora(triton_linear)


def emulated(monkeypatch, case, configs, target="sm_80"):
    """(y, launches, what the emulator counted of each) of a call for which ``configs(problem, gpu)`` chooses."""
    monkeypatch.setattr(shapes, "configs", configs)
    from lowbit.backends.triton import linear

    with launches(target) as made:
        y = linear.linear(*case.arguments())
    y.fill_(float("nan"))
    return y, made, [emulate(launch, target=target, detect_global_waw=True) for launch in made]


@compiled_only
@pytest.mark.parametrize("kind", every_kind("linear", masked_beyond=64), ids=str)
def test_every_tile_on_the_emulator(monkeypatch, kind):
    """What NVIDIA GPUs run: the assembly, the copies into shared memory, the layouts of tensor cores' operands. A tile
    that is wrong is a wrong answer for just those layers and batches that get it.
    """
    config = kind.config
    # Tiles that lack a row, the second one most of its columns. In one part more steps than the pipeline has stages.
    steps = 3 if config.splits > 1 else config.stages + 1
    step = config.products * config.tile_k
    case = Case(
        *(max(config.tile_m - 1, 1), config.tile_n + 5, kind.columns(steps * step, step)),
        *(kind.dtype, kind.format, kind.block_size, kind.dtype != torch.float16),
        rank=17,
    )
    y, made, _ = emulated(monkeypatch, case, lambda problem, gpu: [config])
    assert len(made) == config.splits  # another launch adds the parts
    case.check(y)


#: (rows and parts of k of an H100's tile, a case that it has to get right, ragged).
WGMMA = {
    "64 rows": (64, 1, Case(65, 65, 192, rank=17)),
    "64 rows, parts of k": (64, 2, Case(37, 70, 320, torch.float16, double_quant=False)),
    "64 rows, blocks of 32": (64, 1, Case(70, 33, 96, block_size=32, rank=0)),
    "64 rows, int8, odd rows": (64, 1, Case(65, 33, 77, torch.float16, "int8")),
    "128 rows": (128, 1, Case(130, 33, 192, rank=1)),
    "128 rows, parts of k": (128, 2, Case(100, 130, 320, torch.float16, has_bias=False)),
    "128 rows, blocks of 128": (128, 1, Case(99, 70, 256, format="fp4", block_size=128)),
    "128 rows, int8": (128, 1, Case(130, 33, 128, format="int8")),
}


@compiled_only
@pytest.mark.parametrize("name", WGMMA)
def test_wgmma_on_the_emulator(monkeypatch, name):
    """What an H100 runs for many rows: other instructions and layouts, W decoded to shared memory. A wrong swizzle
    there is another weight.
    """
    rows, splits, case = WGMMA[name]
    configs = tile_of_a_layer(tile_m=rows, splits=splits)
    y, made, (result, *_) = emulated(monkeypatch, case, configs, "sm_90")
    assert len(made) == (2 if splits > 1 else 1) and made[0].values["TILE_M"] == rows
    assert result.count("wgmma.mma_async") and not result.count("mma.sync")
    case.check(y)


@compiled_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("of_x", "of_weight"), [(1e-39, 1.0), (1.0, 1e-39)], ids=["x", "weight"])
def test_subnormal_numbers_on_the_emulator(monkeypatch, of_x, of_weight, dtype):
    """bf16 has numbers below 1.2e-38, which the interpreter widens to others. On a GPU a model's smallest weights and
    activations may be neither those nor 0.
    """
    case = Case(5, 70, 256, dtype, double_quant=False, rank=0, has_bias=False)
    case.x = (case.x.double() * of_x).to(dtype)
    weight = (normal(70, 256, seed=1).double() * of_weight).to(torch.bfloat16)
    with launches("sm_80") as made:
        packed, absmax = function("quantize")(weight, "nf4:64")
        decoded = function("dequantize")(packed, absmax, None, None, "nf4:64", (70, 256), dtype)
    for launch in made:
        emulate(launch)
    case.parts = parts_of(weight, double_quant=False)
    assert torch.equal(packed, case.parts[0]) and torch.equal(absmax, case.parts[1])
    assert torch.equal(decoded, reference.dequantize(*case.parts, [70, 256], dtype))
    y, *_ = emulated(monkeypatch, case, shapes.configs)
    case.check(y)
    with pytest.raises(pytest.fail.Exception):
        case.check(torch.zeros_like(y))


@compiled_only
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_infinite_lora_on_the_emulator(monkeypatch, target):
    """The compiler may not take a difference of infinities for 0."""
    configs = tile_of_a_layer(tile_m=64, splits=1)
    check_infinite_lora(lambda case: emulated(monkeypatch, case, configs, target)[0])


@pytest.mark.parametrize("gpu", [A100, H100, Gpu(89, 128), Gpu(100, 148), MI300, Gpu(0, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", [*FORMATS, "int8"])
def test_configurations_fit(gpu, dtype, format):
    """A configuration that needs more shared memory than there is fails at the launch; one of no steps hangs nothing
    but computes nothing either.
    """
    for block_size in BLOCK_SIZES if format != "int8" else (0,):
        for m in (1, 2, 8, 16, 32, 64, 256, 1024):
            problem = Problem("linear", m, 4096, 4096, dtype, WeightSpec(format, block_size))
            found = shapes.configs(problem, gpu)
            assert 1 <= len(found) <= 8 and len(set(found)) == len(found)
            for config in found:
                assert shapes.shared_bytes(config, problem) <= gpu.shared_bytes
                assert 4096 % config.tile_k == 0 and (not block_size or block_size % config.tile_k == 0)
                assert config.splits == 1 or 4096 // config.tile_k >= 4 * config.splits


def test_small_grids_are_split():
    """One tile of a 4096 x 4096 layer per multiprocessor would leave half of an A100 idle."""
    for gpu in (A100, H100):
        config = shapes.configs(Problem("linear", 1, 1024, 8192, torch.bfloat16, WeightSpec()), gpu)[0]
        assert 16 * config.splits >= gpu.processors
    large = Problem("linear", 512, 28672, 8192, torch.bfloat16, WeightSpec())
    assert shapes.configs(large, H100)[0].splits == 1


def test_few_graphs_for_many_batch_sizes():
    """torch.compile makes a graph for each value of rows_of that it meets, and after 8 of them none, or an error."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = [rows_of(m, dtype) for m in range(20000)]
        assert found == sorted(found) and len(set(found)) < 8
        assert all(m <= rows for m, rows in enumerate(found) if rows < found[-1])


@pytest.mark.parametrize(
    ("problem", "gpu", "expected"),
    [
        ((256, 64, 64, torch.bfloat16, "nf4"), A100, False),
        ((512, 64, 64, torch.bfloat16, "nf4"), A100, True),
        ((512, 64, 64, torch.bfloat16, "nf4"), H100, False),
        ((1024, 64, 64, torch.bfloat16, "nf4"), H100, True),
        ((1, 64, 96, torch.bfloat16, "nf4"), A100, True),
        ((1, 64, 96, torch.bfloat16, "int8"), A100, False),
        ((1, 64, 0, torch.bfloat16, "nf4"), A100, True),
        ((16, 64, 64, torch.float32, "nf4"), A100, False),
        ((32, 64, 64, torch.float32, "nf4"), A100, True),
        ((1, 64, 64, torch.bfloat16, "nf4"), Gpu(75, 40), True),  # no bf16
        ((1, 64, 64, torch.bfloat16, "nf4"), MI300, False),
    ],
)
def test_what_decodes_first(problem, gpu, expected):
    """The kernel assumes what it is called for; a wrong choice is wrong numbers or a compiler's error."""
    *sizes, format = problem
    assert shapes.decodes_first(Problem("linear", *sizes, WeightSpec(format)), gpu) == expected
