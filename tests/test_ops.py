"""The torch ops: registration, compilation, autocast, checkpointing, and wrong direct calls."""

import subprocess
import sys

import pytest
import torch
from cases import CalledOps, assert_within, make_weight, product_tolerance
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit.backends import NAMESPACES
from lowbit.backends import native as native_backend
from lowbit.ops import OPS
from lowbit.ops import linear as products
from lowbit.ops.samples import EXPERTS, IN, OUT, RANK, samples

needs_native = pytest.mark.skipif(native_backend.missing_reason() is not None, reason="no compiled extension")
# Triton's ops have their kernels on CPU tensors only in its interpreter.
NAMESPACES_OF_OPS = [
    pytest.param(getattr(torch.ops, namespace), marks=[pytest.mark.interpreted] * (name == "triton"))
    for name, namespace in NAMESPACES.items()
]
Q = lowbit.quantize(make_weight((33, 130)))
PARTS = Q.operands()


#: Which arguments of an op have gradients, where it has any.
DIFFERENTIABLE = {
    "linear": ("x", "bias", "t", "lora_b"),
    "lora_linear": ("x", "bias", "lora_a", "lora_b"),
    "grouped_linear": ("x", "bias", "t", "lora_b"),
    "grouped_lora_linear": ("x", "bias", "lora_a", "lora_b"),
    "grouped_matmul": ("x", "matrices"),
}


