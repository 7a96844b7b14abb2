"""The Triton kernels on a GPU of NVIDIA, AMD or Intel compute what the interpreter and the emulator did.

`pytest -m gpu` runs them.
"""

import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, FORMATS, UNIT_ROUNDOFF, assert_within, make_weight, product_tolerance
from optim_steps import Parameter, assert_same_step, made_step

import lowbit
from lowbit import reference, selftest
from lowbit.backends import triton as backend
from lowbit.format import WeightSpec
from lowbit.reference_optim import RULES

DEVICE = "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cuda"
HAS_GPU = torch.get_device_module(DEVICE).is_available()
NO_GPU = backend.missing_reason() or (None if HAS_GPU else "torch sees no GPU")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=f"no GPU: {NO_GPU}")]

OPS = torch.ops.lowbit_triton
OPTIONS = ({}, {"format": "fp4", "block_size": 128, "double_quant": False}, {"block_size": 32}, {"format": "int8"})


def on_gpu(q: lowbit.QuantizedTensor) -> tuple:
    """A weight as the ops take it, on the GPU."""
    return q.to(DEVICE).operands()


def bound(exact, magnitude, terms, dtype):
    """Tensor cores may cut off what does not fit, and take weights, scales and LoRA's factors rounded to x's dtype."""
    rounding = 3.1 * UNIT_ROUNDOFF[dtype] if dtype != torch.float32 else 0.0
    return product_tolerance(magnitude, exact, 2 * terms, dtype, rounding)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bits(dtype, format, block_size):
    """Files must not depend on the GPU that wrote them."""
    for numel in (1, 63, 1025, 100_003, 1 << 18):
        weight = make_weight((numel,), dtype)
        spec = WeightSpec(format, block_size)
        packed, absmax = OPS.quantize(weight.to(DEVICE), str(spec))
        expected = reference.quantize(weight, str(spec))
        assert torch.equal(packed.cpu(), expected[0]) and torch.equal(absmax.cpu(), expected[1])
        offset = expected[1].mean()
        codes, groups = OPS.quantize_scales(absmax, offset.to(DEVICE))
        assert all(map(torch.equal, (codes.cpu(), groups.cpu()), reference.quantize_scales(expected[1], offset)))
        arguments = (str(spec), [numel], dtype)
        decoded = OPS.dequantize(packed, codes, groups, offset.to(DEVICE), *arguments)
        exact = reference.dequantize(packed.cpu(), codes.cpu(), groups.cpu(), offset, *arguments)
        assert torch.equal(decoded.cpu(), exact)


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 14336), (33, 192), (17, 513), (16, 96)])
@pytest.mark.parametrize("rows", [1, 8, 16, 33, 300, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_products(options, dtype, rows, shape):
    """A configuration for a user's shapes would be wrong, forward or backward, or give other bits the second time."""
    n, k = shape
    q = lowbit.quantize(make_weight(shape), **options)
    weight = q.dequantize(torch.float32).double().to(DEVICE)
    sizes = ((rows, k), (n,), (rows, 8), (n, 8), (rows, n), (8, k))
    x, bias, t, lora_b, grad, lora_a = (torch.randn(size).to(DEVICE) for size in sizes)
    x, grad = x.to(dtype), grad.to(dtype)
    y = OPS.linear(x, *on_gpu(q), n, bias, t, lora_b, 0.5)
    assert torch.equal(y, OPS.linear(x, *on_gpu(q), n, bias, t, lora_b, 0.5))
    exact = x.double() @ weight.T + 0.5 * t.double() @ lora_b.double().T + bias.double()
    magnitude = x.double().abs() @ weight.abs().T + 0.5 * t.double().abs() @ lora_b.double().abs().T
    assert_within(y, exact, bound(exact, magnitude + bias.double().abs(), k + 8, dtype))
    grad_x = OPS.linear_grad_input(grad, *on_gpu(q), k, t, lora_a)
    exact = grad.double() @ weight + t.double() @ lora_a.double()
    magnitude = grad.double().abs() @ weight.abs() + t.double().abs() @ lora_a.double().abs()
    assert_within(grad_x, exact, bound(exact, magnitude, n + 8, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped(dtype):
    """Experts with no rows, few or many would be wrong in one launch."""
    q = lowbit.quantize(make_weight((6, 192, 512)))
    ends = torch.tensor([0, 3, 3, 200, 216, 217], dtype=torch.int32)
    x, grad = torch.randn(217, 512).to(dtype), torch.randn(217, 192).to(dtype)
    t, lora_b, lora_a = torch.randn(217, 8), torch.randn(6, 192, 8), torch.randn(6, 8, 512)
    weight = (*on_gpu(q), ends.to(DEVICE))
    y = OPS.grouped_linear(x.to(DEVICE), *weight, 192, None, t.to(DEVICE), lora_b.to(DEVICE), 0.5)
    cpu = (*q.operands(), ends)
    exact = reference.grouped_linear(x.double(), *cpu, 192, None, t, lora_b, 0.5).double()
    magnitude = torch.full_like(exact, float(x.float().norm(dim=1).max() * q.dequantize().norm(dim=-1).max() + 50))
    assert_within(y.cpu(), exact, bound(exact, magnitude, 520, dtype))
    grad_x = OPS.grouped_linear_grad_input(grad.to(DEVICE), *weight, 512, t.to(DEVICE), lora_a.to(DEVICE))
    exact = reference.grouped_linear_grad_input(grad.double(), *cpu, 512, t, lora_a).double()
    magnitude = torch.full_like(exact, float(grad.float().norm(dim=1).max() * q.dequantize().norm(dim=-2).max() + 50))
    assert_within(grad_x.cpu(), exact, bound(exact, magnitude, 200, dtype))


def expert_operands(rows):
    """A stack [3, 64, 128] as the ops take it, and the ends of the experts' rows, none of them the second's."""
    ends = torch.tensor([rows // 3, rows // 3, rows], dtype=torch.int32)
    return (*on_gpu(lowbit.quantize(make_weight((3, 64, 128)))), ends.to(DEVICE))


def half(*shape):
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


#: Op -> (the op, its arguments for a number of rows).
GRAPHS = {
    "linear": lambda rows: (
        OPS.linear,
        (half(rows, 16384), *on_gpu(lowbit.quantize(make_weight((64, 16384)))), 64, None, None, None, 1.0),
    ),
    "linear_grad_input": lambda rows: (
        OPS.linear_grad_input,
        (half(rows, 4096), *on_gpu(lowbit.quantize(make_weight((4096, 64)))), 64),
    ),
    "grouped_linear": lambda rows: (
        OPS.grouped_linear,
        (half(rows, 128), *expert_operands(rows), 64, None, None, None, 1.0),
    ),
    "grouped_linear_grad_input": lambda rows: (
        OPS.grouped_linear_grad_input,
        (half(rows, 64), *expert_operands(rows), 128),
    ),
}


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("name", GRAPHS)
def test_graph(name, rows):
    """Decoding token by token is launched as a graph: nothing may wait or allocate outside of torch's allocator."""
    op, arguments = GRAPHS[name](rows)
    expected = op(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(*arguments)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def dense_layer(x, q, ends, lora_a, lora_b):
    return torch.nn.functional.silu(lowbit.lora_linear(x, q, lora_a, lora_b, 0.5))


def expert_layer(x, q, ends, lora_a, lora_b):
    return torch.nn.functional.silu(lowbit.grouped_lora_linear(x, q, ends, lora_a, lora_b, 0.5))


@pytest.mark.parametrize(
    ("layer", "experts", "dtype"),
    [(dense_layer, (), torch.float32), (dense_layer, (), torch.bfloat16), (expert_layer, (3,), torch.bfloat16)],
)
def test_compiled(layer, experts, dtype):
    """torch.compile sees the launches of products in 16 bits; what it makes of a layer must compute the same."""
    q = lowbit.quantize(make_weight((*experts, 128, 256))).to(DEVICE)
    lora_a, lora_b = (torch.randn(*experts, *size).to(DEVICE).requires_grad_() for size in ((8, 256), (128, 8)))
    compiled = torch.compile(layer, fullgraph=True)
    with lowbit.use_backend("triton"):
        for rows in (32, 31, 300):  # the second makes a symbol of their number
            x = torch.randn(rows, 256).to(DEVICE, dtype).requires_grad_()
            ends = torch.tensor([rows // 3, rows // 3, rows], dtype=torch.int32).to(DEVICE)
            results = []
            for function in (compiled, layer):
                y = function(x, q, ends, lora_a, lora_b)
                results.append((y, *torch.autograd.grad(y.sum(), (x, lora_a, lora_b))))
            for actual, expected in zip(*results, strict=True):
                if dtype == torch.float32:
                    torch.testing.assert_close(actual, expected)
                else:  # a look at the wiring: LoRA's part of grad_x is rounded alone
                    assert (actual.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


def step_on_gpu(params, grads, arenas, layout, constants, rule, grad_scale, seed):
    """The op on copies, with what it writes copied back."""
    there = [[tensor.to(DEVICE) for tensor in tensors] for tensors in (params, grads, arenas)]
    OPS.optimizer_step(*there, layout, constants, rule, None if grad_scale is None else grad_scale.to(DEVICE), seed)
    for here, result in zip((*params, *arenas), (*there[0], *there[2]), strict=True):
        here.copy_(result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", list(RULES))
def test_optimizers(rule, dtype):
    """A run continued on a GPU would drift from the same run on a CPU."""
    sizes = (0, 1, 257, 65536, 100_003)
    states = ((False, False), (True, True), (True, False))
    every = [Parameter(size, dtype, dtype, in_8_bits) for size in sizes for in_8_bits in states]
    for magnitude, grad_scale, seed in ((1.0, None, None), (1e-20, 0.37, 3)):
        assert_same_step(made_step(every, rule, magnitude, grad_scale, seed), step_on_gpu)
    grads = [torch.randn(size).to(DEVICE, dtype) for size in sizes]
    exact = sum(grad.double().square().sum() for grad in grads)
    assert abs(OPS.sum_of_squares(grads) - exact) <= 1e-12 * exact
    assert OPS.sum_of_squares(grads) == OPS.sum_of_squares(grads)


def test_self_test():
    """`python -m lowbit --self-test` would fail on a GPU."""
    results = [problem for name, problem in selftest.run() if name.startswith("Triton")]
    assert results and all(problem is None for problem in results)
