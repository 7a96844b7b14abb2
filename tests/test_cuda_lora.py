"""LoRA's CUDA kernels, executed by the emulator: against fp64 arithmetic."""

import itertools

import pytest
import torch
from cases import assert_within, lora_tolerance
from conftest_cuda import DTYPE_CODES, bias_arguments, call, emulator, launchers, multiprocessors, unaligned, written

NOT_SUPPORTED = 801  # cudaErrorNotSupported
DTYPES = (torch.bfloat16, torch.float16)
FACTOR_DTYPES = (torch.float32, *DTYPES)
RANKS = (4, 8, 16, 24, 32, 64, 72)
#: Ranks that no access of 16 bytes fits.
ODD_RANKS = (1, 5, 33)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Factor:
    """A matrix in memory: its rows consecutive, or its columns; with elements around it that do not belong to it."""

    def __init__(self, values: torch.Tensor, is_transposed=False, padding=0, aligned=True):
        rows = values.T if is_transposed else values
        self.memory = torch.full((rows.shape[0], rows.shape[1] + padding), torch.nan, dtype=values.dtype)
        self.memory[:, : rows.shape[1]] = rows
        self.strides = self.memory.stride()[::-1] if is_transposed else self.memory.stride()
        self.memory = self.memory if aligned else unaligned(self.memory)

    def arguments(self) -> tuple:
        return self.memory, DTYPE_CODES[self.memory.dtype], *self.strides


