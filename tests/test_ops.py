"""The torch ops: registration, compilation, autocast, checkpointing, and wrong direct calls."""

import asyncio
import importlib.metadata
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
from cases import CalledOps, make_weight
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit.backends import NAMESPACES
from lowbit.backends import native as native_backend
from lowbit.backends import triton as triton_backend
from lowbit.ops import OPS

needs_native = pytest.mark.skipif(native_backend.missing_reason() is not None, reason="no compiled extension")
# Triton's ops have their kernels on CPU tensors only in its interpreter.
NAMESPACES_OF_OPS = [
    pytest.param(getattr(torch.ops, namespace), marks=[pytest.mark.interpreted] * (name == "triton"))
    for name, namespace in NAMESPACES.items()
]
Q = lowbit.quantize(make_weight((33, 130)))
PARTS = Q.operands()


@pytest.mark.parametrize("ops", NAMESPACES_OF_OPS, ids=str)
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
        (ops.linear, (x, *plain.operands(), 33, None, None, None, 1.0)),
        (ops.linear_approximate, (x.detach(), *PARTS, 33, None, None, None, 1.0)),
        (ops.lora_linear, (x.detach(), *PARTS, 33, bias.detach(), torch.randn(4, 130), lora_b.detach(), 0.5)),
        (ops.linear_grad_input, (torch.randn(5, 33).to(dtype), *PARTS, 130)),
        (
            ops.linear_grad_input,
            (torch.randn(5, 33).to(dtype), *PARTS, 130, torch.randn(5, 4), torch.randn(4, 130)),
        ),
        (ops.quantize, (make_weight((7, 9), dtype), "fp4:32")),
        (ops.quantize_scales, (plain.absmax, plain.absmax.mean())),
        (ops.search_scales, (make_weight((7, 9), dtype), torch.rand(9), "nf4:32")),
        (ops.encode, (make_weight((7, 9), dtype), torch.rand(2), "nf4:32:double_quant")),
        (ops.dequantize, (*PARTS, [33, 130], dtype)),
        (ops.dequantize_out, (*PARTS, torch.empty(33, 130, dtype=dtype))),
        (ops.quantize, (make_weight((7, 9), dtype), "int8")),
        (ops.dequantize, (*eight.operands(), [33, 130], dtype)),
        (ops.dequantize_out, (*eight.operands(), torch.empty(33, 130, dtype=dtype))),
        (ops.linear, (x, *eight.operands(), 33, bias, t, lora_b, 0.5)),
        (ops.linear_grad_input, (torch.randn(5, 33).to(dtype), *eight.operands(), 130)),
    )
    stack, ends = lowbit.quantize(make_weight((3, 33, 130))), torch.tensor([2, 2, 5], dtype=torch.int32)
    rows, matrices, down = torch.randn(5, 130).to(dtype).requires_grad_(), torch.randn(3, 33, 4), torch.randn(5, 4)
    weight = (*stack.operands(), ends)
    calls += (
        (ops.grouped_linear, (rows, *weight, 33, torch.randn(3, 33), down, matrices.requires_grad_(), 0.5)),
        (ops.grouped_linear_grad_input, (torch.randn(5, 33).to(dtype), *weight, 130, down, torch.randn(3, 4, 130))),
        (ops.grouped_lora_linear, (rows, *weight, 33, None, torch.randn(3, 4, 130), matrices, 0.5)),
        (ops.grouped_matmul, (rows, torch.randn(3, 4, 130, requires_grad=True), ends)),
        (ops.grouped_outer, (down, rows.detach(), ends)),
    )
    assert {op._qualified_op_name.partition("::")[2] for op, _ in calls} == set(OPS), "an op without a call"
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
        (ModuleSpec("triton", None), "", "Triton is not installed"),  # a folder of that name
        (ModuleSpec("triton", None, origin="__init__.py"), "3.1.0", "Triton 3.1.0 is too old: expected 3.6 or newer"),
        (ModuleSpec("triton", None, origin="__init__.py"), "3.10.0rc1", None),
        (ModuleSpec("triton", None, origin="__init__.py"), "3.6.0+git1", None),
    ],
)
def test_missing_or_old_triton_is_one_message(monkeypatch, found, version, message):
    """A user without Triton meets a sentence that says what to do, not an import error from inside of a kernel."""
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(triton_backend.importlib.metadata, "version", lambda name: version)
    reason = triton_backend._missing_reason()
    assert reason is None if message is None else reason.startswith(message)


