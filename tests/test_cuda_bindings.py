"""csrc/bindings_cuda.cpp, run on CPU tensors over the stub runtime: the right arguments reach the right kernel.

tests/cuda/stub_bindings.cpp registers the ops of the CUDA bindings as ``torch.ops.lowbit_stub``. What a GPU would have
to show is not proved here: torch's own device guard, the look-up of its stream, and that the GPU runs the code.
"""

import contextlib
import ctypes
import dataclasses
import functools
import re

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    FORMATS,
    UNIT_ROUNDOFF,
    CalledOps,
    assert_within,
    make_weight,
    product_tolerance,
    tensor_core_tolerance,
    weight_error_cuda,
)
from conftest_cuda import CSRC, SOURCES, emulator, launchers, stub_bindings

from lowbit import ops

STREAM = 0x5EED  # torch's current stream of device 0, says the stub; the next device's is one further
REFERENCE = torch.ops.lowbit_reference
alive = []  # memory that the emulator knows must not be given to another tensor


def know_allocation(address: int, size: int, filled: bool) -> None:
    """What an op allocates: the emulator lets kernels write it, and nobody read it before, unless torch filled it."""
    if size:
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        launchers().know(memory if filled else emulator("address_space").Uninitialized(memory))


CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool)(know_allocation)


@functools.cache
def stub_library():
    """tests/cuda/stub_bindings.cpp, loaded by ctypes."""
    return ctypes.CDLL(str(stub_bindings()))


@functools.cache
def stub():
    """``torch.ops.lowbit_stub``: compiled, loaded, and told of the emulator."""
    definitions = torch.library.Library("lowbit_stub", "DEF")
    for schema in ops.SCHEMAS:
        definitions.define(schema)
    alive.append(definitions)
    torch.ops.load_library(str(stub_bindings()))
    stub_library().stub_set_callback_of_bindings(CALLBACK)
    return torch.ops.lowbit_stub


def run(op: str, *args, device: int = 0):
    """An op of the CUDA bindings, its tensors on ``device``.

    All that it asks of the CUDA runtime is to launch kernels there, on torch's current stream: no allocation, no wait.
    """
    op, library = getattr(stub(), op), launchers()
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    for tensor in tensors:
        library.know(tensor)
    earlier = len(library.launches)
    library.runtime_calls.clear()
    result = op(*args)
    alive.extend((tensors, result))
    assert {(launch.device, launch.stream) for launch in library.launches[earlier:]} == {(device, STREAM + device)}
    assert not library.runtime_calls
    assert library.current_device == 0
    return result


@contextlib.contextmanager
def two_gpus(arch: str):
    """Tensors are on the second of two GPUs, which is of another architecture; the first is the current one."""
    library = launchers()
    library.set_device_count(2)
    library.other_devices = {1: emulator("device").Device.for_arch(arch)}
    stub_library().stub_set_device_of_tensors(1)
    try:
        yield
    finally:
        stub_library().stub_set_device_of_tensors(0)
        library.other_devices = {}
        library.set_device_count(1)


def assert_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype and torch.equal(our, their)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_op_in_four_bits(format, dtype):
    """A wrong order of two arguments of one type would compile."""
    weight = make_weight((29, 67), dtype)
    packed, absmax = run("quantize", weight, format, 64)
    assert_same((packed, absmax), REFERENCE.quantize(weight, format, 64))
    offset = absmax.mean()
    codes, group_scales = run("quantize_scales", absmax, offset)
    assert_same((codes, group_scales), REFERENCE.quantize_scales(absmax, offset))
    for scales in ((absmax, None, None), (codes, group_scales, offset)):
        expected = REFERENCE.dequantize(packed, *scales, format, 64, [29, 67], dtype)
        assert_same([run("dequantize", packed, *scales, format, 64, [29, 67], dtype)], [expected])
        out = torch.zeros(29, 67, dtype=dtype)
        run("dequantize_out", packed, *scales, format, 64, out)
        assert torch.equal(out, expected)


