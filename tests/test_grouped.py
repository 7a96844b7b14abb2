"""grouped_linear and grouped_lora_linear: each expert's rows against dense fp64 arithmetic on its decoded matrix."""

import pytest
import torch
from cases import (
    KERNELS,
    assert_within,
    block_sizes,
    dtypes,
    formats,
    kernels,
    make_weight,
    product_tolerance,
    weight_error,
    weight_error_backward,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit
from lowbit import reference
from lowbit.ops import grouped

#: (experts, out_features, in_features): one, blocks that cross rows and experts, groups of 256 scales that do, empty.
STACKS = (
    (1, 1, 1),
    (3, 5, 7),
    (4, 33, 64),
    (3, 17, 130),
    (5, 9, 192),
    (2, 96, 384),
    (7, 40, 512),
    (2, 0, 64),
    (2, 4, 0),
)
#: Rows of each expert: none at all, some without any, one with all, few and many.
COUNTS = ((0,), (1,), (0, 3), (2, 0, 1), (5, 0, 0, 9), (0, 0, 0, 0, 4), (1, 1, 1, 1, 1, 1, 1), (13, 40, 7))


def ends_of(counts, experts) -> torch.Tensor:
    """expert_ends for so many experts: counts repeated."""
    repeated = [counts[i % len(counts)] for i in range(experts)]
    return torch.tensor(repeated).cumsum(0).to(torch.int32)


def exact_product(x, weight, ends, transposed=False):
    """Each expert's rows times its matrix, in the operands' own dtype."""
    parts = [x[at] @ (weight[e] if transposed else weight[e].T) for e, at in enumerate(reference.expert_rows(ends))]
    return torch.cat([x.new_zeros(0, weight.shape[2 if transposed else 1]), *parts])


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=80, deadline=None)
@given(
    counts=st.sampled_from(COUNTS),
    stack=st.sampled_from(STACKS),
    dtype=dtypes,
    format=formats,
    block_size=block_sizes,
    double_quant=st.booleans(),
    has_bias=st.booleans(),
)
def test_grouped_linear(name, counts, stack, dtype, format, block_size, double_quant, has_bias):
    """An expert that reads its neighbour's scales or rows would be wrong for its tokens only: hard to notice."""
    q = lowbit.quantize(make_weight(stack), format=format, block_size=block_size, double_quant=double_quant)
    check_product(name, q, ends_of(counts, stack[0]), dtype, has_bias)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("stack", STACKS)
def test_int8(name, stack):
    """An int8 expert would take another's scales: rows are counted through all experts."""
    q = lowbit.quantize(make_weight(stack), format="int8")
    check_product(name, q, ends_of((3, 0, 9), stack[0]), torch.float32, True)


