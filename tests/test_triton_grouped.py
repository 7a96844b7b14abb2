"""The grouped products in Triton, interpreted and as PTX on the emulator, against fp64 arithmetic by expert."""

import pytest
import torch
from cases import (
    DTYPES,
    assert_within,
    dtypes,
    gemm_tolerance,
    make_weight,
    product_tolerance,
    scaled_codebook_tolerance,
)
from conftest_triton import compiled_only, emulate, every_kind, interpreted, launches, tile_of_a_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_calls import COUNTS, RANKS, ends_of, expert_product, parts_of, varied_parts

from lowbit import reference
from lowbit.backends.triton import grouped, shapes

#: (experts, out_features, in_features): one, ragged tiles, groups of 256 scales that cross experts, blocks that do.
STACKS = ((1, 1, 32), (3, 33, 64), (4, 70, 160), (7, 16, 256), (3, 5, 7), (3, 17, 130), (2, 0, 64), (2, 4, 0))


def interpret(name, *arguments):
    return getattr(torch.ops.lowbit_triton, name).default(*arguments)


def emulated(target, name, *arguments):
    """(out, launches, what the emulator counted of each), assembly included."""
    with launches(target) as made:
        out = getattr(grouped, name)(*arguments)
    return out, made, [emulate(launch, target=target) for launch in made]


def run_ptx(name, *arguments):
    """The result of the sm_80 PTX."""
    return emulated("sm_80", name, *arguments)[0]


class Case:
    """A stack of experts and tokens for them: the ops' operands, and what they should be."""

    def __init__(self, counts, stack, rank, dtype, format="nf4", block_size=64, double_quant=True):
        self.experts, self.n, self.k = stack
        self.ends = ends_of(counts, self.experts)
        tokens, self.rank, self.dtype = int(self.ends[-1]), rank, dtype
        self.parts = varied_parts((self.experts * self.n, self.k), format, block_size, double_quant)
        self.weight = reference.dequantize(*self.parts, [*stack], torch.float32).double()
        self.format, self.whole = format, format == "int8" or self.k % block_size == 0
        generator = torch.Generator().manual_seed(tokens + self.n)

        def random(*size):
            return torch.randn(size, generator=generator)

        self.x, self.grad = random(tokens, self.k).to(dtype), random(tokens, self.n).to(dtype)
        self.bias, self.t = random(self.experts, self.n), random(tokens, rank)
        self.lora_a, self.lora_b = random(self.experts, rank, self.k), random(self.experts, self.n, rank)

    def product(self, operand, weight, low, up, scaling=1.0, transposed=False):
        """(exact, magnitude, LoRA's magnitude) of a product and its LoRA."""
        operand, low, up = operand.double(), low.double(), up.double()
        exact = expert_product(operand, weight, self.ends, transposed)
        magnitude = expert_product(operand.abs(), weight.abs(), self.ends, transposed)
        if not self.rank:
            return exact, magnitude, torch.zeros_like(magnitude)
        lora = scaling * expert_product(low.abs(), up.abs(), self.ends, transposed)
        return exact + scaling * expert_product(low, up, self.ends, transposed), magnitude + lora, lora

    def check_linear(self, run):
        lora = (self.t, self.lora_b) if self.rank else (None, None)
        y = run("grouped_linear", self.x, *self.parts, self.ends, self.n, self.bias, *lora, 0.7)
        exact, magnitude, lora = self.product(self.x, self.weight, self.t, self.lora_b, 0.7)
        bias = torch.cat(
            [self.bias[e].expand(at.stop - at.start, -1) for e, at in enumerate(reference.expert_rows(self.ends))]
        ).double()
        exact, magnitude, terms = exact + bias, magnitude + bias.abs(), self.k + 3 * self.rank + 1
        if self.whole and self.dtype != torch.float32 and self.format != "int8":
            tolerance = gemm_tolerance(magnitude, lora, exact, terms, self.format, self.dtype)
        elif self.whole and self.dtype != torch.float32:  # codes are exact in 16 bits
            tolerance = product_tolerance(magnitude, exact, 2 * terms, self.dtype) + 4 * 2.0**-16 * lora
        else:
            tolerance = product_tolerance(magnitude, exact, terms, self.dtype)
        assert y.dtype == self.dtype
        assert_within(y, exact, tolerance)

    def check_grad_input(self, run):
        lora = (self.t, self.lora_a) if self.rank else (None, None)
        out = run("grouped_linear_grad_input", self.grad, *self.parts, self.ends, self.k, *lora)
        exact, magnitude, lora = self.product(self.grad, self.weight, self.t, self.lora_a, transposed=True)
        terms = self.n + 3 * self.rank
        tolerance = product_tolerance(magnitude, exact, terms, self.dtype)
        if self.whole:
            total = self.grad.double().abs().sum(1, keepdim=True)
            tolerance = scaled_codebook_tolerance(magnitude, exact, terms, self.format, self.dtype, total, lora)
        assert out.dtype == self.dtype
        assert_within(out, exact, tolerance)


