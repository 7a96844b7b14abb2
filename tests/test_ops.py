"""The torch ops: registration, compilation, autocast, checkpointing, and wrong direct calls."""

import asyncio
import subprocess
import sys

import pytest
import torch
from cases import make_weight
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit.backends import NAMESPACES
from lowbit.backends import native as native_backend
from lowbit.backends import triton as triton_backend

needs_native = pytest.mark.skipif(native_backend.missing_reason() is not None, reason="no compiled extension")
# Triton's ops have their kernels on CPU tensors only in its interpreter.
OPS = [
    pytest.param(getattr(torch.ops, namespace), marks=[pytest.mark.interpreted] * (name == "triton"))
    for name, namespace in NAMESPACES.items()
]
Q = lowbit.quantize(make_weight((33, 130)))
PARTS = (*Q.parts(), "nf4", 64)


@pytest.mark.parametrize("ops", OPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(ops, dtype):
    """A wrong schema, fake kernel or autograd registration breaks torch.compile and export."""
    x = torch.randn(2, 3, 130).to(dtype).requires_grad_()
    t, lora_b = torch.randn(2, 3, 4, requires_grad=True), torch.randn(33, 4, requires_grad=True)
    bias = torch.randn(33, requires_grad=True)
    plain = lowbit.quantize(make_weight((33, 130)), double_quant=False)
    eight = lowbit.quantize(make_weight((33, 130)), format="int8")
    calls = (
        (ops.linear, (x, *PARTS, 33, bias, t, lora_b, 0.5)),
        (ops.linear, (x, *plain.parts(), "nf4", 64, 33, None, None, None, 1.0)),
        (ops.linear_approximate, (x.detach(), *PARTS, 33, None, None, None, 1.0)),
        (ops.lora_linear, (x.detach(), *PARTS, 33, bias.detach(), torch.randn(4, 130), lora_b.detach(), 0.5)),
        (ops.linear_grad_input, (torch.randn(5, 33).to(dtype), *PARTS, 130)),
        (
            ops.linear_grad_input,
            (torch.randn(5, 33).to(dtype), *PARTS, 130, torch.randn(5, 4), torch.randn(4, 130)),
        ),
        (ops.quantize, (make_weight((7, 9), dtype), "fp4", 32)),
        (ops.quantize_scales, (plain.absmax, plain.absmax.mean())),
        (ops.search_scales, (make_weight((7, 9), dtype), torch.rand(9), "nf4", 32)),
        (ops.encode, (make_weight((7, 9), dtype), torch.rand(2), "nf4", 32)),
        (ops.dequantize, (*PARTS, [33, 130], dtype)),
        (ops.dequantize_out, (*PARTS, torch.empty(33, 130, dtype=dtype))),
        (ops.quantize, (make_weight((7, 9), dtype), "int8", 9)),
        (ops.dequantize, (*eight.parts(), "int8", 130, [33, 130], dtype)),
        (ops.dequantize_out, (*eight.parts(), "int8", 130, torch.empty(33, 130, dtype=dtype))),
        (ops.linear, (x, *eight.parts(), "int8", 130, 33, bias, t, lora_b, 0.5)),
        (ops.linear_grad_input, (torch.randn(5, 33).to(dtype), *eight.parts(), "int8", 130, 130)),
    )
    stack, ends = lowbit.quantize(make_weight((3, 33, 130))), torch.tensor([2, 2, 5], dtype=torch.int32)
    rows, matrices, down = torch.randn(5, 130).to(dtype).requires_grad_(), torch.randn(3, 33, 4), torch.randn(5, 4)
    weight = (*stack.parts(), "nf4", 64, ends)
    calls += (
        (ops.grouped_linear, (rows, *weight, 33, torch.randn(3, 33), down, matrices.requires_grad_(), 0.5)),
        (ops.grouped_linear_grad_input, (torch.randn(5, 33).to(dtype), *weight, 130, down, torch.randn(3, 4, 130))),
        (ops.grouped_matmul, (rows, torch.randn(3, 4, 130, requires_grad=True), ends)),
        (ops.grouped_outer, (down, rows.detach(), ends)),
    )
    for op, arguments in calls:
        results = torch.library.opcheck(op.default, arguments)
        assert set(results.values()) == {"SUCCESS"}, (op, results)


def lora_call(x, lora_a, lora_b):
    return lowbit.lora_linear(x, Q, lora_a, lora_b, 0.5).relu()


def lora_leaves(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = ((6, 130), (4, 130), (33, 4))
    x, lora_a, lora_b = (torch.randn(size, generator=generator) for size in sizes)
    return [x.to(dtype).requires_grad_(), lora_a.requires_grad_(), lora_b.requires_grad_()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_graph_break(dtype):
    """torch.compile users get the same numbers, forward and backward, in one graph."""
    leaves = lora_leaves(dtype)
    eager = lora_call(*leaves)
    compiled = torch.compile(lora_call, fullgraph=True)(*leaves)
    grad = torch.randn_like(eager)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-6}
    torch.testing.assert_close(compiled, eager, **tolerance)
    for a, b in zip(torch.autograd.grad(compiled, leaves, grad), torch.autograd.grad(eager, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


class CalledOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), func.name()]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
def test_the_short_way_past_the_dispatcher_is_the_same(grad):
    """Eager calls skip the ops' Python kernels: results, gradients and what tracers see must not change."""
    x, lora_a, lora_b = leaves = lora_leaves()
    t = x @ lora_a.T
    with torch.set_grad_enabled(grad), CalledOps() as called:
        short = lowbit.lora_linear(x, Q, lora_a, lora_b, 0.5)
    namespace = NAMESPACES["reference" if native_backend.missing_reason() else "native"]
    assert f"{namespace}::linear" in called.names
    with torch.set_grad_enabled(grad):
        op = getattr(torch.ops, namespace).linear
        dispatched = op(x, *PARTS, 33, None, t, lora_b, 0.5)
    assert torch.equal(short, dispatched) and short.requires_grad == dispatched.requires_grad == grad
    if grad:
        ours, theirs = (torch.autograd.grad(y.sum(), leaves) for y in (short, dispatched))
        # The short way has LoRA's part of the first in its sums, the other adds it afterwards.
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))