@pytest.mark.parametrize(("version", "message"), [("3.5.0", "Triton 3.5.0 is too old"), ("3.7.1+rocm", None)])
def test_triton_of_another_name(monkeypatch, version, message):
    """ROCm's, Intel's and Windows' Triton is imported as triton and installed as something else: lowbit, CPU and all,
    must not fail to import there.
    """

    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin="a.py"))
    monkeypatch.setattr(triton_backend.importlib.metadata, "version", unknown)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    reason = triton_backend._missing_reason()
    assert reason is None if message is None else reason.startswith(message)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it could not be loaded
    assert triton_backend._missing_reason().startswith("Triton cannot be imported")


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


#: Those with kernels that would read and write out of bounds.
CHECKING_NAMESPACES_OF_OPS = [
    pytest.param(torch.ops.lowbit, marks=needs_native),
    pytest.param(torch.ops.lowbit_triton, marks=pytest.mark.interpreted),
]


@pytest.mark.parametrize("ops", CHECKING_OPS, ids=str)
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
        ({5: "nf5:64"}, "spec: .*nf4, fp4.* int8.*nf5"),
        ({5: "nf4:48"}, "spec: .*block_size: expected a power of two"),
        ({5: "nf4:64"}, "group_scales, offset: expected neither|absmax: expected dtype float32"),
        ({5: "nf4"}, "spec: .*nf4"),
        ({6: 34}, "packed: expected"),
        ({6: 2**60}, "out_features: expected sizes whose product fits 63 bits|packed: expected"),
        ({7: torch.ones(3)}, "bias: expected 33 elements, got 3"),
        ({8: torch.ones(2, 4)}, "t, lora_b: expected both"),
        ({8: torch.ones(2, 4), 9: torch.ones(33, 5)}, "lora_b: expected 132 elements, got 165"),
    ],
)
def test_wrong_direct_calls_raise(ops, change, message):
    """A wrong call of an op must not read out of bounds."""
    arguments = [torch.ones(2, 130), *PARTS, 33, None, None, None, 1.0]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        ops.linear(*arguments)


@pytest.mark.parametrize("ops", CHECKING_OPS, ids=str)
@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(33, 129), "packed: expected"),
        (torch.empty(130, 33).T, "out: expected a contiguous tensor"),
        (torch.empty(33, 130).double(), "out: expected dtype float32, float16 or bfloat16, got float64"),
    ],
)
def test_wrong_out_of_a_direct_call_raises(ops, out, message):
    """As above, for what is written."""
    with pytest.raises(RuntimeError, match=message):
        ops.dequantize_out(*PARTS, out)


WEIGHT = torch.ones(4, 64)
GROUPED = lowbit.quantize(make_weight((3, 5, 64)), double_quant=False)
ENDS = torch.tensor([1, 2, 4], dtype=torch.int32)