@interpreted
@settings(max_examples=10, deadline=None)
@given(
    counts=st.sampled_from(COUNTS),
    stack=st.sampled_from(STACKS),
    rank=st.sampled_from(RANKS),
    dtype=dtypes,
    format=st.sampled_from(("nf4", "nf4", "fp4", "int8")),
    block_size=st.sampled_from((32, 64, 128, 4096)),
    double_quant=st.booleans(),
)
def test_products_with_a_stack(counts, stack, rank, dtype, format, block_size, double_quant):
    """A token that meets another expert's weight, scale, bias or LoRA is a wrong answer that looks like a right one."""
    case = Case(counts, stack, rank, dtype, format, block_size, double_quant)
    case.check_linear(interpret)
    case.check_grad_input(interpret)


@interpreted
@pytest.mark.parametrize("counts", [(20, 0, 70), (40, 33, 20)])
def test_larger_tiles(counts):
    """The tiles of training batches, ragged at each expert's end: a tile must stop where its expert's tokens do."""
    case = Case(counts, (3, 72, 192), 8, torch.bfloat16)
    case.check_linear(interpret)
    case.check_grad_input(interpret)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_product_in_16_bits(dtype):
    """What LoRA adds is rounded to the layer's dtype, to nearest: cut off, it would drift in one direction."""
    generator, ends = torch.Generator().manual_seed(0), torch.tensor([5, 5, 20], dtype=torch.int32)
    t, matrices = torch.randn(20, 8, generator=generator), torch.randn(3, 40, 8, generator=generator)
    y = interpret("grouped_matmul", t, matrices, ends, dtype)
    exact = expert_product(t.double(), matrices.double(), ends)
    magnitude = expert_product(t.double().abs(), matrices.double().abs(), ends)
    assert y.dtype == dtype
    assert_within(y, exact, product_tolerance(magnitude, exact, 8, dtype))


@compiled_only
@pytest.mark.parametrize("ends", [(3, 9, 99), (5, 2, 7), (-4, 3, 7), (0, 0, 0)])
def test_wrong_ends_stay_inside(monkeypatch, ends):
    """On a GPU nobody reads the ends before the kernels do: wrong ones must not become accesses of other memory."""
    ends = torch.tensor(ends, dtype=torch.int32)
    weight = (*parts_of(make_weight((3, 64, 128))), ends)
    x, grad = torch.randn(7, 128).bfloat16(), torch.randn(7, 64).bfloat16()
    with launches("sm_80") as made:
        grouped.grouped_linear(x, *weight, 64, None, None, None, 1.0)
        grouped.grouped_linear_grad_input(grad, *weight, 128)
        grouped.grouped_matmul(x, torch.randn(3, 4, 128), ends)
        grouped.grouped_outer(grad, x, ends)
    for launch in made:
        emulate(launch)  # an access out of bounds is an error


@interpreted
@pytest.mark.parametrize("block_size", [32, 128, 1024])
def test_block_sizes(block_size):
    """Tiles of part of a block, one, and several: each weight has to get its own block's scale."""
    case = Case((3, 0, 2), (3, 20, 1024), 0, torch.float16, block_size=block_size)
    case.check_linear(interpret)
    case.check_grad_input(interpret)


def check_dense(run, a, matrices, ends, out_dtypes_agree):
    """grouped_matmul of a [T, K] with matrices [E, P, K], and grouped_outer of its result's shape with a."""
    y = run("grouped_matmul", a, matrices, ends)
    exact = expert_product(a.double(), matrices.double(), ends)
    magnitude = expert_product(a.double().abs(), matrices.double().abs(), ends)
    # Tensor cores cut sums off: twice the terms.
    terms = a.shape[1] * (2 if out_dtypes_agree else 1)
    assert y.dtype == torch.float32
    assert_within(y, exact, product_tolerance(magnitude, exact, terms, torch.float32))