def test_checkpointing_gives_the_same_gradients():
    """Recomputing the forward in the backward must not change training."""
    leaves = lora_leaves()
    expected = torch.autograd.grad(lora_call(*leaves).sum(), leaves)
    actual = torch.autograd.grad(checkpoint(lora_call, *leaves, use_reentrant=False).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_autocast():
    """Under autocast the layer works in the autocast dtype, as nn.Linear does, with gradients in their own dtypes."""
    leaves = lora_leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_call(*leaves)
        plain = lowbit.linear(leaves[0], Q)
        direct = torch.ops.lowbit.linear(leaves[0], *PARTS, 33, None, None, None, 1.0)
    assert y.dtype == plain.dtype == direct.dtype == torch.bfloat16
    assert torch.equal(plain, lowbit.linear(leaves[0].bfloat16(), Q))
    assert [g.dtype for g in torch.autograd.grad(y.float().sum(), leaves)] == [torch.float32] * 3


def test_no_grad_and_inference_mode():
    """Inference keeps no graph."""
    leaves = lora_leaves()
    with torch.no_grad():
        assert not lora_call(*leaves).requires_grad
    with torch.inference_mode():
        inferred = lora_call(*leaves)
    assert torch.equal(inferred, lora_call(*leaves))


def test_double_backward_is_an_error_not_zeros():
    """A second derivative that is silently zero would be worse than none."""
    x = lora_leaves()[0]
    (grad,) = torch.autograd.grad(lowbit.linear(x, Q).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), x)


@needs_native
def test_backward_uses_the_backend_of_the_forward():
    """A training step must not mix backends because the context ended before backward()."""
    x = lora_leaves()[0]
    with lowbit.use_backend("reference"):
        y = lowbit.linear(x, Q)
    with torch.autograd.profiler.profile() as profile:
        y.sum().backward()
    called = [event.name for event in profile.function_events if event.name.endswith("linear_grad_input")]
    assert called and set(called) == {"lowbit_reference::linear_grad_input"}


@needs_native
def test_use_backend_is_a_guard_and_local_to_the_task():
    """A backend chosen in one task or around one call must not leak into others, compiled or not."""
    x = lora_leaves()[0].detach()

    def which(x):
        return lowbit.backends.namespace_for(x.device.type, lowbit.backends.selected) == "lowbit_reference"

    compiled = torch.compile(which, fullgraph=True, backend="eager")

    async def task(name):
        with lowbit.use_backend(name):
            await asyncio.sleep(0.01)
            return which(x), compiled(x)

    async def both():
        return await asyncio.gather(task("reference"), task("native"))

    assert asyncio.run(both()) == [(True, True), (False, False)]
    assert not compiled(x)


def test_unknown_and_missing_backends(monkeypatch):
    """An explicit choice never falls back silently."""
    with pytest.raises(ValueError, match="name: expected one of native, triton, reference, got 'cuda'"):
        lowbit.use_backend("cuda").__enter__()
    monkeypatch.setattr(triton_backend, "_MISSING_REASON", "Triton is not installed")
    with pytest.raises(RuntimeError, match="'triton' is not available: Triton is not installed"):
        lowbit.use_backend("triton").__enter__()


@pytest.mark.skipif(triton_backend.INTERPRETED, reason="Triton's interpreter serves CPU tensors")
def test_triton_does_not_serve_a_cpu(monkeypatch):
    """Chosen by name, it must not be replaced by what is there."""
    monkeypatch.setattr(triton_backend, "_MISSING_REASON", None)
    with lowbit.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' has no kernels for device 'cpu'"):
        lowbit.linear(torch.ones(2, 130), Q)


