"""csrc/bindings/cuda.cpp, run on CPU tensors over the stub runtime: the right arguments reach the right kernel.

Only a GPU can prove torch's own device guard, the look-up of its stream, and that the GPU runs the code.
"""

import ctypes
import dataclasses
import functools
import re

import pytest
import torch
from cases import DTYPES, FORMATS, descent_case, make_weight
from conftest_cuda import CSRC, SOURCES, launchers
from cuda_bindings import REFERENCE, assert_same, operands, quantized, run, stub, stub_library, two_gpus

from lowbit.ops.samples import samples


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_op_in_four_bits(format, dtype):
    """A wrong order of two arguments of one type would compile."""
    weight = make_weight((29, 67), dtype)
    spec = f"{format}:64"
    packed, absmax = run("quantize", weight, spec)
    assert_same((packed, absmax), REFERENCE.quantize(weight, spec))
    offset = absmax.mean()
    codes, group_scales = run("quantize_scales", absmax, offset)
    assert_same((codes, group_scales), REFERENCE.quantize_scales(absmax, offset))
    for parts in (
        (packed, absmax, None, None, spec),
        (packed, codes, group_scales, offset, spec + ":double_quant"),
    ):
        expected = REFERENCE.dequantize(*parts, [29, 67], dtype)
        assert_same([run("dequantize", *parts, [29, 67], dtype)], [expected])
        out = torch.zeros(29, 67, dtype=dtype)
        run("dequantize_out", *parts, out)
        assert torch.equal(out, expected)


def test_search_and_encode():
    """importance would be taken by rows instead of columns."""
    weight = make_weight((3, 50))
    importance = torch.rand(50, generator=torch.Generator().manual_seed(0))
    for given in (importance, None):
        scales = run("search_scales", weight, given, "nf4:64")
        assert_same([scales], [REFERENCE.search_scales(weight, given, "nf4:64")])
    assert_same([run("encode", weight, scales, "nf4:64")], [REFERENCE.encode(weight, scales, "nf4:64")])


def test_blocks_of_a_descent():
    """The operands would be taken for each other."""
    weight, hessian, upper, candidates = descent_case(5, 32, 3, 0)
    block = (weight, upper, candidates, "nf4:32")
    expected = REFERENCE.gptq_block(*block)
    assert_same(run("gptq_block", *block), expected)
    block = (expected[0], weight @ hessian, hessian, candidates, 2, "nf4:32")
    assert_same(run("descend_block", *block), REFERENCE.descend_block(*block))


@pytest.mark.parametrize("shape", [(5, 48), (7,), (2, 3, 31)])
def test_int8(shape):
    """Rows would run along another dimension than the last."""
    weight = make_weight(shape)
    codes, absmax = run("quantize", weight, "int8")
    assert_same((codes, absmax), REFERENCE.quantize(weight, "int8"))
    arguments = (codes, absmax, None, None, "int8", list(shape), torch.float16)
    assert_same([run("dequantize", *arguments)], [REFERENCE.dequantize(*arguments)])


def every_binding(dtype, device=0):
    """Every op, on every path that it has for ``dtype``."""
    on = functools.partial(run, device=device)
    weight = make_weight((16, 192), dtype)
    packed, absmax = on("quantize", weight, "nf4:64")
    offset = absmax.mean()
    codes, group_scales = on("quantize_scales", absmax, offset)
    scales = on("search_scales", weight, torch.ones(192), "nf4:64")
    on("encode", weight, scales, "nf4:64")
    columns, matrix = weight[:, :64].float(), torch.eye(64)
    on("gptq_block", columns, matrix, columns[:, :3], "nf4:64")
    on("descend_block", columns, columns, matrix, columns[:, :3], 1, "nf4:64")
    four_bits = (packed, codes, group_scales, offset, "nf4:64:double_quant")
    eight_bits = (*on("quantize", weight, "int8"), None, None, "int8")
    for parts in (four_bits, eight_bits):
        on("dequantize", *parts, [16, 192], dtype)
        on("dequantize_out", *parts, torch.zeros(16, 192, dtype=dtype))
    ragged = quantized((16, 70))
    for parts, k in ((four_bits, 192), (eight_bits, 192), (ragged, 70)):
        for rows in (1, 8, 16, 300):
            x, bias, t, lora_b = operands(rows, 16, k, 4, dtype, dtype)
            on("linear", x, *parts, 16, bias, t, lora_b, 2.0)
            grad, lora_a = torch.ones(rows, 16, dtype=dtype), torch.ones(4, k)
            on("linear_grad_input", grad, *parts, k, t, lora_a)
            _, t = on("lora_linear", x, *parts, 16, bias, lora_a, lora_b, 2.0)
            on("lora_linear_backward", grad, x, t, *parts, lora_a, lora_b, 2.0, True, True, True)
    for op, _, arguments in samples(dtype):
        if op in ("optimizer_step", "sum_of_squares"):
            on(op, *arguments)


def test_nothing_that_a_cuda_graph_cannot_hold():
    """An allocation, a wait or a kernel on another stream would end a capture with an error. (``run`` looks.)

    The list of kernels shows that the calls reach every launcher.
    """
    launchers().launches.clear()
    for dtype in (torch.bfloat16, torch.float32):
        every_binding(dtype)
    parts = quantized((16, 3 * 4096))
    for rows in (1, 16):  # columns shared out over blocks, whose sums meet in a workspace
        run("linear", torch.ones(rows, 3 * 4096, dtype=torch.bfloat16), *parts, 16, None, None, None, 1.0)
    kernels = set()
    for source in (*SOURCES, *(CSRC / "cuda").rglob("*.cuh")):
        kernels |= set(re.findall(r"__global__ void[^;{]*?(\w+_kernel)\(", source.read_text()))
    ran = {name for launch in launchers().launches for name in kernels if f"{len(name)}{name}" in launch.kernel}
    assert len(kernels) >= 15 and ran == kernels


