"""torch's functions on a quantized weight equal those on the decoded weight, and use our kernels if there are any."""

import warnings

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, CalledOps, assert_within, make_weight, product_tolerance
from hypothesis import given, settings

import lowbit
from lowbit import QuantizedTensor, WeightSpec, aten
from lowbit.quantizers.quantize import quantize_to

SPECS = (WeightSpec(), WeightSpec("nf4", 32, False), WeightSpec("fp4", 128, True), WeightSpec("int8"))
specs, dtypes = st.sampled_from(SPECS), st.sampled_from(DTYPES)
#: Sizes that hurt: 1, odd, whole blocks, one more.
sizes = st.sampled_from((1, 3, 5, 32, 64, 65, 96, 128))


@pytest.fixture(autouse=True)
def on_the_reference():
    """Here is tested which op computes a function; test_linear.py holds the kernels of each op to their bounds."""
    aten._say_once.cache_clear()  # what is said once is said once in each test
    with lowbit.use_backend("reference"):
        yield


@pytest.fixture
def no_decoding():
    """Make it an error to decode the weight."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decodes a quantized weight")
        yield


def weight(rows: int, columns: int, spec=WeightSpec(), dtype=torch.float32) -> QuantizedTensor:  # noqa: B008
    return quantize_to(make_weight((rows, columns), dtype, 1.0, rows + columns), spec)


def assert_product(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that y is x w within the bound of a product, for x [..., k] and a dense w [k, n]."""
    x, w = x.detach().double(), w.double()
    exact, magnitude = x @ w, x.abs() @ w.abs()
    assert y.dtype == dtype and y.shape == exact.shape
    assert_within(y.detach(), exact, product_tolerance(magnitude, exact, x.shape[-1], dtype))


@settings(deadline=None, max_examples=40)
@given(rows=sizes, columns=sizes, spec=specs, dtype=dtypes, batch=st.sampled_from(((), (0,), (3,), (2, 1, 3))))
def test_products(rows, columns, spec, dtype, batch):
    """A product with the weight, transposed or not, on either side, would be another than the decoded weight's."""
    q = weight(rows, columns, spec, dtype)
    dense = q.dequantize(torch.float32)
    with CalledOps() as called:
        x = torch.randn(*batch, columns).to(dtype).requires_grad_()
        for y in (F.linear(x, q), x @ q.T, torch.matmul(x, q.mT), q.t().__rmatmul__(x)):
            assert_product(y, x, dense.T, dtype)
        grad = torch.ones_like(y)
        for y in (F.linear(x, q), x @ q.T):
            assert_product(torch.autograd.grad(y, x, grad)[0], grad, dense, dtype)
        x = torch.randn(*batch, rows).to(dtype).requires_grad_()
        y = x @ q
        assert_product(y, x, dense, dtype)
        grad = torch.ones_like(y)
        assert_product(torch.autograd.grad(y, x, grad)[0], grad, dense.T, dtype)
        if batch:
            assert_product((q.T @ x.mT).mT, x, dense, dtype)
    assert not [name for name in called.names if "dequantize" in name]


@settings(deadline=None, max_examples=40)
@given(rows=sizes, columns=sizes, spec=specs, data=st.data())
def test_slices(rows, columns, spec, data):
    """Rows, slices, splits and single rows of a weight would be other rows, also where they begin inside a block."""
    q = weight(rows, columns, spec)
    dense = q.dequantize()
    begin = data.draw(st.integers(0, rows), "begin")
    end = data.draw(st.integers(begin, rows), "end")
    part = q[begin:end]
    assert torch.equal(part.dequantize(), dense[begin:end])
    x = torch.randn(2, columns)
    assert_product(F.linear(x, part), x, dense[begin:end].T, torch.float32)
    row = data.draw(st.integers(-rows, rows - 1), "row")
    assert torch.equal(q[row].dequantize(), dense[row])
    again = data.draw(st.integers(0, max(0, end - begin)), "again")
    assert torch.equal(part[again:].dequantize(), dense[begin:end][again:])
    for ours, theirs in zip(q.split(2), dense.split(2), strict=True):
        assert torch.equal(ours.dequantize(), theirs)
    for ours, theirs in zip(q.chunk(3), dense.chunk(3), strict=True):
        assert torch.equal(ours.dequantize(), theirs)
    assert torch.equal(torch.stack([part.dequantize() for part in q]), dense)
    with pytest.raises(IndexError, match="out of (range|bounds)"):
        q[rows]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_slices_are_views(spec, no_decoding):
    """A slice of a large stack would copy its bytes."""
    q = quantize_to(make_weight((4, 96, 128), seed=1), spec)
    part = q[2]
    assert isinstance(part, QuantizedTensor) and part.shape == (96, 128)
    assert part.packed.untyped_storage().data_ptr() == q.packed.untyped_storage().data_ptr()
    with CalledOps() as called:
        F.linear(torch.randn(3, 128), q[2])
    assert called.names.count("lowbit_reference::linear") == 1