def test_search_and_encode():
    """importance belongs to columns, not to rows."""
    weight = make_weight((3, 50))
    importance = torch.rand(50, generator=torch.Generator().manual_seed(0))
    for given in (importance, None):
        scales = run("search_scales", weight, given, "nf4", 64)
        assert_same([scales], [REFERENCE.search_scales(weight, given, "nf4", 64)])
    assert_same([run("encode", weight, scales, "nf4", 64)], [REFERENCE.encode(weight, scales, "nf4", 64)])


@pytest.mark.parametrize("shape", [(5, 48), (7,), (2, 3, 31)])
def test_int8(shape):
    """Rows run along the last dimension."""
    weight = make_weight(shape)
    codes, absmax = run("quantize", weight, "int8", shape[-1])
    assert_same((codes, absmax), REFERENCE.quantize(weight, "int8", shape[-1]))
    arguments = (codes, absmax, None, None, "int8", shape[-1], list(shape), torch.float16)
    assert_same([run("dequantize", *arguments)], [REFERENCE.dequantize(*arguments)])


def operands(rows, n, k, rank, dtype, lora_dtype, leading=()):
    generator = torch.Generator().manual_seed(rows)
    made = [torch.randn(shape, generator=generator) for shape in ((*leading, rows, k), (n,), (rows, rank), (n, rank))]
    return [tensor.to(dtype if i < 2 else lora_dtype) for i, tensor in enumerate(made)]


def check_linear(
    rows,
    n,
    k,
    dtype,
    format="nf4",
    lora_dtype=torch.float32,
    bias=True,
    rank=8,
    double_quant=True,
    scaling=0.7,
    sizes=None,
):
    """``linear`` against fp64 arithmetic; returns the kernel that ran last. sizes: of t's and lora_b's elements."""
    block_size = k if format == "int8" else 64
    packed, absmax = REFERENCE.quantize(make_weight((n, k)), format, block_size)
    weight = [packed, absmax, None, None, format, block_size]
    if double_quant and format != "int8":
        offset = absmax.mean()
        weight[1:4] = *REFERENCE.quantize_scales(absmax, offset), offset
    x, bias_values, t, lora_b = operands(rows, n, k, rank, dtype, lora_dtype)
    if sizes:
        t, lora_b = t * sizes[0], lora_b * sizes[1]
    lora = (t if rank else None, lora_b if rank else None, scaling)
    y = run("linear", x, *weight, n, bias_values if bias else None, *lora)
    assert y.dtype == dtype and y.shape == (rows, n)

    w, x, t, lora_b = (a.double() for a in (REFERENCE.dequantize(*weight, [n, k], torch.float32), x, t, lora_b))
    exact = x @ w.T + scaling * t @ lora_b.T
    magnitude = x.abs() @ w.abs().T + abs(scaling) * t.abs() @ lora_b.abs().T
    if bias:
        exact, magnitude = exact + bias_values.double(), magnitude + bias_values.double().abs()
    kernel = launchers().launches[-1].kernel
    # Decoded for torch's product, weights are rounded to x's dtype, LoRA's two factors too, and so is its product,
    # with the bias in it: three roundings at most to any term (and one to bias).
    rounding = 3.1 * UNIT_ROUNDOFF[dtype] if "dequantize" in kernel else weight_error_cuda(format, dtype)
    assert_within(y, exact, product_tolerance(magnitude, exact, k + rank, dtype, rounding))
    return kernel


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype, lora_dtype, bias):
    """Few rows go to gemv, more to gemm, many to torch's product of the decoded weight; LoRA comes in its own dtype."""
    assert "gemv" in check_linear(3, 24, 128, dtype, lora_dtype=lora_dtype, bias=bias)
    if dtype != torch.float32:
        assert "gemm" in check_linear(20, 24, 128, dtype, lora_dtype=lora_dtype, bias=bias)
    assert "dequantize" in check_linear(260, 24, 128, dtype, lora_dtype=lora_dtype, bias=bias)


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scaling", [64.0, -64.0, 2.0**-10])
def test_lora_in_the_range_of_fp16(scaling, lora_dtype):
    """scaling t may pass 65504 where its product with a small lora_b does not: the output would be inf. And scaling
    lora_b may be so small that fp16 has few bits for it."""
    for rows, kernel in ((3, "gemv"), (20, "gemm"), (260, "dequantize")):
        lora = {"lora_dtype": lora_dtype, "scaling": scaling, "sizes": (4000, 1e-3)}
        assert kernel in check_linear(rows, 24, 128, torch.float16, **lora)


