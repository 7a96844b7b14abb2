"""linear_grad_input in Triton, interpreted and as PTX on the emulator, against fp64 arithmetic.

``varied_parts`` gives blocks of different magnitudes: one's scale for another's is far outside of every tolerance.
"""

import dataclasses

import pytest
import torch
from cases import (
    DTYPES,
    FORMATS,
    UNIT_ROUNDOFF,
    assert_within,
    block_sizes,
    dtypes,
    product_tolerance,
    scaled_codebook_tolerance,
    tensor_core_tolerance,
)
from conftest_triton import A100, compiled_only, emulate, every_kind, interpreted, launches, tile_of_a_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_calls import RANKS, grad_operands, varied_parts

from lowbit import reference
from lowbit.backends.triton import linear_grad_input, shapes
from lowbit.backends.triton.shapes import Gpu, Problem, rows_of
from lowbit.format import WeightSpec

HALF = (torch.float16, torch.bfloat16)


def flat(tensor):
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor


def assert_right(out, grad, parts, grad_t=None, lora_a=None):
    """Assert that an output is within the bound of the arithmetic that format and shape imply."""
    rows, n, k, spec = flat(grad), grad.shape[-1], out.shape[-1], WeightSpec.parse(parts[4])
    weight = reference.dequantize(*parts, [n, k], torch.float32).double()
    problem = Problem("linear_grad_input", rows_of(len(rows), grad.dtype), n, k, grad.dtype, spec)
    exact, magnitude, lora = rows.double() @ weight, rows.double().abs() @ weight.abs(), 0.0
    terms, total = rows.shape[1], rows.double().abs().sum(1, keepdim=True)
    if lora_a is not None:
        exact = exact + flat(grad_t).double() @ lora_a.double()
        lora = flat(grad_t).double().abs() @ lora_a.double().abs()
        magnitude, terms = magnitude + lora, terms + 3 * lora_a.shape[0]
    if grad.dtype == torch.float32:
        tolerance = product_tolerance(magnitude, exact, terms, grad.dtype)
    elif shapes.decodes_first(problem, A100):  # W is rounded to 16 bits, LoRA's factors and product too
        tolerance = tensor_core_tolerance(magnitude, exact, terms, grad.dtype, total)
        tolerance += 3.03 * UNIT_ROUNDOFF[grad.dtype] * lora
    else:
        tolerance = scaled_codebook_tolerance(magnitude, exact, terms, spec.format, grad.dtype, total, lora)
    assert out.dtype == grad.dtype
    assert_within(out.reshape(exact.shape), exact, tolerance)


def interpret(grad, parts, k, grad_t=None, lora_a=None):
    return torch.ops.lowbit_triton.linear_grad_input.default(grad, *parts, k, grad_t, lora_a)


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    m=st.sampled_from((0, 1, 3, 17, 33)),
    n=st.sampled_from((0, 1, 5, 130, 300)),
    k=st.sampled_from((0, 1, 31, 32, 64, 96, 130, 192, 320)),
    rank=st.sampled_from(RANKS),
    dtype=dtypes,
    format=st.sampled_from(("nf4", "fp4", "int8")),
    block_size=st.one_of(st.sampled_from((32, 64)), block_sizes),
    double_quant=st.booleans(),
    magnitude=st.sampled_from((1e-6, 0.02, 30.0)),
    gpu=st.sampled_from((Gpu(80, 1), Gpu(90, 40), Gpu(0, 40))),
)
def test_any_product(m, n, k, rank, dtype, format, block_size, double_quant, magnitude, gpu):
    """A wrong column, scale, mask or split would train a layer on another layer's gradient."""
    if dtype == torch.float16:  # where blocks of the largest magnitude would take the product past 65504
        magnitude = min(magnitude, 3.0)
    parts = varied_parts((n, k), format, block_size, double_quant, magnitude)
    grad, grad_t, lora_a = grad_operands(m, n, k, rank, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_grad_input, "gpu_of", lambda device: gpu)
        out = interpret(grad, parts, k, grad_t, lora_a)
    assert out.shape == (m, k)
    assert_right(out, grad, parts, grad_t, lora_a)


