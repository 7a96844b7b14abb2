"""The CUDA kernels on a GPU: bytes and decoded weights equal to the CPU reference's, products within their bound.

`pytest -m gpu` runs them.
"""

import pytest
import torch
from cases import (
    BLOCK_SIZES,
    DTYPES,
    FORMATS,
    UNIT_ROUNDOFF,
    assert_within,
    kernels,
    make_weight,
    product_tolerance,
    weight_error_cuda,
)

import lowbit
from lowbit import selftest
from lowbit.backends import native

NO_GPU = native.missing_cuda_reason() or (None if torch.cuda.is_available() else "torch sees no GPU")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=f"no GPU: {NO_GPU}")]

SIZES = (1, 63, 1024, 1025, 100_003, 1 << 20)


def assert_same(on_gpu, on_cpu):
    assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bits(dtype, format, block_size):
    """A GPU would compute other bytes than the emulator did."""
    for numel in SIZES:
        weight = make_weight((numel,), dtype)
        # Without double quantization: the mean that is its offset depends on the device's order of summation.
        options = {"format": format, "block_size": block_size, "double_quant": False}
        q = lowbit.quantize(weight.cuda(), **options)
        with kernels("reference"):
            expected = lowbit.quantize(weight, **options)
            decoded = expected.dequantize()
        assert_same(q.packed, expected.packed)
        assert_same(q.absmax, expected.absmax)
        assert_same(q.dequantize(), decoded)

        offset = expected.absmax.mean()
        ours = torch.ops.lowbit.quantize_scales(q.absmax, offset.cuda())
        theirs = torch.ops.lowbit_reference.quantize_scales(expected.absmax, offset)
        for our, their in zip(ours, theirs, strict=True):
            assert_same(our, their)
        arguments = (f"{format}:{block_size}:double_quant", [numel], dtype)
        decoded = torch.ops.lowbit_reference.dequantize(expected.packed, *theirs, offset, *arguments)
        assert_same(torch.ops.lowbit.dequantize(q.packed, *ours, offset.cuda(), *arguments), decoded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_searched_scales(dtype):
    """A GPU would find other scales."""
    weight, importance = make_weight((37, 200), dtype), torch.rand(200, generator=torch.Generator().manual_seed(0))
    for given in (None, importance):
        on_gpu = (weight.cuda(), None if given is None else given.cuda(), "nf4:64")
        scales = torch.ops.lowbit_reference.search_scales(weight, given, "nf4:64")
        assert_same(torch.ops.lowbit.search_scales(*on_gpu), scales)
        packed = torch.ops.lowbit_reference.encode(weight, scales, "nf4:64")
        assert_same(torch.ops.lowbit.encode(weight.cuda(), scales.cuda(), "nf4:64"), packed)


@pytest.mark.parametrize("shape", [(5, 48), (7,), (33, 1040), (3, 20_000)])
def test_int8(shape):
    """Rows that 16-byte accesses cannot serve would be other bytes."""
    weight = make_weight(shape)
    q, expected = lowbit.quantize(weight.cuda(), format="int8"), lowbit.quantize(weight, format="int8")
    assert_same(q.packed, expected.packed)
    assert_same(q.dequantize(), expected.dequantize())


def test_stream_and_graph():
    """Kernels run on torch's current stream, and a CUDA graph can hold them."""
    q = lowbit.quantize(make_weight((1 << 20,), torch.bfloat16).cuda())
    out, expected = torch.zeros(1 << 20, dtype=torch.bfloat16, device="cuda"), q.dequantize()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capture fails on work in another stream
        lowbit.dequantize(q, out=out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_memory_that_is_not_aligned():
    """A slice that starts at any element is read and written all the same."""
    q = lowbit.quantize(make_weight((5000,)).cuda())
    memory = torch.full((5002,), 7.0, device="cuda")
    lowbit.dequantize(q, out=memory[1:-1])
    assert torch.equal(memory[1:-1], q.dequantize()) and memory[0] == memory[-1] == 7
    packed = torch.cat([q.packed.new_zeros(1), q.packed])[1:]
    arguments = (q.absmax, q.group_scales, q.offset, q.spec.text, [5000], torch.float32)
    assert torch.equal(torch.ops.lowbit.dequantize(packed, *arguments), q.dequantize())


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 14336), (33, 192), (17, 513), (16, 96), (7, 64)])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 16, 33, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"format": "fp4", "block_size": 128, "double_quant": False}, {"format": "int8"}]
)
def test_linear(options, dtype, rows, shape):
    """Every path, with LoRA and bias. Tensor cores may cut off what does not fit: twice the error of a rounding."""
    n, k = shape
    q = lowbit.quantize(make_weight(shape).cuda(), **options)
    weight = q.dequantize(torch.float32).double()
    generator = torch.Generator(device="cuda").manual_seed(0)
    sizes = ((rows, k), (n,), (rows, 8), (n, 8))
    x, bias, t, lora_b = (torch.randn(size, generator=generator, device="cuda") for size in sizes)
    x = x.to(dtype)
    y = torch.ops.lowbit.linear(x, *q.operands(), n, bias, t, lora_b, 0.5)
    assert torch.equal(y, torch.ops.lowbit.linear(x, *q.operands(), n, bias, t, lora_b, 0.5))
    exact = x.double() @ weight.T + 0.5 * t.double() @ lora_b.double().T + bias.double()
    magnitude = x.double().abs() @ weight.abs().T + 0.5 * t.double().abs() @ lora_b.double().abs().T
    rounding = max(weight_error_cuda(q.spec.format, dtype), 3.1 * UNIT_ROUNDOFF[dtype] if rows > 8 else 0.0)
    tolerance = product_tolerance(magnitude + bias.double().abs(), exact, 2 * (k + 8), dtype, rounding)
    assert_within(y.cpu(), exact.cpu(), tolerance.cpu())