@pytest.mark.parametrize(
    ("found", "version", "message"),
    [
        (None, "", "Triton is not installed; `pip install triton`"),
        (object(), "3.1.0", "Triton 3.1.0 is too old: expected 3.6 or newer; `pip install -U triton`"),
        (object(), "3.6.0+git1", None),
    ],
)
def test_missing_or_old_triton_is_one_message(monkeypatch, found, version, message):
    """A user without Triton meets a sentence that says what to do, not an import error from inside of a kernel."""
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(triton_backend.importlib.metadata, "version", lambda name: version)
    reason = triton_backend._missing_reason()
    assert reason is None if message is None else reason.startswith(message)


def test_triton_refuses_an_old_gpu(monkeypatch):
    """Triton's own message for a T4 would be an internal error of its compiler."""
    launch = pytest.importorskip("lowbit.backends.triton.launch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match="compute capability 8.0 or newer, got 7.5"):
        launch._check_device.__wrapped__(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    launch._check_device.__wrapped__(torch.device("cuda", 0))


def test_triton_serves_a_gpu_that_nothing_was_compiled_for(monkeypatch):
    """AMD's and Intel's GPUs, and NVIDIA's where nvcc was not found, would otherwise get an error or the reference."""
    monkeypatch.setattr(native_backend, "CUDA_CAPABILITIES", ())
    monkeypatch.setattr(native_backend, "DEVICE_TYPES", ("cpu", "meta"))
    monkeypatch.setattr(triton_backend, "_MISSING_REASON", None)
    for device_type in ("cuda", "xpu"):
        assert lowbit.backends.namespace_for(device_type, None) == "lowbit_triton"
        assert lowbit.backends.namespace_for(device_type, "reference") == "lowbit_reference"


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.ones(2, 129)}, "packed: expected"),
        ({0: torch.tensor(1.0)}, "x: expected at least 1 dimension"),
        ({0: torch.ones(2, 130, dtype=torch.int32)}, "x: expected dtype float32, float16 or bfloat16, got int32"),
        ({1: Q.packed[:-1]}, "packed: expected 2145 elements, got 2144"),
        ({2: Q.absmax[:-1]}, "absmax: expected 68 elements, got 67"),
        ({2: Q.absmax.float()}, "absmax: expected dtype uint8, got float32"),
        ({3: None}, "group_scales, offset: expected both"),
        ({3: torch.ones(0)}, "group_scales: expected 1 elements, got 0"),
        ({5: "nf5"}, "format: expected nf4, fp4 or int8, got nf5"),
        ({6: 48}, "block_size: expected a power of two"),
        ({7: 34}, "packed: expected"),
        ({7: 2**60}, "out_features: expected sizes whose product fits 63 bits"),
        ({8: torch.ones(3)}, "bias: expected 33 elements, got 3"),
        ({9: torch.ones(2, 4)}, "t, lora_b: expected both"),
        ({9: torch.ones(2, 4), 10: torch.ones(33, 5)}, "lora_b: expected 132 elements, got 165"),
    ],
)
def test_wrong_direct_calls_raise(change, message):
    """A wrong call of torch.ops.lowbit must not read out of bounds."""
    arguments = [torch.ones(2, 130), *PARTS, 33, None, None, None, 1.0]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowbit.linear(*arguments)


@needs_native
@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(33, 129), "packed: expected"),
        (torch.empty(130, 33).T, "out: expected a contiguous tensor"),
        (torch.empty(33, 130).double(), "out: expected dtype float32, float16 or bfloat16, got float64"),
    ],
)
def test_wrong_out_of_a_direct_call_raises(out, message):
    """As above, for what is written."""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowbit.dequantize_out(*PARTS, out)


def test_self_test_passes_and_can_fail(monkeypatch):
    """`python -m lowbit` is what users run first: it has to notice a broken kernel."""
    from lowbit import __main__, selftest

    assert __main__.main([]) == 0
    assert __main__.main(["--self-test"]) == 0
    monkeypatch.setattr(selftest, "_difference", lambda *operands: "relative error 1")
    assert __main__.main([]) == 1
    assert __main__.main(["--self-test"]) == 1


def test_command_line():
    """A mistyped option must not pass for a check that was made; the exit status is what a script looks at."""
    command = [sys.executable, "-m", "lowbit"]
    done = subprocess.run([*command, "--self-test"], capture_output=True, text=True)
    assert done.returncode == 0 and "checks passed" in done.stdout, done.stderr
    for wrong in ("--selftest", "--bogus", "something"):
        done = subprocess.run([*command, wrong], capture_output=True, text=True)
        assert done.returncode == 2 and wrong in done.stderr and not done.stdout
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--self-test" in done.stdout and "exit status" in done.stdout