@interpreted
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512])
def test_blocks_and_tiles(block_size, double_quant):
    """A tile of 256 columns spans eight blocks or a part of one: every column has to get its own block's scale."""
    parts = varied_parts((70, 512), "nf4", block_size, double_quant)
    grad, *_ = grad_operands(2, 70, 512, 0, torch.bfloat16)
    assert_right(interpret(grad, parts, 512), grad, parts)


@interpreted
@pytest.mark.parametrize(("m", "capability"), [(130, 0), (4, 80), (70, 80), (130, 90)])
def test_tiles_of_each_gpu(monkeypatch, m, capability):
    """Each GPU's own tiles, several of them: rows in the wrong band would be left unwritten."""
    monkeypatch.setattr(linear_grad_input, "gpu_of", lambda device: Gpu(capability, 4))
    parts = varied_parts((70, 320), "nf4", 64, True)
    grad, grad_t, lora_a = grad_operands(m, 70, 320, 8, torch.bfloat16)
    assert_right(interpret(grad, parts, 320, grad_t, lora_a), grad, parts, grad_t, lora_a)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(600, 8, 64), (3, 7, 65), (70, 33, 513)])
@pytest.mark.parametrize("rank", [0, 8])
def test_decodes_what_the_kernel_does_not_take(m, n, k, rank, dtype):
    """Many rows, or blocks that cross rows, would not be decoded first, or be wrong then."""
    parts = varied_parts((n, k), "nf4", 64, True)
    grad, grad_t, lora_a = grad_operands(m, n, k, rank, dtype)
    assert_right(interpret(grad, parts, k, grad_t, lora_a), grad, parts, grad_t, lora_a)


@interpreted
@pytest.mark.parametrize(("m", "n", "k"), [(600, 8, 64), (3, 7, 65)])
@pytest.mark.parametrize("size", [1.0, 1e5, 1e7])
def test_decoded_fp16_holds_a_large_grad_t(m, n, k, size):
    """grad_t holds scaling times the loss scale: with it rounded to inf, every step would be skipped."""
    parts = varied_parts((n, k), "nf4", 64, True)
    grad, grad_t, lora_a = grad_operands(m, n, k, 8, torch.float16)
    grad_t[:, ::2] *= size
    lora_a[::2] *= 30 / size
    assert_right(interpret(grad, parts, k, grad_t, lora_a), grad, parts, grad_t, lora_a)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("m", "n", "k"), [(600, 8, 64), (3, 7, 65)])
@pytest.mark.parametrize(
    ("bad", "of_t", "of_a"),
    [(float("inf"), 1.0, 10.0), (float("nan"), 1.0, 10.0), (float("nan"), 1e5, 1e-3), (1e30, 1.0, 0.5)],
)
def test_decoded_fp16_rows_are_apart(m, n, k, bad, of_t, of_a):
    """A gradient that overflowed has to be seen where it did, and nowhere else."""
    parts = varied_parts((n, k), "nf4", 64, True)
    grad, grad_t, lora_a = grad_operands(m, n, k, 8, torch.float16)
    grad_t, lora_a = grad_t * of_t, lora_a * of_a
    wrong = grad_t.clone()
    wrong[1, 0] = bad
    out = interpret(grad, parts, k, wrong, lora_a)
    expected = reference.linear_grad_input(grad, *parts, k, wrong, lora_a)
    assert not out[1].isfinite().any()
    assert torch.equal(out[1].nan_to_num(), expected[1].nan_to_num())
    out[1] = interpret(grad, parts, k, grad_t, lora_a)[1]
    assert_right(out, grad, parts, grad_t, lora_a)