def captured(work):
    """A CUDA graph of ``work``, which has run before, as torch asks for, on a stream that is not the default one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails on an allocation outside of torch's allocator, on a wait, on another stream
        result = work()
    return graph, result


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantizing_in_a_graph(format):
    """A graph reads its inputs anew at every replay: a pointer or a size kept from the capture would be stale."""
    weight = make_weight((64, 256), torch.bfloat16).cuda()
    spec = lowbit.WeightSpec(format).text

    def work():
        packed, absmax = torch.ops.lowbit.quantize(weight, spec)
        parts = (packed, absmax, None, None)
        if format != "int8":
            offset = absmax.mean()
            parts = (packed, *torch.ops.lowbit.quantize_scales(absmax, offset), offset)
        return torch.ops.lowbit.dequantize(*parts, spec, [64, 256], torch.bfloat16)

    graph, result = captured(work)
    for seed in (1, 2):
        weight.copy_(make_weight((64, 256), torch.bfloat16, seed=seed))
        graph.replay()
        assert torch.equal(result, work())


@pytest.mark.parametrize("rows", [1, 20, 300])
@pytest.mark.parametrize("options", [{}, {"format": "int8"}])
def test_training_in_a_graph(options, rows):
    """A whole step, forward and backward, replayed with other activations and after an update of LoRA's matrices."""
    n, k, rank = 128, 12288, 8
    q = lowbit.quantize(make_weight((n, k), torch.bfloat16).cuda(), **options)
    generator = torch.Generator(device="cuda").manual_seed(0)

    def made(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    x = made(rows, k).bfloat16().requires_grad_()
    lora_a, lora_b = made(rank, k).requires_grad_(), made(n, rank).requires_grad_()
    bias, grad = made(n), made(rows, n).bfloat16()

    def work():
        y = lowbit.lora_linear(x, q, lora_a, lora_b, 2.0, bias)
        return y, lowbit.linear(x.detach(), q), *torch.autograd.grad(y, (x, lora_a, lora_b), grad)

    graph, results = captured(work)
    for _ in range(2):
        with torch.no_grad():
            for tensor in (x, lora_a, lora_b, bias, grad):
                tensor.copy_(made(*tensor.shape))
        graph.replay()
        # Not equal: for a capture cuBLAS may choose other algorithms for LoRA's products. Stale inputs are errors of 1.
        for result, expected in zip(results, work(), strict=True):
            assert (result.float() - expected.float()).norm() <= 0.01 * expected.float().norm()


@pytest.mark.parametrize("rows", [1, 20, 300])
def test_sharing_x_in_a_graph(rows):
    """In a graph q's launch computes t for k and v: each replay anew, from the x and the factors of then."""
    n, k, rank = 128, 1024, 8
    q = lowbit.quantize(make_weight((n, k), torch.bfloat16).cuda())
    generator = torch.Generator(device="cuda").manual_seed(0)

    def made(*shape):
        return torch.nn.Parameter(torch.randn(shape, generator=generator, device="cuda"))

    x = made(rows, k).detach().bfloat16()
    factors = [(made(rank, k), made(n, rank)) for _ in range(3)]

    def work():
        return [lowbit.lora_linear(x, q, *pair, 2.0) for pair in factors]

    with torch.no_grad():
        graph, results = captured(work)
        for _ in range(2):
            for tensor in (x, *(each for pair in factors for each in pair)):
                tensor.copy_(made(*tensor.shape))
            graph.replay()
            for result, expected in zip(results, work(), strict=True):
                assert (result.float() - expected.float()).norm() <= 0.01 * expected.float().norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, torch sees {torch.cuda.device_count()}")
@pytest.mark.parametrize("rows", [1, 20, 300])
def test_on_the_second_gpu(rows):
    """Tensors of another GPU than the current one: a kernel on the wrong one would read memory that it cannot reach."""
    weight, x = make_weight((64, 256), torch.bfloat16), make_weight((rows, 256), torch.bfloat16, 1.0, seed=1)
    results = []
    for device in ("cuda:0", "cuda:1"):
        q = lowbit.quantize(weight.to(device))
        own_x = x.to(device).requires_grad_()
        y = lowbit.linear(own_x, q)
        (grad,) = torch.autograd.grad(y, own_x, torch.ones_like(y))
        assert {tensor.device for tensor in (q.packed, y, grad)} == {torch.device(device)}
        assert torch.cuda.current_device() == 0
        results.append([tensor.cpu() for tensor in (q.packed, q.dequantize(), y, grad)])
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        lowbit.linear(x.to("cuda:0"), lowbit.quantize(weight.to("cuda:1")))


@pytest.mark.parametrize("rows", [1, 300])
def test_linear_in_a_graph(rows):
    """Workspaces come from torch's allocator, which a CUDA graph can hold."""
    q = lowbit.quantize(make_weight((64, 16384), torch.bfloat16).cuda())
    x = torch.randn(rows, 16384, device="cuda", dtype=torch.bfloat16)
    expected = lowbit.linear(x, q)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lowbit.linear(x, q)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_self_test():
    """`python -m lowbit --self-test` would fail on a GPU."""
    results = [problem for name, problem in selftest.run() if name.startswith("CUDA")]
    assert results and all(problem is None for problem in results)