def test_tensors_on_another_gpu_than_the_current_one():
    """Kernels run on the GPU of the tensors, are chosen for it, and the caller's current one is as it was before."""
    with two_gpus("sm_75"):
        launchers().launches.clear()
        every_binding(torch.float16, device=1)
        ran = " ".join(launch.kernel for launch in launchers().launches)
        assert "gemv_fma" in ran and "grad_input_fma" in ran and "mma" not in ran.replace("_fma", "")
        with pytest.raises(RuntimeError, match="packed: expected"):
            stub().linear(
                torch.ones(1, 64), *[torch.zeros(1, dtype=torch.uint8)] * 2, None, None, "nf4:64", 2, *[None] * 3, 1
            )
        assert launchers().current_device == 0


def test_counters_of_a_stream():
    """Kernels that run at the same time would count each other's blocks, and give out sums that are not whole.

    A graph may be replayed on any stream, so that what it counts in must be its own.
    """
    stub()

    def counters(count: int, stream: int) -> int:
        address = stub_library().stub_counters(ctypes.c_int64(count), ctypes.c_void_p(stream))
        assert not any((ctypes.c_uint32 * count).from_address(address))
        return address

    stub_library().stub_counters.restype = ctypes.c_void_p
    first, other = counters(10, 1), counters(10, 2)
    assert counters(4096, 1) == first != other
    more = counters(5000, 1)
    assert more != first and counters(10, 1) == more and counters(10, 2) == other
    launchers().set_capturing(True)
    try:
        graphs = {counters(10, 1), counters(10, 1)}
    finally:
        launchers().set_capturing(False)
    assert len(graphs) == 2 and more not in graphs and counters(10, 1) == more


@pytest.mark.parametrize("op", ["linear", "linear_grad_input"])
def test_a_refused_launch_is_an_error_once(op):
    """The op that failed says so; an error left in the runtime would be raised by the next one, of torch or of ours."""
    device = launchers().device
    parts = (*quantized((64, 64)), 64)
    arguments = (torch.ones(20, 64, dtype=torch.bfloat16), *parts, *([None] * 3 + [1.0] if op == "linear" else []))
    launchers().device = dataclasses.replace(device, shared_per_block_opt_in=48 << 10)
    try:
        with pytest.raises(
            RuntimeError, match=f"{op}: CUDA error 1, invalid argument.*compiled for the architectures 800"
        ):
            getattr(stub(), op)(*arguments)
    finally:
        launchers().device = device
    run("dequantize", *parts[:-1], [64, 64], torch.float32)  # asks for no shared memory
    run(op, *arguments)


def test_empty_weights():
    """An op with nothing to do would launch an empty grid, which CUDA refuses."""
    for spec in ("nf4:64", "int8"):
        packed, absmax = stub().quantize(torch.empty(4, 0), spec)
        assert packed.numel() == 0
        arguments = (packed, absmax, None, None, spec, [4, 0], torch.float32)
        assert stub().dequantize(*arguments).shape == (4, 0)
    stub().quantize_scales(torch.empty(0), torch.zeros(()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(9, dtype=torch.uint8)}, "packed: expected 1000 elements, got 9"),
        ({1: torch.zeros(32)}, "absmax: expected dtype uint8, got float32"),
        ({1: torch.zeros(31, dtype=torch.uint8)}, "absmax: expected 32 elements, got 31"),
        ({2: None}, "group_scales, offset: expected both for nf4:64:double_quant, got one"),
        ({2: None, 3: None}, "group_scales, offset: expected both for nf4:64:double_quant, got neither"),
        ({2: torch.zeros(2)}, "group_scales: expected 1 elements, got 2"),
        ({3: torch.zeros(2)}, "offset: expected 1 elements, got 2"),
        ({4: "nf5:64"}, "spec: expected nf4, fp4 or int8 as its format, got nf5:64"),
        ({4: "nf"}, "spec: expected nf4, fp4 or int8 as its format, got nf"),
        ({4: "nf4:48"}, "spec: expected a block size that is a power of two from 32 to 4096, got nf4:48"),
        ({4: "nf4"}, "spec: expected format:block_size or format:block_size:double_quant, got nf4"),
        ({4: "nf4:x"}, "spec: expected format:block_size or format:block_size:double_quant, got nf4:x"),
        ({4: "nf4:64:"}, "spec: expected format:block_size or format:block_size:double_quant, got nf4:64:"),
        ({4: "nf4:64:double"}, "spec: expected format:block_size or format:block_size:double_quant, got nf4:64:double"),
        ({4: "int8:64"}, "spec: expected int8 alone, which has a scale for each row, got int8:64"),
        ({4: "nf4:64"}, "absmax: expected dtype float32, got uint8"),
        ({4: "int8"}, "packed: expected 2000 elements, got 1000"),
        ({5: [2**40, 2**40]}, "shape: expected sizes whose product fits 63 bits"),
        ({6: torch.float64}, "dtype: expected dtype float32, float16 or bfloat16, got float64"),
    ],
)
def test_wrong_calls_raise(change, message):
    """A wrong call must not reach a kernel, which would leave its buffers."""
    packed, codes = torch.zeros(1000, dtype=torch.uint8), torch.zeros(32, dtype=torch.uint8)
    arguments = [packed, codes, torch.zeros(1), torch.zeros(()), "nf4:64:double_quant", [40, 50], torch.float32]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        stub().dequantize(*arguments)
