"""The products of csrc/bindings/cuda.cpp: each number of rows takes its planned way, with LoRA and bias."""

import contextlib
import dataclasses
import functools

import pytest
import torch
from cases import DTYPES, FORMATS
from conftest_cuda import launchers
from cuda_bindings import REFERENCE, assert_grad_input_is_right, check_linear, operands, quantized, run, stub


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype, lora_dtype, bias):
    """Few rows go to gemv, more to gemm, many to torch's product of the decoded weight; LoRA comes in its own dtype."""
    assert "gemv" in check_linear(3, 24, 128, dtype, lora_dtype=lora_dtype, bias=bias)
    if dtype != torch.float32:
        assert "gemm" in check_linear(20, 24, 128, dtype, lora_dtype=lora_dtype, bias=bias)
    assert "dequantize" in check_linear(260, 24, 128, dtype, lora_dtype=lora_dtype, bias=bias)


@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_linear_with_a_bias_of_another_dtype(bias_dtype):
    """A bias is read in its own dtype: every kernel, and torch's product, would add other numbers."""
    for rows, k, format in ((3, 128, "nf4"), (3, 70, "nf4"), (20, 128, "nf4"), (3, 96, "int8"), (260, 128, "nf4")):
        check_linear(rows, 24, k, torch.bfloat16, format, bias_dtype=bias_dtype)
    check_linear(260, 24, 128, torch.bfloat16, rank=0, bias_dtype=bias_dtype)


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scaling", [64.0, -64.0, 2.0**-10])
def test_lora_in_the_range_of_fp16(scaling, lora_dtype):
    """scaling * t may pass 65504 where its product with a small lora_b does not: the output would be inf.

    scaling * lora_b may be so small that fp16 has few bits for it.
    """
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
    """A missing optional argument would be read, on one side or the other of each threshold."""
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
    """Codes of one byte, or scales of rows, would be read as those of 4 bits."""
    assert ("gemv_int8" if rows < 17 else "dequantize_int8") in check_linear(rows, 20, 96, torch.float16, "int8")


def test_linear_workspace():
    """The memory for sums that several blocks share would not come from torch."""
    assert "gemv" in check_linear(2, 16, 3 * 4096, torch.bfloat16)
    assert launchers().launches[-1].grid[1] > 1