@interpreted
@pytest.mark.parametrize("lora_dtype", DTYPES)
def test_strides_and_leading_dimensions(lora_dtype):
    """Gradients come as views of anything; operands read as if they were contiguous would be other numbers."""
    parts = varied_parts((40, 64), "nf4", 64, True)
    grad, grad_t, lora_a = grad_operands(15, 40, 64, 8, torch.bfloat16)
    expanded = torch.stack([grad, grad], 1)[:, 0].view(3, 5, 40)
    grad_t = grad_t.to(lora_dtype).T.contiguous().T.reshape(3, 5, 8)
    lora_a = lora_a.to(lora_dtype).T.contiguous().T
    out = interpret(expanded, parts, 64, grad_t, lora_a)
    assert out.shape == (3, 5, 64)
    assert_right(out, expanded, parts, grad_t, lora_a)
    transposed = grad.T.contiguous().T
    assert torch.equal(interpret(transposed, parts, 64), interpret(grad, parts, 64))
    repeated = grad[:1].expand(4, 40)
    assert torch.equal(interpret(repeated, parts, 64), interpret(grad[:1], parts, 64).expand(4, 64))
    assert interpret(grad[0], parts, 64).shape == (64,)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_does_not_depend_on_the_run(monkeypatch, dtype):
    """Partial sums are added in one order: two runs of one training step have to agree in every bit."""
    configs = shapes.configs
    in_parts = lambda problem, gpu: [dataclasses.replace(configs(problem, gpu)[0], splits=4)]  # noqa: E731
    monkeypatch.setattr(shapes, "configs", in_parts)
    parts = varied_parts((600, 128), "nf4", 64, True)
    grad, grad_t, lora_a = grad_operands(4, 600, 128, 8, dtype)
    first = interpret(grad, parts, 128, grad_t, lora_a)
    assert torch.equal(interpret(grad, parts, 128, grad_t, lora_a), first)
    assert_right(first, grad, parts, grad_t, lora_a)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_spread_as_in_the_reference(dtype, bad):
    """Training that went wrong has to be seen, in just the elements where the reference shows it."""
    assert_spreads(interpret, dtype, bad)


def assert_spreads(run, dtype, bad):
    k = 256
    parts = varied_parts((130, k), "nf4", 64, False)
    grad = grad_operands(5, 130, k, 0, dtype)[0]
    grad[1, 100] = bad
    parts[1][4 * 129 + 1] = bad  # absmax of columns 64 to 127 of the last row
    out, expected = run(grad, parts, k), reference.linear_grad_input(grad, *parts, k)
    finite = expected.isfinite()
    assert not finite.all() and finite.any()
    assert torch.equal(out.isfinite(), finite)
    assert torch.equal(out[~finite].nan_to_num(), expected[~finite].nan_to_num())


def assert_lora_spreads(run):
    """Infinite factors, also together, next to ones that are a bf16 (and next to a 0, which makes NaN)."""
    parts = varied_parts((8, 64), "nf4", 64, True)
    grad, grad_t, lora_a = grad_operands(6, 8, 64, 1, torch.bfloat16)
    grad_t[:, 0] = torch.tensor([float("inf"), -float("inf"), 1.0, 0.0, 0.3, float("nan")])
    lora_a[0, :4] = torch.tensor([1.0, -float("inf"), 0.0, -0.7])
    out, expected = run(grad, parts, 64, grad_t, lora_a), reference.linear_grad_input(grad, *parts, 64, grad_t, lora_a)
    finite = expected.isfinite()
    assert torch.equal(out.isfinite(), finite)
    assert torch.equal(out[~finite].nan_to_num(), expected[~finite].nan_to_num())


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinite_lora_spreads_as_in_the_reference():
    """Split into two bf16, an infinity must not become NaN, nor a number."""
    assert_lora_spreads(interpret)


def emulated(target, grad, parts, k, grad_t, lora_a):
    """(out, launches, what the emulator counted of each), assembly included."""
    with launches(target) as made:
        out = linear_grad_input.linear_grad_input(grad, *parts, k, grad_t, lora_a)
    return out, made, [emulate(launch, target=target) for launch in made]


def run_ptx(grad, parts, k, grad_t=None, lora_a=None):
    """The result of the sm_80 PTX."""
    return emulated("sm_80", grad, parts, k, grad_t, lora_a)[0]


def run_wgmma(grad, parts, k, grad_t=None, lora_a=None):
    """The result of the sm_90 PTX, and its launch."""
    out, made, (result, *_) = emulated("sm_90", grad, parts, k, grad_t, lora_a)
    assert result.count("wgmma.mma_async") and not result.count("mma.sync")
    return out, made[0]