@pytest.mark.parametrize("ops", CHECKING_OPS, ids=str)
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("quantize", (WEIGHT.double(), "nf4:64"), "weight: expected dtype float32, float16 or bfloat16, got float64"),
        ("quantize", (WEIGHT, "nf5:64"), "spec: .*nf4, fp4.* int8.*nf5"),
        ("quantize", (WEIGHT, "nf4:8192"), "block_size: expected a power of two from 32 to 4096, got 8192"),
        ("quantize", (WEIGHT, "int8:64"), "spec: expected .*int8.*, got .int8:64"),
        ("quantize_scales", (torch.ones(300), torch.ones(2)), "offset: expected 1 elements, got 2"),
        ("quantize_scales", (torch.ones(300).half(), torch.ones(1)), "absmax: expected dtype float32, got float16"),
        ("search_scales", (WEIGHT, torch.ones(3), "nf4:64"), "importance: expected 64 elements, got 3"),
        ("search_scales", (WEIGHT, None, "int8"), "spec: expected nf4 or fp4, got int8"),
        ("encode", (WEIGHT, torch.ones(1), "nf4:64"), "scales: expected 4 elements, got 1"),
        ("dequantize", (*PARTS, [34, 130], torch.float32), "packed: expected 2210 elements, got 2145"),
        ("dequantize", (*PARTS, [33, 130], torch.float64), "dtype: expected dtype float32, float16 or bfloat16"),
        ("linear_grad_input", (torch.ones(2, 32), *PARTS, 130), "packed: expected 2080 elements, got 2145"),
        ("linear_grad_input", (torch.ones(2, 33), *PARTS, 130, torch.ones(2, 4)), "grad_t, lora_a: expected both"),
        ("lora_linear", (torch.ones(2, 130), *PARTS, 33, None, torch.ones(4, 129), torch.ones(33, 4), 1.0), "lora_a"),
        (
            "grouped_linear",
            (WEIGHT, *GROUPED.operands(), ENDS.long(), 5, None, None, None, 1.0),
            "expert_ends: expected dtype int32, got int64",
        ),
        (
            "grouped_linear",
            (WEIGHT, *GROUPED.operands(), ENDS[:0], 5, None, None, None, 1.0),
            "expert_ends: expected the last to be 4, the rows|packed",
        ),
        (
            "grouped_linear",
            (WEIGHT, *GROUPED.operands(), ENDS, 5, torch.ones(14), None, None, 1.0),
            "bias: expected 15 elements, got 14",
        ),
        (
            "grouped_linear_grad_input",
            (torch.ones(4, 4), *GROUPED.operands(), ENDS, 64),
            "packed: expected 384 elements, got 480",
        ),
    ],
)
def test_wrong_direct_calls_of_the_other_ops_raise(ops, name, arguments, message):
    """As above; nothing of another tensor may end up in a weight, a gradient or a mixture's output."""
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*arguments)


def strided(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same values at every second place of memory."""
    return None if tensor is None else torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize("ops", NAMESPACES_OF_OPS, ids=str)
def test_parts_with_strides(ops):
    """A slice of a larger checkpoint is a weight too: read as if it were contiguous, every scale is another's."""
    q = lowbit.quantize(make_weight((3, 5, 64)), block_size=32)
    contiguous = q.operands()
    parts = (*(strided(part) for part in q.parts()), q.spec.text)
    x, grad = torch.randn(4, 64), torch.randn(4, 15)
    dense = ([15, 64], torch.float32)
    assert torch.equal(ops.dequantize(*parts, *dense), ops.dequantize(*contiguous, *dense))
    plain = (15, None, None, None, 1.0)
    assert torch.equal(ops.linear(x, *parts, *plain), ops.linear(x, *contiguous, *plain))
    assert torch.equal(ops.linear_grad_input(grad, *parts, 64), ops.linear_grad_input(grad, *contiguous, 64))
    options = (5, strided(torch.ones(3, 5)), strided(torch.ones(4, 2)), strided(torch.ones(3, 5, 2)), 1.0)
    assert torch.equal(
        ops.grouped_linear(x, *parts, strided(ENDS), *options), ops.grouped_linear(x, *contiguous, ENDS, *options)
    )
    assert torch.equal(
        ops.grouped_linear_grad_input(grad[:, :5], *parts, strided(ENDS), 64),
        ops.grouped_linear_grad_input(grad[:, :5], *contiguous, ENDS, 64),
    )
    matrices = torch.randn(3, 2, 64)
    assert torch.equal(ops.grouped_matmul(x, matrices, strided(ENDS)), ops.grouped_matmul(x, matrices, ENDS))


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