@settings(deadline=None, max_examples=30)
@given(experts=st.sampled_from((1, 3)), rows=sizes, columns=sizes, spec=specs)
def test_experts(experts, rows, columns, spec):
    """One expert out of a stack, whose blocks may cross from one to the next, would be another's."""
    q = quantize_to(make_weight((experts, rows, columns), seed=rows), spec)
    dense = q.dequantize()
    for expert in range(experts):
        x = torch.randn(2, columns, requires_grad=True)
        y = F.linear(x, q[expert])
        assert_product(y, x, dense[expert].T, torch.float32)
        grad = torch.ones_like(y)
        assert_product(torch.autograd.grad(y, x, grad)[0], grad, dense[expert], torch.float32)
    assert torch.equal(q.transpose(1, 2).dequantize(), dense.transpose(1, 2))


@pytest.mark.parametrize("transposed", [True, False])
def test_grouped_mm(transposed, no_decoding):
    """transformers' fused experts would decode all experts for each token, forward and backward."""
    q = lowbit.quantize(make_weight((4, 96, 64), seed=3))
    dense, ends = q.dequantize(), torch.tensor([2, 2, 6, 9], dtype=torch.int32)
    x = torch.randn(9, 64 if transposed else 96, requires_grad=True)
    stack, dense = (w.transpose(-2, -1) if transposed else w for w in (q, dense))
    with CalledOps() as called:
        y = F.grouped_mm(x, stack, offs=ends)
        grad_y = torch.ones_like(y)
        grad_x = torch.autograd.grad(y, x, grad_y)[0]
    for expert, (begin, end) in enumerate(((0, 2), (2, 2), (2, 6), (6, 9))):
        assert_product(y[begin:end], x[begin:end], dense[expert], torch.float32)
        assert_product(grad_x[begin:end], grad_y[begin:end], dense[expert].T, torch.float32)
    assert {name.split("::")[1] for name in called.names if name.startswith("lowbit")} == {
        "grouped_linear",
        "grouped_linear_grad_input",
    }


class DecodedBytes(CalledOps):
    """A mode that notes how many elements are decoded."""

    decoded = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(op, types, args, kwargs)
        if "dequantize" in op.name():
            self.decoded += result.numel()
        return result


@settings(deadline=None, max_examples=40)
@given(rows=sizes, columns=sizes, spec=specs, dtype=dtypes, shape=st.sampled_from(((), (0,), (5,), (2, 3))))
def test_embedding(rows, columns, spec, dtype, shape):
    """A look-up would give other rows, or decode the whole table for a few."""
    q = weight(rows, columns, spec, dtype)
    ids = torch.randint(0, rows, shape)
    with DecodedBytes() as mode:
        got = F.embedding(ids, q)
        assert torch.equal(got, F.embedding(ids, q.dequantize().detach()))
        mode.decoded -= rows * columns  # of the line above
        assert mode.decoded <= ids.numel() * columns
    assert torch.equal(q[ids], got) and torch.equal(torch.index_select(q, 0, ids.flatten()).view(got.shape), got)


def test_embedding_refuses():
    """A wrong id would read other memory, and max_norm would write into the weight."""
    q = weight(10, 64)
    for ids in (torch.tensor([10]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="expected indices from 0 to 9"):
            F.embedding(ids, q)
    with pytest.raises(RuntimeError, match="max_norm: expected None"):
        F.embedding(torch.tensor([1]), q, max_norm=1.0)


OTHER = {
    "einsum": lambda w, x: torch.einsum("bi,oi->bo", x, w),
    "multiplied": lambda w, x: (w * 2 + w.abs()) @ x.T,
    "concatenated": lambda w, x: torch.cat([w, w]) @ x.T,
    "column": lambda w, x: w[:, 3] * x.sum(),
    "conv1d": lambda w, x: F.conv1d(x.T[None], w[:, :, None]),
    "batched": lambda w, x: torch.bmm(x[None], w.T[None]),
    "scaled addmm": lambda w, x: torch.addmm(x.new_ones(96), x, w.T, alpha=0.5),
    "solved": lambda w, x: torch.linalg.lstsq(w, w @ x.T).solution,
    "compared": lambda w, x: torch.where(w > 0, w, x[:1]),
    "doubled": lambda w, x: w.double() @ x.T.double(),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_functions_decode(name):
    """A function without an entry would fail, or compute with the codes, or lose the gradient of its other operand."""
    q, function = weight(96, 64), OTHER[name]
    x = torch.randn(5, 64, requires_grad=True)
    with pytest.warns(UserWarning, match="decodes a quantized weight"):
        ours = function(q, x)
    theirs = function(q.dequantize(), x)
    torch.testing.assert_close(ours, theirs)
    grad = torch.ones_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, theirs)))