@pytest.mark.parametrize("ops", NAMESPACES_OF_OPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(ops, dtype):
    """A wrong schema, fake kernel or autograd registration breaks torch.compile and export."""
    calls = list(samples(dtype))
    assert {name for name, _, _ in calls} == set(OPS), "an op without a sample: add one to lowbit/ops/samples.py"
    for name, what, arguments in calls:
        if what.startswith(("fp4", "nf4:32")):  # the same schemas and kernels
            continue
        op = getattr(ops, name).default
        names = [argument.name for argument in op._schema.arguments]
        arguments = tuple(
            value.clone().requires_grad_() if value is not None and of in DIFFERENTIABLE.get(name, ()) else value
            for of, value in zip(names, arguments, strict=True)
        )
        results = torch.library.opcheck(op, arguments)
        assert set(results.values()) == {"SUCCESS"}, (name, what, results)


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_gradients_equal_those_of_dense_arithmetic(name):
    """An op's backward that forgets a term trains to something else."""
    op = getattr(torch.ops.lowbit_reference, name).default
    names = [argument.name for argument in op._schema.arguments]
    for sampled, _, arguments in samples():
        if sampled != name:
            continue
        given = dict(zip(names, arguments, strict=True))
        leaves = {of: given[of].clone().requires_grad_() for of in DIFFERENTIABLE[name] if given[of] is not None}
        ours = op(*(given | leaves).values())
        y = ours[0] if isinstance(ours, tuple) else ours
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        actual = torch.autograd.grad(y, list(leaves.values()), grad)
        expected, magnitudes = (
            gradients_in_fp64(name, given, list(leaves), grad, change) for change in (torch.Tensor.double, absolute)
        )
        for ours, exact, magnitude in zip(actual, expected, magnitudes, strict=True):
            # The chain from grad through lora_b or W, and then lora_a, or the sum over rows.
            tolerance = product_tolerance(magnitude, exact, OUT + IN + RANK, torch.float32)
            assert_within(ours, exact, tolerance)


def absolute(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().abs()


def gradients_in_fp64(name: str, given: dict, leaves: list[str], grad: torch.Tensor, change) -> tuple:
    """Gradients of :func:`dense` for the leaves, every factor having gone through ``change``."""
    floats = ("x", "bias", "t", "lora_a", "lora_b", "matrices")
    changed = given | {of: change(given[of]) for of in floats if given.get(of) is not None}
    for of in leaves:
        changed[of].requires_grad_()
    return torch.autograd.grad(dense(name, changed, change), [changed[of] for of in leaves], change(grad))


def dense(name: str, given: dict, change) -> torch.Tensor:
    """The op's result in fp64 on the decoded weight, row by row."""
    if name == "grouped_matmul":
        experts = torch.bucketize(torch.arange(given["x"].shape[0]), given["expert_ends"], right=True)
        return torch.einsum("mk,mpk->mp", given["x"], given["matrices"][experts])
    weight = [given[part] for part in ("packed", "absmax", "group_scales", "offset", "spec")]
    grouped = name.startswith("grouped")
    shape = [EXPERTS, OUT, IN] if grouped else [OUT, IN]
    w = change(torch.ops.lowbit_reference.dequantize(*weight, shape, torch.float32))
    x, rows = given["x"], given["x"].shape[0]
    experts = torch.zeros(rows, dtype=torch.long)
    if grouped:
        experts = torch.bucketize(torch.arange(rows), given["expert_ends"], right=True)

    def of_row(stack):
        return (stack if grouped else stack[None])[experts]

    y = torch.einsum("mk,mnk->mn", x, of_row(w))
    if given["bias"] is not None:
        y = y + of_row(given["bias"])
    t = given["t"] if "t" in given else torch.einsum("mk,mrk->mr", x, of_row(given["lora_a"]))
    if t is not None:
        y = y + given["scaling"] * torch.einsum("mr,mnr->mn", t, of_row(given["lora_b"]))
    return y


def lora_call(x, lora_a, lora_b):
    return lowbit.lora_linear(x, Q, lora_a, lora_b, 0.5).relu()


def lora_leaves(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = ((6, 130), (4, 130), (33, 4))
    x, lora_a, lora_b = (torch.randn(size, generator=generator) for size in sizes)
    return [x.to(dtype).requires_grad_(), lora_a.requires_grad_(), lora_b.requires_grad_()]


@pytest.mark.parametrize("by_one_op", [False, True], ids=["parts", "one op"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_graph_break(monkeypatch, dtype, by_one_op):
    """torch.compile users get the same numbers, forward and backward, in one graph.

    On a GPU a product and its LoRA are one op each way. Here its kernels are those made of other ops.
    """
    if by_one_op:
        namespace = NAMESPACES["reference" if native_backend.missing_reason() else "native"]
        monkeypatch.setattr(products, "HAVE_LORA_KERNELS", {(namespace, "cpu")})
    torch._dynamo.reset()
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
    with torch.set_grad_enabled(grad), CalledOps() as called:
        short = lowbit.lora_linear(x, Q, lora_a, lora_b, 0.5)
    namespace = NAMESPACES["reference" if native_backend.missing_reason() else "native"]
    assert f"{namespace}::linear" in called.names
    with torch.set_grad_enabled(grad):
        dispatched, _ = getattr(torch.ops, namespace).lora_linear(x, *PARTS, 33, None, lora_a, lora_b, 0.5)
    assert torch.equal(short, dispatched) and short.requires_grad == dispatched.requires_grad == grad
    if grad:
        ours, theirs = (torch.autograd.grad(y.sum(), leaves) for y in (short, dispatched))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


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
    """Inference would keep a graph."""
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


#: Those with kernels that would read and write out of bounds.
CHECKING_OPS = [
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
        ({5: "nf4:48"}, "spec: .*power of two.*nf4:48"),
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
    """A wrong call would write out of bounds."""
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
        ("quantize", (WEIGHT, "nf4:8192"), "spec: .*a power of two from 32 to 4096, got .*8192"),
        ("quantize", (WEIGHT, "int8:64"), "spec: expected .*int8.*, got .*int8:64"),
        ("quantize_scales", (torch.ones(300), torch.ones(2)), "offset: expected 1 elements, got 2"),
        ("quantize_scales", (torch.ones(300).half(), torch.ones(1)), "absmax: expected dtype float32, got float16"),
        ("search_scales", (WEIGHT, torch.ones(3), "nf4:64"), "importance: expected 64 elements, got 3"),
        ("search_scales", (WEIGHT, None, "int8"), "spec: expected nf4 or fp4.*, got .*int8"),
        ("encode", (WEIGHT, torch.ones(1), "nf4:64"), "scales: expected 4 elements, got 1"),
        ("dequantize", (*PARTS, [34, 130], torch.float32), "packed: expected 2210 elements, got 2145"),
        ("dequantize", (*PARTS, [33, 130], torch.float64), "dtype: expected dtype float32, float16 or bfloat16"),
        ("linear_grad_input", (torch.ones(2, 32), *PARTS, 130), "packed: expected 2080 elements, got 2145"),
        ("linear_grad_input", (torch.ones(2, 33), *PARTS, 130, torch.ones(2, 4)), "grad_t, lora_a: expected both"),
        ("lora_linear", (torch.ones(2, 130), *PARTS, 33, None, torch.ones(4, 129), torch.ones(33, 4), 1.0), "129x4"),
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
    """A wrong call would put another tensor's memory into a weight, a gradient or a mixture's output."""
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*arguments)


def strided(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same values in every second place of memory."""
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


def test_command_line(capsys):
    """A mistyped option must not pass for a check that was made; the exit status is what a script looks at."""
    from lowbit import __main__

    command = [sys.executable, "-m", "lowbit", "--self-test"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "checks passed" in done.stdout, done.stderr
    for wrong in ("--selftest", "--bogus", "something"):
        with pytest.raises(SystemExit) as ended:
            __main__.main([wrong])
        output = capsys.readouterr()
        assert ended.value.code == 2 and wrong in output.err and not output.out
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--help"])
    output = capsys.readouterr().out
    assert ended.value.code == 0 and "--self-test" in output and "exit status" in output