def check_outer(run, a, b, ends):
    out = run("grouped_outer", a, b, ends)
    at = reference.expert_rows(ends)
    exact = torch.stack([a[rows].double().T @ b[rows].double() for rows in at])
    magnitude = torch.stack([a[rows].double().abs().T @ b[rows].double().abs() for rows in at])
    assert out.dtype == torch.float32
    assert_within(out, exact, product_tolerance(magnitude, exact, 2 * a.shape[0], torch.float32))


@interpreted
@settings(max_examples=12, deadline=None)
@given(
    counts=st.sampled_from(COUNTS),
    experts=st.sampled_from((1, 3, 5)),
    features=st.sampled_from((0, 1, 40, 130, 600)),  # the last in parts
    rank=st.sampled_from((1, 8, 17, 64)),
    dtype=dtypes,
    lora_dtype=dtypes,
    transposed=st.booleans(),
)
def test_dense_products(counts, experts, features, rank, dtype, lora_dtype, transposed):
    """LoRA's own products: wrong ones are gradients of other parameters. Matrices come transposed from the backward."""
    ends = ends_of(counts, experts)
    generator = torch.Generator().manual_seed(features + rank)
    x = torch.randn(int(ends[-1]), features, generator=generator).to(dtype)
    t = torch.randn(x.shape[0], rank, generator=generator).to(lora_dtype)
    matrices = torch.randn(experts, features, rank, generator=generator).to(lora_dtype).transpose(1, 2)
    check_dense(interpret, x, matrices if transposed else matrices.contiguous(), ends, dtype == lora_dtype)
    check_outer(interpret, x, t, ends)
    check_outer(interpret, t, x, ends)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_through_autograd(dtype):
    """The ops are called with what autograd makes: expanded ones for the bias, transposed matrices, fp32 beside x."""
    case = Case((5, 0, 3), (3, 33, 64), 8, dtype)
    leaves = [leaf.requires_grad_() for leaf in (case.x, case.bias, case.lora_a, case.lora_b)]
    results = []
    for namespace in ("lowbit_triton", "lowbit_reference"):
        ops = getattr(torch.ops, namespace)
        x, bias, lora_a, lora_b = leaves
        t = ops.grouped_matmul.default(x, lora_a, case.ends)
        y = ops.grouped_linear.default(x, *case.parts, case.ends, case.n, bias, t, lora_b, 0.7)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        scale = expected.float().norm()
        # A look at the wiring: each product is within its own bound in the other tests.
        assert (actual.float() - expected.float()).norm() <= 0.02 * scale


@compiled_only
@pytest.mark.parametrize(
    ("counts", "stack", "rank", "dtype", "format", "block_size", "double_quant"),
    [
        ((3, 0, 17), (3, 40, 128), 8, torch.bfloat16, "nf4", 64, True),
        ((0, 0, 37), (3, 70, 96), 17, torch.float16, "fp4", 32, False),
        ((70,), (1, 40, 128), 1, torch.bfloat16, "nf4", 128, True),
        ((2, 1), (2, 17, 40), 0, torch.bfloat16, "int8", 32, True),
    ],
)
def test_ptx(counts, stack, rank, dtype, format, block_size, double_quant):
    """The assembly and the layouts of the compiled kernels, and one launch for all: the interpreter has neither."""
    case = Case(counts, stack, rank, dtype, format, block_size, double_quant)
    case.check_linear(run_ptx)
    case.check_grad_input(run_ptx)


def case_of(kind, tile_rows, out_features, in_features):
    """The case of one row more than a tile for one expert, and none for another."""
    sizes = (tile_rows + 1, 0, 5), (3, out_features, in_features), 17
    return Case(*sizes, kind.dtype, kind.format, kind.block_size, kind.dtype != torch.float16)


@compiled_only
@pytest.mark.parametrize(
    "kind",
    every_kind("linear", masked_beyond=64, experts=8),
    ids=str,
)
def test_every_tile_of_a_stack_in_ptx(monkeypatch, kind):
    """A tile that is wrong for a stack is a wrong answer for just those numbers of tokens that get it."""
    config = kind.config
    monkeypatch.setattr(shapes, "configs", lambda problem, gpu: [config])
    step = config.products * config.tile_k
    case_of(kind, config.tile_m, 37, kind.columns(3 * step, step)).check_linear(run_ptx)