def test_decoding_is_said_once():
    """A slow model would not say why, or would say it at every step."""
    q = weight(96, 64)
    with pytest.warns(UserWarning, match="^add decodes") as said:
        for _ in range(3):
            q + 1
    assert len(said) == 1


def test_autocast(no_decoding):
    """Under autocast a product would come in another dtype than the dense model's."""
    q = weight(96, 64)
    x, b = torch.randn(5, 64), torch.randn(96)
    products = (lambda w: F.linear(x, w, b), lambda w: x @ w.T, lambda w: w @ x.T, lambda w: torch.addmm(b, x, w.T))
    with torch.autocast("cpu", torch.bfloat16):
        for product in products:
            assert product(q).dtype == torch.bfloat16
    y = products[1](q)
    assert y.dtype == torch.float32


WRITING = {
    "add_": lambda q: q.add_(1),
    "setitem": lambda q: q.__setitem__(0, 1.0),
    "iadd": lambda q: q.__iadd__(1),
    "out": lambda q: torch.add(torch.ones(96, 64), 1, out=q),
    "data.copy_": lambda q: q.data.copy_(torch.zeros(96, 64)),
    "slice": lambda q: q[:3].zero_(),
    "init": torch.nn.init.kaiming_uniform_,
    "apply_": lambda q: q.apply_(abs),
    "resize_": lambda q: q.resize_(3),
    "foreach": lambda q: torch._foreach_add_([q], 1.0),
}


@pytest.mark.parametrize("name", WRITING)
def test_writing_is_an_error(name):
    """Initialisation, weight decay or merging would be lost, or overwrite codes."""
    q = weight(96, 64)
    before = q.dequantize()
    with pytest.raises(RuntimeError, match=r"cannot be (written in place|copied).*lowbit.dequantize_"):
        WRITING[name](q)
    assert torch.equal(q.dequantize(), before)


def test_looks_like_a_tensor(no_decoding):
    """Code that asks a weight what it is would be told of codes."""
    q = weight(96, 64, dtype=torch.bfloat16)
    assert isinstance(q, torch.Tensor) and q.shape == (96, 64) and q.dtype == torch.bfloat16
    assert q.numel() == 96 * 64 and q.dim() == 2 and q.is_floating_point() and q.device.type == "cpu" and len(q) == 96
    assert q.stride() == (64, 1) and q.is_contiguous() and q.T.shape == (64, 96) and not q.is_quantized
    assert q.nbytes == sum(part.nbytes for part in q.parts() if part is not None)
    assert torch.zeros_like(q).shape == (96, 64) and q.new_zeros(3).dtype == torch.bfloat16
    assert repr(q) == "QuantizedTensor(shape=(96, 64), dtype=torch.bfloat16, spec='nf4:64:double_quant', device=cpu)"


def test_values_leave_the_tensor():
    """numpy and Python would get codes, or a crash."""
    q = weight(3, 64)
    dense = q.dequantize()
    assert (q.numpy() == dense.numpy()).all() and q.tolist() == dense.tolist()
    assert torch.equal(torch.from_dlpack(q), dense) and float(q[0, 0]) == float(dense[0, 0])
    for read in (lambda: int(q.data_ptr()), lambda: q.data_ptr() % 16, q.storage):
        with pytest.raises(RuntimeError, match="no memory of its own layout"):
            read()


def test_pointers_name_weights():
    """Libraries find shared weights by their pointers, and would take all weights for one, or each for another."""
    q, other = weight(3, 64), weight(3, 64)
    assert q.data_ptr() == q.detach().data_ptr() == torch.nn.Parameter(q, requires_grad=False).data_ptr()
    assert q.data_ptr() != other.data_ptr() and len({q.data_ptr(): 0, q.detach().data_ptr(): 0}) == 1


def test_a_parameter_is_made_of_a_weight_as_of_any_tensor():
    """accelerate moves a parameter by ``type(p)(moved, requires_grad=...)``, and would stop, or make no parameter."""
    q = torch.nn.Parameter(weight(3, 64), requires_grad=False)
    moved = type(q)(q.to("cpu"), requires_grad=q.requires_grad)
    assert isinstance(moved, torch.nn.Parameter) and isinstance(moved, QuantizedTensor) and moved.packed is q.packed
    with pytest.raises(RuntimeError, match="a quantized weight is frozen"):
        type(q)(q, requires_grad=True)
    with pytest.raises(TypeError, match="packed: expected a quantized weight, .* got Tensor alone"):
        type(q)(q.dequantize(), requires_grad=False)


def test_optimizer_leaves_it_alone():
    """An optimizer that is given all parameters would decay or overwrite the base."""
    model = lowbit.quantize_(torch.nn.Linear(64, 96))
    before = model.weight.dequantize()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5)
    model(torch.randn(3, 64)).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert model.weight.grad is None and torch.equal(model.weight.dequantize(), before)