@compiled_only
@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "dtype", "format", "block_size", "double_quant", "magnitude"),
    [
        (3, 40, 128, 0, torch.bfloat16, "nf4", 64, True, 0.02),
        (5, 300, 320, 17, torch.bfloat16, "nf4", 32, True, 0.02),
        (17, 130, 192, 8, torch.float16, "fp4", 64, False, 1e-6),
        (70, 100, 256, 1, torch.bfloat16, "fp4", 128, False, 30.0),
        (2, 33, 64, 8, torch.float32, "nf4", 32, True, 0.02),
        (3, 33, 77, 0, torch.bfloat16, "int8", 32, True, 0.02),
    ],
)
def test_ptx(m, n, k, rank, dtype, format, block_size, double_quant, magnitude):
    """The assembly or layouts of the compiled kernel, which the interpreter does not run, would be wrong."""
    parts = varied_parts((n, k), format, block_size, double_quant, magnitude)
    grad, grad_t, lora_a = grad_operands(m, n, k, rank, dtype)
    assert_right(run_ptx(grad, parts, k, grad_t, lora_a), grad, parts, grad_t, lora_a)


@compiled_only
@pytest.mark.parametrize("kind", every_kind("linear_grad_input", masked_beyond=1), ids=str)
def test_every_tile_in_ptx(monkeypatch, kind):
    """A tile whose compiled layouts are wrong is a wrong gradient for just those layers and batches that get it."""
    config = kind.config
    monkeypatch.setattr(shapes, "configs", lambda problem, gpu: [config])
    # Tiles that lack a row, the second one most of its columns. In one part more steps than the pipeline has stages.
    m, n = config.tile_m - 1, config.tile_n * (2 if config.splits > 1 else config.stages) + 5
    k = kind.columns(config.tile_k + 16, 16)
    parts = varied_parts((n, k), kind.format, kind.block_size, kind.dtype != torch.float16)
    grad, grad_t, lora_a = grad_operands(m, n, k, 17, kind.dtype)
    out, made, _ = emulated("sm_80", grad, parts, k, grad_t, lora_a)
    assert len(made) == config.splits  # another launch adds the parts
    assert_right(out, grad, parts, grad_t, lora_a)


@compiled_only
@pytest.mark.parametrize(
    ("tile", "m", "n", "k", "rank", "dtype", "format", "block_size", "double_quant", "magnitude"),
    [
        ({"tile_m": 16}, 5, 100, 320, 17, torch.bfloat16, "nf4", 32, True, 0.02),
        ({"tile_m": 64, "splits": 2}, 33, 200, 320, 8, torch.float16, "nf4", 64, True, 1e-6),
        ({"tile_m": 64, "tile_k": 128, "splits": 4}, 130, 70, 128, 1, torch.bfloat16, "fp4", 128, False, 30.0),
        ({"tile_m": 128}, 130, 530, 320, 8, torch.bfloat16, "nf4", 64, True, 0.02),
        ({"tile_m": 128}, 65, 70, 192, 17, torch.float16, "fp4", 32, False, 0.02),
        ({"tile_m": 128}, 70, 33, 176, 8, torch.bfloat16, "int8", 32, True, 0.02),
        ({"tile_m": 64, "tile_k": 64, "splits": 4}, 70, 133, 177, 8, torch.bfloat16, "int8", 32, True, 0.02),
    ],
)
def test_wgmma(monkeypatch, tile, m, n, k, rank, dtype, format, block_size, double_quant, magnitude):
    """What an H100 runs: larger tiles, and other instructions and layouts than sm_80 has; wrong ones are other columns
    of the gradient.
    """
    columns = k if "tile_k" in tile else 4096  # W so narrow, or so odd, that the tile is small
    configs = tile_of_a_layer(columns, **{"splits": 1, **tile})
    monkeypatch.setattr(shapes, "configs", configs)
    parts = varied_parts((n, k), format, block_size, double_quant, magnitude)
    grad, grad_t, lora_a = grad_operands(m, n, k, rank, dtype)
    out, launch = run_wgmma(grad, parts, k, grad_t, lora_a)
    tile_k = tile.get("tile_k", 128 if format == "int8" else 256)
    assert (launch.values["TILE_M"], launch.values["TILE_K"]) == (tile["tile_m"], tile_k)
    assert launch.grid[1] == tile.get("splits", 1)
    assert_right(out, grad, parts, grad_t, lora_a)