def check_product(name, q, ends, dtype, has_bias):
    experts, n, k = q.shape
    rows = int(ends[-1])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(experts, n, generator=generator).to(dtype) if has_bias else None
    weight = q.dequantize(torch.float32).double()
    with kernels(name):
        y = lowbit.grouped_linear(x, q, ends, bias)
        grad = torch.randn(y.shape, generator=generator).to(dtype)
        (grad_x,) = torch.autograd.grad(y, x, grad)
    assert y.dtype == grad_x.dtype == dtype and y.shape == (rows, n)
    x = x.detach().double()
    exact, magnitudes = exact_product(x, weight, ends), exact_product(x.abs(), weight.abs(), ends)
    if has_bias:
        of_row = torch.repeat_interleave(torch.arange(experts), torch.diff(ends, prepend=torch.zeros(1).int()))
        exact, magnitudes = exact + bias.double()[of_row], magnitudes + bias.double().abs()[of_row]
    most = max(at.stop - at.start for at in reference.expert_rows(ends))
    # This is the bound of any kernel that an expert may use: which one depends on its rows.
    rounding = max(weight_error(name, q.spec.format, dtype, m, k) for m in (1, most))
    assert_within(y.detach(), exact, product_tolerance(magnitudes, exact, k, dtype, rounding))
    exact = exact_product(grad.double(), weight, ends, transposed=True)
    magnitudes = exact_product(grad.double().abs(), weight.abs(), ends, transposed=True)
    rounding = max(weight_error_backward(name, q.spec.format, dtype, m, k) for m in (1, most))
    assert_within(grad_x, exact, product_tolerance(magnitudes, exact, n, dtype, rounding))


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=40, deadline=None)
@given(
    counts=st.sampled_from(COUNTS),
    stack=st.sampled_from(STACKS),
    rank=st.sampled_from((1, 3, 8, 17)),
    lora_dtype=dtypes,
)
def test_every_gradient(name, counts, stack, rank, lora_dtype):
    """An optimizer would follow a wrong gradient of some expert's LoRA without complaint."""
    experts, n, k = stack
    q = lowbit.quantize(make_weight(stack))
    ends = ends_of(counts, experts)
    generator = torch.Generator().manual_seed(0)
    sizes = ((int(ends[-1]), k), (experts, n), (experts, rank, k), (experts, n, rank))
    leaves = [torch.randn(size, generator=generator) for size in sizes]
    leaves = [leaf.to(lora_dtype if i > 1 else torch.float32).requires_grad_() for i, leaf in enumerate(leaves)]
    grad = torch.randn(sizes[0][0], n, generator=generator)
    with kernels(name):
        x, bias, lora_a, lora_b = leaves
        y = lowbit.grouped_lora_linear(x, q, ends, lora_a, lora_b, 0.7, bias)
        gradients = torch.autograd.grad(y, leaves, grad)

    def dense(leaves, weight, grad):
        x, bias, lora_a, lora_b = leaves
        of_row = torch.repeat_interleave(torch.arange(experts), torch.diff(ends, prepend=torch.zeros(1).int()))
        t = exact_product(x, lora_a, ends)
        y = exact_product(x, weight, ends) + 0.7 * exact_product(t, lora_b, ends) + bias[of_row]
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    weight = q.dequantize().double()
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = dense(exact_leaves, weight, grad.double())
    absolute = [leaf.detach().abs().requires_grad_() for leaf in exact_leaves]
    magnitudes = dense(absolute, weight.abs(), grad.double().abs())
    terms = n + k + rank + sizes[0][0]
    for actual, exact, magnitude, leaf in zip(
        (y.detach(), *gradients), expected, magnitudes, (grad, *leaves), strict=True
    ):
        assert actual.dtype == leaf.dtype and actual.shape == exact.shape
        assert_within(actual, exact, product_tolerance(magnitude, exact, terms, leaf.dtype))


def test_by_expert():
    """A backend without a grouped kernel would compute another product."""
    kernels_by_expert = grouped.by_expert("lowbit_reference")
    for options in ({}, {"double_quant": False}, {"block_size": 256}, {"format": "int8"}):
        for stack in STACKS:
            q = lowbit.quantize(make_weight(stack), **options)
            ends = ends_of((2, 0, 5), stack[0])
            weight = (*q.operands(), ends)
            x, grad = torch.randn(int(ends[-1]), stack[2]), torch.randn(int(ends[-1]), stack[1])
            t, lora_b = torch.randn(x.shape[0], 3), torch.randn(*stack[:2], 3)
            arguments = (stack[1], torch.randn(stack[:2]), t, lora_b, 0.5)
            expected = reference.grouped_linear(x, *weight, *arguments)
            torch.testing.assert_close(kernels_by_expert["grouped_linear"](x, *weight, *arguments), expected)
            lora = (torch.randn(x.shape[0], 3), torch.randn(stack[0], 3, stack[2]))
            expected = reference.grouped_linear_grad_input(grad, *weight, stack[2], *lora)
            actual = kernels_by_expert["grouped_linear_grad_input"](grad, *weight, stack[2], *lora)
            torch.testing.assert_close(actual, expected)