class Product:
    """A call of lora_product; ``options``: of both factors in memory."""

    def __init__(self, m, n, k, rank, dtype, factor_dtypes=(torch.float32,) * 2, bias_dtype=torch.float32, **options):
        self.sizes, self.options = (m, n, k, rank), options
        self.x = normal(m, k, dtype=dtype)
        self.down, self.up = (
            normal(rank, k, dtype=factor_dtypes[0], seed=1),
            normal(n, rank, dtype=factor_dtypes[1], seed=2),
        )
        self.bias = None if bias_dtype is None else normal(n, dtype=bias_dtype, seed=3)
        self.t_scale, self.up_scale = 1.5, 0.7

    def run(self, t=None, has_y=True, aligned=True):
        """The t and the y that it writes; given t it reads that."""
        m, n, _, rank = self.sizes
        x = None if t is not None else self.x if aligned else unaligned(self.x)
        t = written(m * rank, torch.float32).view(m, rank) if t is None else t
        y = written(m * n, self.x.dtype, aligned) if has_y else None
        down, up = Factor(self.down, **self.options), Factor(self.up, **self.options)
        scaled = (*down.arguments(), self.t_scale, t, *up.arguments(), self.up_scale)
        call("lowbit_lora_product", x, DTYPE_CODES[self.x.dtype], *scaled, *bias_arguments(self.bias), y, *self.sizes)
        return t, None if y is None else y.view(m, n)

    def check(self, t, y):
        """t against x, and y against t, so that each shows its own error."""
        *_, k, rank = self.sizes
        x, down, up = self.x.double(), self.down.double(), self.up.double()
        exact, magnitude = self.t_scale * x @ down.T, abs(self.t_scale) * x.abs() @ down.abs().T
        parts = (self.x.dtype, self.down.dtype)
        assert_within(t, exact, lora_tolerance(magnitude, exact, k, parts, torch.float32))
        if y is None:
            return
        bias = 0.0 if self.bias is None else self.bias.double()
        magnitude = abs(self.up_scale) * t.double().abs() @ up.abs().T + abs(bias)
        exact = self.up_scale * t.double() @ up.T + bias
        assert_within(y, exact, lora_tolerance(magnitude, exact, rank, (torch.float32, self.up.dtype), y.dtype))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("factor_dtype", ["float32", "same"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product(dtype, factor_dtype, is_transposed, rank):
    """Forward and backward of every LoRA: a row, column or part left out would train another one."""
    factor_dtype = dtype if factor_dtype == "same" else torch.float32
    product = Product(37, 72, 136, rank, dtype, (factor_dtype,) * 2, is_transposed=is_transposed)
    product.check(*product.run())


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank"), [(1, 8, 8, 4), (33, 4, 2056, 16), (200, 260, 96, 48), (129, 96, 40, 8)]
)
@pytest.mark.parametrize("processors", [1, 132])
def test_product_of_every_tile(processors, m, n, k, rank, is_transposed):
    """Blocks of 32 to 128 rows, and of shares of y's columns: each has its own ends."""
    product = Product(m, n, k, rank, torch.bfloat16, bias_dtype=None, is_transposed=is_transposed)
    with multiprocessors(processors):
        t, y = product.run()
        again = product.run()
    product.check(t, y)
    assert torch.equal(t, again[0]) and torch.equal(y, again[1])


@pytest.mark.parametrize("rank", ODD_RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_of_any_rank(dtype, rank):
    """Ranks of one and others have no aligned rows; they are read element by element."""
    for factor_dtypes, is_transposed in zip(itertools.product(FACTOR_DTYPES, repeat=2), itertools.cycle((False, True))):
        product = Product(35, 71, 133, rank, dtype, factor_dtypes, is_transposed=is_transposed)
        product.check(*product.run())


@pytest.mark.parametrize("bias_dtype", FACTOR_DTYPES)
@pytest.mark.parametrize(("n", "dtype"), [(72, torch.bfloat16), (72, torch.float16), (71, torch.bfloat16)])
def test_product_with_a_bias_of_any_dtype(n, dtype, bias_dtype):
    """A bias is read in its own dtype: taken for another's, or at half its stride, it moves every output."""
    product = Product(35, n, 136, 16, dtype, bias_dtype=bias_dtype)
    product.check(*product.run())


@pytest.mark.parametrize("what", ["x and y", "factors", "bias", "k", "n"])
def test_product_at_any_address(what):
    """A view of a tensor, or a layer of odd sizes, would be a misaligned access."""
    n, k = 71 if what == "n" else 72, 133 if what == "k" else 136
    product = Product(35, n, k, 16, torch.bfloat16, aligned=what != "factors")
    product.bias = unaligned(product.bias) if what == "bias" else product.bias
    product.check(*product.run(aligned=what != "x and y"))


@pytest.mark.parametrize("padding", [8, 3])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_factors_inside_wider_matrices(is_transposed, padding):
    """A factor may be a slice, as of the stacked ones of q, k and v; what is beside it is not read."""
    product = Product(20, 40, 64, 16, torch.bfloat16, is_transposed=is_transposed, padding=padding)
    product.check(*product.run())


@pytest.mark.parametrize("rank", [12, 128, 512])
def test_parts_of_the_product(rank):
    """The backward keeps t, or makes y from a t that it has: both are the whole call's, bit for bit."""
    product = Product(40, 72, 64, rank, torch.bfloat16)
    t, y = product.run()
    product.check(t, y)
    assert torch.equal(product.run(has_y=False)[0], t)
    assert torch.equal(product.run(t=t)[1], y)


@pytest.mark.parametrize("magnitude", [1e7, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_of_large_and_tiny_factors(dtype, magnitude):
    """Loss scales make gradients of 1e7, beyond fp16, before a small factor takes them back; nothing may overflow."""
    product = Product(33, 40, 72, 16, dtype)
    product.down *= magnitude
    product.up /= magnitude
    t, y = product.run()
    product.check(t, y)
    assert t.abs().median() / magnitude > 1 and y.abs().median() > 1


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("k", "rank"), [(72, 8), (77, 5)])
def test_non_finite_rows_stay_alone(k, rank, value):
    """An overflow in one token must be seen there, and leave the others' outputs as they are."""
    product = Product(40, 40, k, rank, torch.bfloat16)
    expected = product.run()
    product.x[3, k - 1] = value
    product.x[36, 0] = value
    for clean, ours in zip(expected, product.run(), strict=True):
        touched = torch.zeros(40, dtype=torch.bool)
        touched[[3, 36]] = True
        assert torch.equal(ours.isfinite(), ~touched[:, None].expand_as(ours))
        assert torch.equal(ours[~touched], clean[~touched])


def test_non_finite_factors_stay_in_their_column():
    """A factor that diverged in one component or output must not hide which."""
    product = Product(40, 40, 72, 16, torch.bfloat16)
    product.down[5, 7] = torch.inf
    t, _ = product.run()
    assert torch.equal(t.isfinite().all(0), torch.arange(16) != 5)
    product = Product(40, 40, 72, 16, torch.bfloat16)
    product.up[39, 3] = torch.nan
    _, y = product.run()
    assert torch.equal(y.isfinite().all(0), torch.arange(40) != 39)


def test_products_without_size():
    """No rows, outputs or rank launch nothing; no inputs make t zero and y the bias."""
    call("lowbit_dequantize", *[None] * 5, 0, 64, 0, None, 0)
    before = len(launchers().launches)
    Product(0, 8, 8, 4, torch.bfloat16).run()
    Product(8, 8, 8, 0, torch.bfloat16).run(has_y=False)
    assert len(launchers().launches) == before
    product = Product(5, 0, 16, 4, torch.bfloat16)
    product.check(product.run()[0], None)
    for k, rank in ((0, 4), (16, 0)):
        product = Product(5, 8, k, rank, torch.bfloat16)
        t, y = product.run()
        assert not t.any()
        assert torch.equal(y, product.bias.to(y.dtype).expand(5, 8))
        product.bias = None
        assert not product.run()[1].any()


def test_x_is_read_once():
    """Each byte of x once per block of rows, and of the factors too, in pieces that fill their sectors."""
    m, n, k, rank = 64, 64, 512, 16
    product = Product(m, n, k, rank, torch.bfloat16, bias_dtype=None)
    with multiprocessors(1):
        product.run()
    (launch,) = launchers().launches
    loads = [a for a in launch.result.global_accesses if a.ins.opcode.startswith("ld.global.nc")]
    wanted = {"x": m * k * 2, "factors": (n + k) * rank * 4 * (m // 32 if launch.grid[0] > 1 else 2)}
    x = [a for a in loads if "no_allocate" in a.ins.opcode]
    assert sum(a.bytes for a in x) == sum(a.sectors for a in x) * 32 == wanted["x"]
    factors = [a for a in loads if "no_allocate" not in a.ins.opcode]
    assert sum(a.bytes for a in factors) == wanted["factors"]


def outer(wide, low, scale, out_dtype, is_transposed=False):
    """The kernel's output [w, rank]. ``is_transposed``: [rank, w] in memory."""
    (m, w), rank = wide.shape, low.shape[1]
    out = written(w * rank, out_dtype)
    strides = (1, w) if is_transposed else (rank, 1)
    operands = (wide, DTYPE_CODES[wide.dtype], low, scale, out, DTYPE_CODES[out_dtype])
    call("lowbit_lora_outer", *operands, *strides, m, w, rank)
    return out.view(rank, w).T if is_transposed else out.view(w, rank)


def assert_is_outer(m, w, rank, dtype, out_dtype=torch.float32, is_transposed=False, magnitude=1.0):
    wide, low, scale = normal(m, w, dtype=dtype), normal(m, rank, seed=1) * magnitude, 0.7
    out = outer(wide, low, scale, out_dtype, is_transposed)
    exact = scale * wide.double().T @ low.double()
    size = scale * wide.double().abs().T @ low.double().abs()
    assert_within(out, exact, lora_tolerance(size, exact, m, (dtype, torch.float32), out_dtype))
    assert torch.equal(out, outer(wide, low, scale, out_dtype, is_transposed))


@pytest.mark.parametrize("rank", (*RANKS, *ODD_RANKS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_outer(dtype, rank):
    """The gradients of A and B, in their dtypes and as they lie in memory."""
    for out_dtype, is_transposed in zip(FACTOR_DTYPES, itertools.cycle((False, True))):
        assert_is_outer(75, 72, rank, dtype, out_dtype, is_transposed)


@pytest.mark.parametrize(("m", "w"), [(1, 4), (7, 68), (8, 33), (31, 132), (33, 260), (600, 36), (64, 70)])
@pytest.mark.parametrize("processors", [1, 132])
def test_outer_of_every_tile(processors, m, w):
    """Blocks of 32 to 128 columns, and warps without rows, with a few and with many."""
    with multiprocessors(processors):
        assert_is_outer(m, w, 16, torch.bfloat16, is_transposed=True)
        assert_is_outer(m, w, 64, torch.float16)


@pytest.mark.parametrize("magnitude", [1e7, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_of_large_and_tiny_factors(dtype, magnitude):
    """Gradients of t carry a loss scale that fp16 does not hold."""
    assert_is_outer(40, 36, 8, dtype, magnitude=magnitude)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_outer_keeps_non_finite_numbers_apart(value):
    """A feature, or a component of the rank, that overflowed must not spoil the others' gradients."""
    wide, low = normal(37, 40, dtype=torch.bfloat16), normal(37, 12, seed=1)
    clean = outer(wide, low, 1.0, torch.float32)
    wide[36, 5], low[36, 7] = value, value
    ours = outer(wide, low, 1.0, torch.float32)
    touched = (torch.arange(40) == 5)[:, None] | (torch.arange(12) == 7)
    assert torch.equal(ours.isfinite(), ~touched)
    assert torch.equal(ours[~touched], clean[~touched])


def test_outer_without_size():
    """No columns or rank launch nothing; no rows make zeros."""
    call("lowbit_dequantize", *[None] * 5, 0, 64, 0, None, 0)
    before = len(launchers().launches)
    for m, w, rank in ((5, 0, 4), (5, 8, 0)):
        outer(normal(m, w, dtype=torch.bfloat16), normal(m, rank), 1.0, torch.float32)
    assert len(launchers().launches) == before
    assert not outer(normal(0, 8, dtype=torch.bfloat16), normal(0, 4), 1.0, torch.float32).any()


def test_no_two_lanes_wait_for_a_bank():
    """The loops of both kernels and the sums of warps; only t's fragments are written with conflicts."""
    assert_is_outer(75, 72, 64, torch.bfloat16)
    assert launchers().launches[-1].result.bank_conflicts == 0
    Product(40, 72, 136, 64, torch.bfloat16).run()
    accesses = launchers().launches[-1].result.shared_accesses
    conflicting = [access for access in accesses if access.wavefronts > access.ideal]
    assert all(access.ins.opcode in ("st.shared.u32", "st.shared.b32") and access.worst <= 4 for access in conflicting)


def test_what_it_does_not_serve():
    """The caller takes another way, and the launcher says so before it launches anything."""
    before = len(launchers().launches)

    def code_of(dtype=torch.bfloat16, rank=4):
        x, t, y = torch.zeros(4, 8, dtype=dtype), torch.zeros(4, rank), torch.zeros(4, 8, dtype=dtype)
        factor = (torch.zeros(8, rank), 0, rank, 1)
        product = (x, DTYPE_CODES[dtype], *factor, 1.0, t, *factor, 1.0, None, 0, y, 4, 8, 8, rank, None)
        outer = (x, DTYPE_CODES[dtype], t, 1.0, torch.zeros(8, rank), 0, rank, 1, 4, 8, rank, None)
        codes = launchers().call("lowbit_lora_product", *product), launchers().call("lowbit_lora_outer", *outer)
        assert codes[0] == codes[1]
        return codes[0]

    assert code_of(rank=513) == NOT_SUPPORTED
    assert code_of(torch.float32) == NOT_SUPPORTED
    device = launchers().device
    launchers().device = emulator("device").Device.for_arch("sm_75")
    try:
        assert code_of() == NOT_SUPPORTED
    finally:
        launchers().device = device
    assert len(launchers().launches) == before