#: Runs of a product as PTX for an A100 and an H100.
RUNS = {"sm_80": run_ptx, "sm_90": lambda *arguments: run_wgmma(*arguments)[0]}


@compiled_only
@pytest.mark.parametrize("target", RUNS)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_non_finite_values_in_ptx(bad, target):
    """Scales are split in two, and an infinite one has no second part: the difference of two would be a NaN."""
    assert_spreads(RUNS[target], torch.bfloat16, bad)


@compiled_only
@pytest.mark.parametrize("target", RUNS)
def test_infinite_lora_in_ptx(target):
    """The compiler may not take a difference of infinities for 0; and it clamps by other instructions for sm_90."""
    assert_lora_spreads(RUNS[target])


@given(
    m=st.integers(1, 1024),
    n=st.integers(0, 30000),
    k=st.integers(1, 12800),
    dtype=dtypes,
    format=st.sampled_from((*FORMATS, "int8")),
    experts=st.sampled_from((0, 0, 1, 8, 60)),
    gpu=st.builds(Gpu, st.sampled_from((0, 80, 89, 90, 100, 120)), st.integers(1, 200)),
)
def test_configurations_fit(m, n, k, dtype, format, experts, gpu):
    """A row of W in no split, or in two, is a wrong gradient; more shared memory than there is fails at the launch."""
    k = k if format == "int8" else 32 * k
    problem = Problem("linear_grad_input", m, n, k, dtype, WeightSpec(format, 32), experts)
    found = shapes.configs(problem, gpu)
    assert 1 <= len(found) <= 8 and len(set(found)) == len(found)
    for config in found:
        rows = shapes.split_rows(config, n)
        assert rows % config.tile_n == 0 and config.splits * rows >= n
        row_bytes = config.tile_k * problem.spec.record.bits // 8
        assert row_bytes % (16 * config.warps) == 0  # whole fragments for each warp
        assert shapes.shared_bytes(config, problem) <= gpu.shared_bytes


@pytest.mark.parametrize(
    ("problem", "gpu", "expected"),
    [
        ((256, 64, 64, torch.bfloat16, "nf4"), A100, False),
        ((512, 64, 64, torch.bfloat16, "nf4"), A100, True),
        ((256, 64, 64, torch.float16, "int8"), Gpu(0, 304, 64), False),
        ((512, 64, 64, torch.bfloat16, "nf4"), Gpu(90, 132), True),
        ((1, 64, 96, torch.bfloat16, "nf4"), Gpu(90, 132), True),
        ((1, 64, 96, torch.bfloat16, "int8"), Gpu(90, 132), False),
        ((1, 0, 64, torch.bfloat16, "nf4"), Gpu(90, 132), True),
        ((64, 64, 64, torch.float32, "nf4"), Gpu(90, 132), False),
        ((128, 64, 64, torch.float32, "nf4"), Gpu(90, 132), True),
    ],
)
def test_what_decodes_first(problem, gpu, expected):
    """The kernel assumes what it is called for; a wrong choice is wrong numbers or a slow step."""
    *sizes, format = problem
    assert shapes.decodes_first(Problem("linear_grad_input", *sizes, WeightSpec(format)), gpu) == expected


def test_small_grids_are_split():
    """Sixteen tiles of 4096 columns would leave most of a GPU idle."""
    for gpu in (A100, Gpu(90, 132), Gpu(0, 304, 64)):
        for experts in (0, 8):
            few_rows = Problem("linear_grad_input", 1, 14336, 4096, torch.bfloat16, WeightSpec(), experts)
            assert shapes.configs(few_rows, gpu)[0].splits > 1
        many_rows = Problem("linear_grad_input", 16384, 4096, 14336, torch.bfloat16, WeightSpec(), 8)
        assert shapes.configs(many_rows, gpu)[0].splits == 1