def test_dropout_and_autocast():
    """Dropout reaches LoRA's part only; autocast decides the output's dtype."""
    q = lowbit.quantize(make_weight((3, 16, 64)))
    ends = ends_of((4, 0, 3), 3)
    x, lora_a, lora_b = torch.randn(7, 64), torch.randn(3, 4, 64), torch.randn(3, 16, 4)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5, True)
    t = reference.grouped_matmul(dropped, lora_a, ends)
    expected = reference.grouped_linear(x, *q.operands(), ends, 16, None, t, lora_b, 0.5)
    torch.manual_seed(0)
    y = lowbit.grouped_lora_linear(x, q, ends, lora_a, lora_b, 0.5, dropout_p=0.5, training=True)
    torch.testing.assert_close(y, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert lowbit.grouped_lora_linear(x, q, ends, lora_a, lora_b, 0.5).dtype == torch.bfloat16


def test_compiles_whole():
    """A layer that breaks the graph of a compiled model is slower than one that does not compile."""
    q = lowbit.quantize(make_weight((3, 16, 64)))
    ends = ends_of((4, 0, 3), 3)
    leaves = [torch.randn(size, requires_grad=True) for size in ((7, 64), (3, 4, 64), (3, 16, 4))]

    def call(x, lora_a, lora_b):
        return lowbit.grouped_lora_linear(x, q, ends, lora_a, lora_b, 0.5).relu()

    def gradients(function):
        y = function(*leaves)
        return y, *torch.autograd.grad(y.sum(), leaves)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(gradients(compiled), gradients(call), strict=True):
        torch.testing.assert_close(actual, expected)


def test_bad_input():
    """A message that names the argument saves an afternoon; a kernel that trusts wrong ends reads other memory."""
    q = lowbit.quantize(make_weight((3, 16, 64)))
    x, ends = torch.randn(7, 64), ends_of((4, 0, 3), 3)
    lora_a, lora_b = torch.randn(3, 4, 64), torch.randn(3, 16, 4)
    wrong = [
        (ValueError, "q: expected weights of 3 dimensions", lambda: lowbit.grouped_linear(x, lowbit.quantize(x), ends)),
        (TypeError, "q: expected a lowbit.QuantizedTensor", lambda: lowbit.grouped_linear(x, x, ends)),
        (TypeError, "x: expected a torch.Tensor", lambda: lowbit.grouped_linear([1], q, ends)),
        (ValueError, "x: expected shape", lambda: lowbit.grouped_linear(x[None], q, ends)),
        (ValueError, "x: expected shape", lambda: lowbit.grouped_linear(x[:, :63], q, ends)),
        (TypeError, "x: expected float32", lambda: lowbit.grouped_linear(x.long(), q, ends)),
        (TypeError, "expert_ends: expected a torch.Tensor", lambda: lowbit.grouped_linear(x, q, [4, 4, 7])),
        (TypeError, "expert_ends: expected torch.int32", lambda: lowbit.grouped_linear(x, q, ends.long())),
        (ValueError, "expert_ends: expected shape", lambda: lowbit.grouped_linear(x, q, ends[:2])),
        (ValueError, "do not decrease", lambda: lowbit.grouped_linear(x, q, ends.flip(0))),
        (ValueError, "the last to be 7", lambda: lowbit.grouped_linear(x, q, ends - 1)),
        (ValueError, "bias: expected shape", lambda: lowbit.grouped_linear(x, q, ends, torch.randn(16))),
        (ValueError, "lora_a: expected", lambda: lowbit.grouped_lora_linear(x, q, ends, lora_a[0], lora_b, 1.0)),
        (ValueError, "lora_b: expected", lambda: lowbit.grouped_lora_linear(x, q, ends, lora_a, lora_b[0], 1.0)),
        (ValueError, "dropout_p", lambda: lowbit.grouped_lora_linear(x, q, ends, lora_a, lora_b, 1.0, dropout_p=1.0)),
    ]
    for kind, message, call in wrong:
        with pytest.raises(kind, match=message):
            call()
    weight = q.operands()
    for ends_given in (ends - 1, ends + 1, ends.flip(0), ends.long()):
        with pytest.raises(RuntimeError, match="expert_ends"):
            torch.ops.lowbit.grouped_linear(x, *weight, ends_given, 16, None, None, None, 1.0)
        with pytest.raises(RuntimeError, match="expert_ends"):
            torch.ops.lowbit.grouped_linear_grad_input(torch.randn(7, 16), *weight, ends_given, 64)