def test_linear_shapes():
    """Leading dimensions are kept; no rows, no outputs and no columns are no launch of an empty grid."""
    parts = quantized((16, 64))
    for rows in (5, 20):
        x, bias, _, _ = operands(rows, 16, 64, 0, torch.float32, torch.float32, leading=(2, 3))
        y = run("linear", x, *parts, 16, bias, None, None, 1.0)
        assert y.shape == (2, 3, rows, 16)
        torch.testing.assert_close(y, REFERENCE.linear(x, *parts, 16, bias, None, None, 1.0))
    assert stub().linear(torch.zeros(0, 64), *parts, 16, None, None, None, 1.0).shape == (0, 16)
    nothing = (torch.zeros(0, dtype=torch.uint8), torch.zeros(0), None, None, "nf4:64")
    assert stub().linear(torch.zeros(3, 64), *nothing, 0, None, None, None, 1.0).shape == (3, 0)
    bias = torch.arange(4.0)
    assert torch.equal(run("linear", torch.zeros(3, 0), *nothing, 4, bias, None, None, 1.0), bias.expand(3, 4))
    assert torch.equal(stub().linear(torch.zeros(30, 0), *nothing, 4, bias, None, None, 1.0), bias.expand(30, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", (*FORMATS, "int8"))
def test_linear_grad_input(format, dtype):
    """Few rows go to the kernels, many to dequantize and a dense product; rows may have leading dimensions."""
    n, k = 40, 96
    parts = quantized((n, k), format, 32, double_quant=True)
    rows = torch.randn(250, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    for grad, kernels in (
        (rows[0].clone(), 1),
        (rows[:6].clone().view(2, 3, n), 1),
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
    parts = quantized((n, k), block_size=32)
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
    parts = quantized((40, 96), block_size=32)
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
    parts = quantized((16, 64))
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
        expected = getattr(REFERENCE, op)(*arguments)
        apart = torch.arange(300) != 1  # of which the kernels make NaN where the reference has an infinity
        torch.testing.assert_close(out[apart], expected[apart], rtol=2e-3, atol=0.03)


@contextlib.contextmanager
def small_gpu():
    """Context with a GPU for which a weight of some KB is large, and which a single tile of a product fills."""
    device = launchers().device
    launchers().device = dataclasses.replace(device, sm_count=1, l2_cache=64 << 10)
    try:
        yield
    finally:
        launchers().device = device


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize(("bias", "rank"), [(False, 0), (True, 0), (True, 8)])
def test_a_large_weight_is_decoded_in_chunks(bias, rank, format):
    """A chunk with another's scales, or written into another's columns, is a wrong layer."""
    with small_gpu():
        launchers().launches.clear()
        assert "dequantize" in check_linear(260, 600, 64, torch.bfloat16, format, bias=bias, rank=rank)
        assert sum("dequantize" in launch.kernel for launch in launchers().launches) == 3


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_weight_is_decoded_in_chunks_of_columns(dtype, rank, format):
    """The gradients of some inputs would come from others' columns, or miss LoRA's part."""
    n, k, rows = 40, 1100 if format == "int8" else 1088, 260
    parts = quantized((n, k), format, double_quant=True)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(rows, n, generator=generator).to(dtype)
    grad_t, lora_a = torch.randn(rows, rank, generator=generator), torch.randn(rank, k, generator=generator)
    with small_gpu():
        launchers().launches.clear()
        out = run("linear_grad_input", grad, *parts, k, *((grad_t, lora_a) if rank else ()))
        assert sum("dequantize" in launch.kernel for launch in launchers().launches) == 5
    assert_grad_input_is_right(out, grad, parts, k, *((grad_t, lora_a) if rank else ()))


def test_a_large_weight_whose_columns_are_not_whole_blocks():
    """Blocks that cross rows have no window of columns: such a weight is decoded whole."""
    parts = quantized((600, 1090), double_quant=True)
    grad = torch.randn(260, 600, generator=torch.Generator().manual_seed(0)).bfloat16()
    with small_gpu():
        launchers().launches.clear()
        out = run("linear_grad_input", grad, *parts, 1090)
        assert len(launchers().launches) == 1
    assert_grad_input_is_right(out, grad, parts, 1090)


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
    parts = quantized((8, 64))
    try:
        for rows, name in ((most, "grad_input"), (most + 1, "dequantize")):
            out = run("linear_grad_input", torch.ones(rows, 8, dtype=dtype), *parts, 64)
            assert name in launchers().launches[-1].kernel
            assert_grad_input_is_right(out, torch.ones(rows, 8, dtype=dtype), parts, 64)
    finally:
        launchers().device = device


def test_linear_grad_input_under_autocast():
    """Autocast would multiply an fp32 grad in bf16."""
    parts = quantized((8, 64))
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
        ({6: -1}, "out_features: expected at least 0, got -1"),
        ({7: torch.zeros(15)}, "bias: expected 16 elements, got 15"),
        ({8: None}, "t, lora_b: expected both"),
        ({8: torch.zeros(2, 4)}, "t: expected 12 elements, got 8"),
        ({9: torch.zeros(16, 3)}, "lora_b: expected 64 elements, got 48"),
    ],
)
def test_wrong_linear_calls_raise(change, message):
    """A wrong call must not reach a kernel, which would leave its buffers."""
    parts = [torch.zeros(512, dtype=torch.uint8), torch.zeros(16), None, None, "nf4:64"]
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
        ({3: torch.zeros(1)}, "group_scales, offset: expected neither for nf4:64, got one"),
        ({5: "nf4:48"}, "spec: expected a block size that is a power of two from 32 to 4096, got nf4:48"),
        ({7: torch.zeros(3, 2)}, "grad_t, lora_a: expected both"),
        ({7: torch.zeros(3, 2), 8: torch.zeros(2, 49)}, "lora_a: expected 100 elements, got 98"),
        ({7: torch.zeros(4, 2), 8: torch.zeros(2, 50)}, "grad_t: expected 6 elements, got 8"),
        ({6: -1}, "in_features: expected at least 0, got -1"),
        ({6: 2**62}, "in_features: expected sizes whose product fits 63 bits"),
    ],
)
def test_wrong_calls_of_linear_grad_input_raise(change, message):
    """A wrong call must not reach a kernel, which would leave its buffers."""
    arguments = [torch.ones(3, 40), torch.zeros(1000, dtype=torch.uint8), torch.zeros(32), None, None, "nf4:64", 50]
    arguments += [None, None]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        stub().linear_grad_input(*arguments)