@compiled_only
@pytest.mark.parametrize(
    "kind",
    every_kind("linear_grad_input", masked_beyond=1, experts=8),
    ids=str,
)
def test_every_tile_of_a_stack_backward_in_ptx(monkeypatch, kind):
    """A tile that is wrong for a stack is a wrong gradient for just those numbers of tokens that get it."""
    config = kind.config
    monkeypatch.setattr(shapes, "configs", lambda problem, gpu: [config])
    case_of(kind, config.tile_m, 2 * config.tile_n + 5, kind.columns(72, 8)).check_grad_input(run_ptx)


@compiled_only
@pytest.mark.parametrize(
    ("rows", "splits", "counts", "stack", "rank", "dtype", "format", "block_size", "double_quant"),
    [
        ((16, 32), 2, (3, 0, 17), (3, 40, 576), 8, torch.bfloat16, "nf4", 64, True),
        ((64, 64), 1, (37, 0, 70), (3, 72, 192), 17, torch.bfloat16, "nf4", 64, True),
        ((64, 128), 1, (130, 0, 80), (3, 40, 160), 8, torch.float16, "nf4", 32, False),
        ((128, 64), 1, (100, 130), (2, 33, 128), 1, torch.bfloat16, "fp4", 128, False),
        ((64, 128), 1, (70, 66), (2, 40, 72), 8, torch.bfloat16, "int8", 32, True),
    ],
)
def test_wgmma(monkeypatch, rows, splits, counts, stack, rank, dtype, format, block_size, double_quant):
    """What an H100 runs, forward and backward: other instructions and layouts than sm_80's, at each expert's edges."""
    case = Case(counts, stack, rank, dtype, format, block_size, double_quant)
    tile_m = dict(zip(("linear", "linear_grad_input"), rows, strict=True))
    monkeypatch.setattr(shapes, "configs", tile_of_a_layer(tile_m=tile_m, splits=splits))

    def run(name, *arguments):
        out, made, (result, *_) = emulated("sm_90", name, *arguments)
        assert len(made) == (2 if splits > 1 else 1)
        wgmma = name != "grouped_linear" or rows[0] >= 64
        assert bool(result.count("wgmma.mma_async")) == wgmma == (not result.count("mma.sync"))
        return out

    case.check_linear(run)
    case.check_grad_input(run)


@compiled_only
@pytest.mark.parametrize("columns", [40, 800])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_ptx_of_dense_products(lora_dtype, columns):
    """As above; bf16 beside fp32 goes to other instructions than bf16 alone, and many columns are summed in parts."""
    case = Case((3, 0, 6), (3, 33, columns), 8, torch.bfloat16, block_size=32)
    _, made, _ = emulated("sm_80", "grouped_matmul", case.x, case.lora_a.to(lora_dtype), case.ends)
    assert len(made) == (2 if columns > 400 else 1)
    check_dense(run_ptx, case.x, case.lora_a.to(lora_dtype), case.ends, lora_dtype == torch.bfloat16)
    check_outer(run_ptx, case.grad, case.t.to(lora_dtype), case.ends)


@compiled_only
@pytest.mark.parametrize("name", ["grouped_linear", "grouped_linear_grad_input"])
def test_experts_without_tokens_are_not_decoded(name):
    """Their weights must not be read at all: most experts have no tokens when a model generates text."""
    case = Case((3, 2, 0, 0), (4, 16, 64), 0, torch.bfloat16, double_quant=False)
    size = 2 * case.n * case.k
    operand, features = (case.x, case.n) if name == "grouped_linear" else (case.grad, case.k)
    expected = getattr(reference, name)(operand, *case.parts, case.ends, features, *_no_lora(name))
    with launches("sm_80") as made:
        out = getattr(grouped, name)(operand, *case.parts, case.ends, features, *_no_lora(name))
    for launch in made:
        # What the last two experts would read is not there: the emulator ends an access out of bounds.
        launch.values.update(packed=case.parts[0][: size // 2].clone(), absmax=case.parts[1][: size // 64].clone())
        emulate(launch)
    assert (out.float() - expected.float()).norm() <= 0.01 * expected.float().norm()


def _no_lora(name):
    return (None, None, None, 1.0) if name == "grouped_linear" else ()