@pytest.mark.parametrize("size", [1e5, 1e7])
@pytest.mark.parametrize("scaling", [0.7, 16.0])
def test_t_beyond_the_range_of_fp16(scaling, size):
    """t is fp32, and where its product with a small lora_b is an fp16, an infinite output would end the training."""
    for rows, k, kernel in ((3, 128, "gemv"), (20, 128, "gemm"), (260, 128, "dequantize"), (20, 70, "dequantize")):
        assert kernel in check_linear(rows, 24, k, torch.float16, scaling=scaling, sizes=(size, 30 / size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_linear_without_lora(double_quant, dtype):
    """Every optional argument left out, on both sides of each threshold."""
    ways = ("gemv", 16, "dequantize", 17) if dtype == torch.float32 else ("gemv", 8, "gemm", 256, "dequantize", 257)
    for name, most in zip(ways[::2], ways[1::2], strict=True):
        assert name in check_linear(most, 16, 64, dtype, bias=False, rank=0, double_quant=double_quant)
        if name != "dequantize":
            assert name not in check_linear(most + 1, 16, 64, dtype, bias=False, rank=0, double_quant=double_quant)


def test_linear_whose_shape_gemm_does_not_take():
    """A ragged in_features goes to torch's product instead, not to a kernel that would misread it."""
    assert "dequantize" in check_linear(12, 16, 70, torch.bfloat16)
    assert "gemm" in check_linear(12, 16, 96, torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 7, 20])
def test_linear_int8(rows):
    """Codes of one byte, a scale per row."""
    assert ("gemv_int8" if rows < 17 else "dequantize_int8") in check_linear(rows, 20, 96, torch.float16, "int8")


def test_linear_workspace():
    """Sums that several blocks share need memory, and it comes from torch."""
    assert "gemv_sum" in check_linear(2, 16, 3 * 4096, torch.bfloat16)


def test_linear_shapes():
    """Leading dimensions are kept; no rows, no outputs and no columns are no launch of an empty grid."""
    weight = make_weight((16, 64))
    parts = (*REFERENCE.quantize(weight, "nf4", 64), None, None, "nf4", 64)
    for rows in (5, 20):
        x, bias, _, _ = operands(rows, 16, 64, 0, torch.float32, torch.float32, leading=(2, 3))
        y = run("linear", x, *parts, 16, bias, None, None, 1.0)
        assert y.shape == (2, 3, rows, 16)
        torch.testing.assert_close(y, REFERENCE.linear(x, *parts, 16, bias, None, None, 1.0))
    assert stub().linear(torch.zeros(0, 64), *parts, 16, None, None, None, 1.0).shape == (0, 16)
    nothing = (torch.zeros(0, dtype=torch.uint8), torch.zeros(0), None, None, "nf4", 64)
    assert stub().linear(torch.zeros(3, 64), *nothing, 0, None, None, None, 1.0).shape == (3, 0)
    bias = torch.arange(4.0)
    assert torch.equal(run("linear", torch.zeros(3, 0), *nothing, 4, bias, None, None, 1.0), bias.expand(3, 4))
    assert torch.equal(stub().linear(torch.zeros(30, 0), *nothing, 4, bias, None, None, 1.0), bias.expand(30, 4))


def assert_grad_input_is_right(out, grad, parts, k, grad_t=None, lora_a=None):
    """linear_grad_input's output by whatever way it took."""
    assert out.dtype == grad.dtype and out.shape == (*grad.shape[:-1], k)
    weight = REFERENCE.dequantize(*parts, [grad.shape[-1], k], torch.float32).double()
    exact, magnitude = grad.double() @ weight, grad.double().abs() @ weight.abs()
    operand = grad.double().abs().sum(-1, keepdim=True)
    terms, lora_rounding = grad.shape[-1], 0.0
    if grad_t is not None:
        lora = grad_t.double().abs() @ lora_a.double().abs()
        exact, magnitude = exact + grad_t.double() @ lora_a.double(), magnitude + lora
        terms += grad_t.shape[-1]
        # For torch's products both factors of LoRA are rounded to grad's dtype, and so is their product.
        lora_rounding = 3.1 * UNIT_ROUNDOFF[grad.dtype] * lora
    assert_within(out, exact, tensor_core_tolerance(magnitude, exact, terms, grad.dtype, operand) + lora_rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", (*FORMATS, "int8"))
def test_linear_grad_input(format, dtype):
    """Few rows go to the kernels, many to dequantize and a dense product; rows may have leading dimensions."""
    n, k = 40, 96
    block_size = k if format == "int8" else 32
    packed, absmax = REFERENCE.quantize(make_weight((n, k)), format, block_size)
    parts = (packed, absmax, None, None, format, block_size)
    if format != "int8":
        offset = absmax.mean()
        parts = (packed, *REFERENCE.quantize_scales(absmax, offset), offset, format, block_size)
    rows = torch.randn(250, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    for grad, kernels in (
        (rows[0].clone(), 2),
        (rows[:6].clone().view(2, 3, n), 2),
        (rows[:0].clone(), 0),
        (rows.clone(), 1),
        (rows.clone().view(5, 50, n), 1),
    ):
        launchers().launches.clear()
        op = functools.partial(run, "linear_grad_input") if kernels else stub().linear_grad_input
        out = op(grad, *parts, k)
        assert len(launchers().launches) == kernels
        assert_grad_input_is_right(out, grad, parts, k)
    assert "dequantize" in launchers().launches[-1].kernel


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_grad_input_with_lora(dtype, lora_dtype):
    """The gradient through A is part of the product, whichever way that goes; LoRA comes in its own dtype."""
    n, k, rank = 40, 96, 5
    packed, absmax = REFERENCE.quantize(make_weight((n, k)), "nf4", 32)
    parts = (packed, absmax, None, None, "nf4", 32)
    generator = torch.Generator().manual_seed(0)
    lora_a = torch.randn(rank, k, generator=generator).to(lora_dtype)
    for rows, name in ((3, "grad_input"), (250, "dequantize")):
        grad = torch.randn(rows, n, generator=generator).to(dtype)
        grad_t = torch.randn(rows, rank, generator=generator).to(lora_dtype)
        out = run("linear_grad_input", grad, *parts, k, grad_t, lora_a)
        assert name in launchers().launches[-1].kernel
        assert_grad_input_is_right(out, grad, parts, k, grad_t, lora_a)


@pytest.mark.parametrize("size", [1e5, 1e7])
def test_grad_t_beyond_the_range_of_fp16(size):
    """grad_t holds scaling times the loss scale: with it rounded to inf, every step would be skipped."""
    parts = (*REFERENCE.quantize(make_weight((40, 96)), "nf4", 32), None, None, "nf4", 32)
    generator = torch.Generator().manual_seed(0)
    lora_a = torch.randn(5, 96, generator=generator) * 30 / size
    for rows, name in ((3, "grad_input"), (250, "dequantize")):
        grad = torch.randn(rows, 40, generator=generator).half()
        grad_t = torch.randn(rows, 5, generator=generator) * size
        out = run("linear_grad_input", grad, *parts, 96, grad_t, lora_a)
        assert name in launchers().launches[-1].kernel
        assert_grad_input_is_right(out, grad, parts, 96, grad_t, lora_a)


@pytest.mark.parametrize(("bad", "size"), [(float("inf"), 4.0), (float("nan"), 1e5), (1e30, 4.0)])
def test_rows_of_fp16_are_apart(bad, size):
    """A row that went wrong, or far out of range, must not spoil those of other sequences in the batch."""
    parts = (*REFERENCE.quantize(make_weight((16, 64)), "nf4", 64), None, None, "nf4", 64)
    x, _, t, lora_b = operands(300, 16, 64, 4, torch.float16, torch.float32)
    grad, _, _, lora_a = operands(300, 64, 16, 4, torch.float16, torch.float32)
    t *= size
    t[1, 0] = bad
    forward = (x, *parts, 16, None, t, lora_b / size, 0.7)
    backward = (grad, *parts, 64, t, lora_a.T.contiguous() / size)
    for op, arguments in (("linear", forward), ("linear_grad_input", backward)):
        out = run(op, *arguments)
        assert "dequantize" in launchers().launches[-1].kernel
        assert not out[1].isfinite().any() and out[0].isfinite().all() and out[2:].isfinite().all()
        torch.testing.assert_close(out, getattr(REFERENCE, op)(*arguments), rtol=2e-3, atol=0.03, equal_nan=True)


@pytest.mark.parametrize("lora_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_launch_for_both_factors(dtype, lora_dtype):
    """A chain of torch's ops, of two microseconds each, took as long as the product of a batch of 512 rows."""
    parts = (*REFERENCE.quantize(make_weight((16, 64)), "nf4", 64), None, None, "nf4", 64)
    x, _, t, lora_b = operands(300, 16, 64, 4, dtype, lora_dtype)
    grad, _, _, lora_a = operands(300, 64, 16, 4, dtype, lora_dtype)
    for op, arguments in (
        ("linear", (x, *parts, 16, None, t, lora_b, 0.7)),
        ("linear_grad_input", (grad, *parts, 64, t, lora_a.T.contiguous())),
    ):
        launchers().launches.clear()
        with CalledOps(into="lowbit_stub") as called:
            run(op, *arguments)
        kernels = [launch.kernel for launch in launchers().launches]
        is_right = op == "linear_grad_input" and dtype == lora_dtype == torch.bfloat16
        assert sum("rounded_factors" in kernel for kernel in kernels) == (not is_right)
        assert "dequantize" in kernels[-1] and len(kernels) == 2 - is_right
        names = {name.partition(".")[0] for name in called.names}
        assert "aten::linear" in names
        assert not names & {
            f"aten::{name}" for name in ("mul", "div", "sub", "abs", "amax", "clamp", "fill_", "_to_copy")
        }


@pytest.mark.parametrize(
    ("dtype", "capability", "most"),
    [
        (torch.bfloat16, (9, 0), 192),
        (torch.bfloat16, (10, 0), 96),
        (torch.bfloat16, (7, 5), 16),
        (torch.float32, (9, 0), 48),
    ],
)
def test_rows_from_which_the_weight_is_decoded(dtype, capability, most):
    """The threshold follows from the arithmetic in grad_input.cu; one tile more takes the other way."""
    device = launchers().device
    launchers().device = dataclasses.replace(device, compute_capability=capability)
    parts = (*REFERENCE.quantize(make_weight((8, 64)), "nf4", 64), None, None, "nf4", 64)
    try:
        for rows, name in ((most, "grad_input_finish"), (most + 1, "dequantize")):
            out = run("linear_grad_input", torch.ones(rows, 8, dtype=dtype), *parts, 64)
            assert name in launchers().launches[-1].kernel
            assert_grad_input_is_right(out, torch.ones(rows, 8, dtype=dtype), parts, 64)
    finally:
        launchers().device = device


def every_binding(dtype, device=0):
    """Every op, on every path that it has for ``dtype``."""
    on = functools.partial(run, device=device)
    weight = make_weight((16, 192), dtype)
    packed, absmax = on("quantize", weight, "nf4", 64)
    offset = absmax.mean()
    codes, group_scales = on("quantize_scales", absmax, offset)
    scales = on("search_scales", weight, torch.ones(192), "nf4", 64)
    on("encode", weight, scales, "nf4", 64)
    four_bits = (packed, codes, group_scales, offset, "nf4", 64)
    eight_bits = (*on("quantize", weight, "int8", 192), None, None, "int8", 192)
    for parts in (four_bits, eight_bits):
        on("dequantize", *parts, [16, 192], dtype)
        on("dequantize_out", *parts, torch.zeros(16, 192, dtype=dtype))
    ragged = (*REFERENCE.quantize(make_weight((16, 70)), "nf4", 64), None, None, "nf4", 64)
    for parts, k in ((four_bits, 192), (eight_bits, 192), (ragged, 70)):
        for rows in (1, 8, 16, 300):
            x, bias, t, lora_b = operands(rows, 16, k, 4, dtype, dtype)
            on("linear", x, *parts, 16, bias, t, lora_b, 2.0)
            on("linear_grad_input", torch.ones(rows, 16, dtype=dtype), *parts, k, t, torch.ones(4, k))


def test_nothing_that_a_cuda_graph_cannot_hold():
    """An allocation, a wait or a kernel on another stream would end a capture with an error. (``run`` looks.)

    So would one in a kernel's launcher that no call here reaches: they all are, says the list of kernels.
    """
    launchers().launches.clear()
    for dtype in (torch.bfloat16, torch.float32):
        every_binding(dtype)
    parts = (*REFERENCE.quantize(make_weight((16, 3 * 4096)), "nf4", 64), None, None, "nf4", 64)
    for rows in (1, 16):  # columns shared out over blocks, whose sums meet in a workspace
        run("linear", torch.ones(rows, 3 * 4096, dtype=torch.bfloat16), *parts, 16, None, None, None, 1.0)
    kernels = set()
    for source in (*SOURCES, *(CSRC / "cuda").glob("*.cuh")):
        kernels |= set(re.findall(r"__global__ void[^;{]*?(\w+_kernel)\(", source.read_text()))
    ran = {name for launch in launchers().launches for name in kernels if f"{len(name)}{name}" in launch.kernel}
    assert len(kernels) >= 16 and ran == kernels


def test_tensors_on_another_gpu_than_the_current_one():
    """Kernels run on the GPU of the tensors, are chosen for it, and the caller's current one is as it was before."""
    with two_gpus("sm_75"):
        launchers().launches.clear()
        every_binding(torch.float16, device=1)
        ran = " ".join(launch.kernel for launch in launchers().launches)
        assert "gemv_fma" in ran and "grad_input_fma" in ran and "mma" not in ran.replace("_fma", "")
        with pytest.raises(RuntimeError, match="packed: expected"):
            stub().linear(
                torch.ones(1, 64), *[torch.zeros(1, dtype=torch.uint8)] * 2, None, None, "nf4", 64, 2, *[None] * 3, 1
            )
        assert launchers().current_device == 0


@pytest.mark.parametrize("op", ["linear", "linear_grad_input"])
def test_a_refused_launch_is_an_error_once(op):
    """The op that failed says so; an error left in the runtime would be raised by the next one, of torch or of ours."""
    device = launchers().device
    parts = (*REFERENCE.quantize(make_weight((64, 64)), "nf4", 64), None, None, "nf4", 64, 64)
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


def test_linear_grad_input_under_autocast():
    """Autocast would multiply an fp32 grad in bf16."""
    parts = (*REFERENCE.quantize(make_weight((8, 64)), "nf4", 64), None, None, "nf4", 64)
    grad = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        out = run("linear_grad_input", grad, *parts, 64)
    assert "dequantize" in launchers().launches[-1].kernel
    assert_grad_input_is_right(out, grad, parts, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 64, dtype=torch.float64)}, "x: expected dtype float32, float16 or bfloat16, got float64"),
        ({0: torch.zeros(())}, "x: expected at least 1 dimension"),
        ({0: torch.zeros(3, 128)}, "packed: expected 1024 elements, got 512"),
        ({7: -1}, "out_features: expected at least 0, got -1"),
        ({8: torch.zeros(15)}, "bias: expected 16 elements, got 15"),
        ({9: None}, "t, lora_b: expected both"),
        ({9: torch.zeros(2, 4)}, "t: expected 12 elements, got 8"),
        ({10: torch.zeros(16, 3)}, "lora_b: expected 64 elements, got 48"),
    ],
)
def test_wrong_linear_calls_raise(change, message):
    """A wrong call must not reach a kernel, which would leave its buffers."""
    parts = [torch.zeros(512, dtype=torch.uint8), torch.zeros(16), None, None, "nf4", 64]
    arguments = [torch.zeros(3, 64), *parts, 16, torch.zeros(16), torch.zeros(3, 4), torch.zeros(16, 4), 1.0]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        stub().linear(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.ones(())}, "grad: expected at least 1 dimension, got a scalar"),
        ({0: torch.ones(3, 40, dtype=torch.float64)}, "grad: expected dtype float32, float16 or bfloat16, got float64"),
        ({0: torch.ones(3, 41)}, "packed: expected 1025 elements, got 1000"),
        ({1: torch.zeros(9, dtype=torch.uint8)}, "packed: expected 1000 elements, got 9"),
        ({2: torch.zeros(31)}, "absmax: expected 32 elements, got 31"),
        ({3: torch.zeros(1)}, "group_scales, offset: expected both"),
        ({6: 48}, "block_size: expected a power of two"),
        ({8: torch.zeros(3, 2)}, "grad_t, lora_a: expected both"),
        ({8: torch.zeros(3, 2), 9: torch.zeros(2, 49)}, "lora_a: expected 100 elements, got 98"),
        ({8: torch.zeros(4, 2), 9: torch.zeros(2, 50)}, "grad_t: expected 6 elements, got 8"),
        ({7: -1}, "in_features: expected at least 0, got -1"),
        ({7: 2**62}, "in_features: expected sizes whose product fits 63 bits"),
    ],
)
def test_wrong_calls_of_linear_grad_input_raise(change, message):
    """A wrong call must not reach a kernel, which would leave its buffers."""
    arguments = [torch.ones(3, 40), torch.zeros(1000, dtype=torch.uint8), torch.zeros(32), None, None, "nf4", 64, 50]
    arguments += [None, None]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        stub().linear_grad_input(*arguments)


def test_empty_weights():
    """Nothing to do is not a launch of an empty grid, which CUDA refuses."""
    for format, block_size in (("nf4", 64), ("int8", 0)):
        packed, absmax = stub().quantize(torch.empty(4, 0), format, block_size)
        assert packed.numel() == 0
        arguments = (packed, absmax, None, None, format, block_size, [4, 0], torch.float32)
        assert stub().dequantize(*arguments).shape == (4, 0)
    stub().quantize_scales(torch.empty(0), torch.zeros(()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(9, dtype=torch.uint8)}, "packed: expected 1000 elements, got 9"),
        ({1: torch.zeros(32)}, "absmax: expected dtype uint8, got float32"),
        ({1: torch.zeros(31, dtype=torch.uint8)}, "absmax: expected 32 elements, got 31"),
        ({2: None}, "group_scales, offset: expected both"),
        ({2: torch.zeros(2)}, "group_scales: expected 1 elements, got 2"),
        ({3: torch.zeros(2)}, "offset: expected 1 elements, got 2"),
        ({4: "nf5"}, "format: expected nf4, fp4 or int8, got nf5"),
        ({5: 48}, "block_size: expected a power of two"),
        ({6: [2**40, 2**40]}, "shape: expected sizes whose product fits 63 bits"),
        ({7: torch.float64}, "dtype: expected dtype float32, float16 or bfloat16, got float64"),
    ],
)
def test_wrong_calls_raise(change, message):
    """A wrong call must not reach a kernel, which would leave its buffers."""
    packed, codes = torch.zeros(1000, dtype=torch.uint8), torch.zeros(32, dtype=torch.uint8)
    arguments = [packed, codes, torch.zeros(1), torch.zeros(()), "nf4", 64, [40, 50], torch.float32]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        stub().dequantize(*arguments)
