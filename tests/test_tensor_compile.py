"""Quantized models under torch's transforms: checkpoints, functional calls, inference mode, traces, export, compile."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import WeightSpec


@pytest.fixture(autouse=True)
def no_code_of_other_sources():
    """Use no kept graphs: torch keeps them between processes by lowbit's version, not by its sources."""
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


class Adapted(nn.Module):
    """Two quantized layers and a LoRA around the first."""

    def __init__(self, spec=WeightSpec()):  # noqa: B008 (frozen)
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(96, 40)
        self.second = nn.Linear(40, 96, bias=False)  # 40: rows cut blocks
        self.lora_a = nn.Parameter(torch.randn(4, 96) / 10)
        self.lora_b = nn.Parameter(torch.randn(40, 4) / 10)
        lowbit.quantize_(self, spec)

    def forward(self, x):
        if not isinstance(self.first.weight, lowbit.QuantizedTensor):
            low = self.first(x) + 0.5 * F.linear(F.linear(x, self.lora_a), self.lora_b)
        else:
            low = lowbit.lora_linear(x, self.first.weight, self.lora_a, self.lora_b, 0.5, self.first.bias)
        return self.second(torch.tanh(low + self.first(x)))


def inputs(rows: int = 3) -> torch.Tensor:
    return torch.randn(2, rows, 96, generator=torch.Generator().manual_seed(rows), requires_grad=True)


def step(model, x, call=None) -> list[torch.Tensor]:
    """Return the output and every gradient of the model, or of ``call`` if it is given."""
    y = (call or model)(x)
    y.square().sum().backward()
    module = getattr(model, "_orig_mod", model)
    results = [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]
    module.zero_grad()
    x.grad = None
    return results


def assert_all_equal(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    """With activation checkpointing gradients would be missing or other ones."""
    model = Adapted()
    expected = step(model, inputs())
    assert_all_equal(step(model, inputs(), lambda x: checkpoint(model, x, use_reentrant=reentrant)), expected)


def test_functional_call():
    """torch.func would not find the quantized weights among the parameters, or not replace them."""
    model, x = Adapted(), inputs()
    values = dict(model.named_parameters())
    assert torch.equal(torch.func.functional_call(model, values, (x,)), model(x))
    values["second.weight"] = lowbit.quantize(torch.zeros(96, 40))
    assert not torch.func.functional_call(model, values, (x,)).any()


def test_inference_mode_then_training():
    """A model that was evaluated under inference_mode, or quantized there, could not be trained afterwards."""
    model = Adapted()
    expected = step(model, inputs())
    made_there = lowbit.dequantize_(copy.deepcopy(model))
    with torch.inference_mode():
        assert torch.equal(model(inputs()), expected[0])
        lowbit.quantize_(made_there)
    assert_all_equal(step(model, inputs()), expected)
    assert made_there(inputs()).requires_grad
    made_there(inputs()).sum().backward()
    assert made_there.lora_a.grad is not None


def test_jit_trace():
    """A trace would hold decoded weights, or fail on its own check."""
    model, x = Adapted().eval(), inputs().detach()
    traced = torch.jit.trace(model, (x,))
    assert torch.equal(traced(inputs(5)), model(inputs(5)))
    file = io.BytesIO()
    torch.jit.save(torch.jit.freeze(traced), file)
    loaded = torch.jit.load(io.BytesIO(file.getvalue()))
    assert torch.equal(loaded(x), model(x))


def test_jit_save_of_what_is_not_frozen():
    """torch.jit.save reads parameters' memory in C++: it would crash the process, or write noise that loads."""
    traced, file = torch.jit.trace(Adapted().eval(), (inputs().detach(),)), io.BytesIO()
    torch.jit.save(traced, file)
    with pytest.raises(RuntimeError, match="storage"):
        torch.jit.load(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    """An exported model would decode the weight, or be fixed to one batch size."""
    model, x = Adapted().eval(), inputs().detach()
    rows = {1: torch.export.Dim("rows", min=2, max=64)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(rows,), strict=strict)
    assert torch.equal(exported.module()(x), model(x))
    assert torch.equal(exported.module()(inputs(7)), model(inputs(7)))
    called = {str(node.target) for node in exported.graph.nodes}
    assert not {name for name in called if "dequantize" in name}
    assert {name.split(".")[1] for name in called if name.startswith("lowbit")} == {"linear", "lora_linear"}


@pytest.mark.parametrize(
    ("backend", "spec"), [("aot_eager", WeightSpec()), ("aot_eager", WeightSpec("int8")), ("inductor", WeightSpec())]
)
def test_compile(backend, spec):
    """``torch.compile(fullgraph=True)`` would break at the weight, forward or backward."""
    model = Adapted(spec)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    ours, theirs = step(compiled, inputs()), step(model, inputs())
    if backend == "aot_eager":
        assert_all_equal(ours, theirs)
        return
    exact = step(lowbit.dequantize_(copy.deepcopy(model)).double(), inputs().detach().double().requires_grad_())
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        # Two computations of 96 terms: a rounding of each term at most, of which the uncompiled one shows the size.
        assert (mine - other).norm() <= (96 + 8) * (other - truth).norm()


def test_compile_dynamic_shapes():
    """Every batch size would compile anew."""
    model, graphs = Adapted(), []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5, 9):
        assert_all_equal(step(compiled, inputs(rows)), step(model, inputs(rows)))
    assert len(graphs) == 1


def test_compile_of_slices_and_products():
    """Experts, attention's packed projections and products with w.T would break a graph, or be wrong in one."""
    torch.manual_seed(0)
    stack, weight = lowbit.quantize(torch.randn(4, 96, 64)), lowbit.quantize(torch.randn(96, 64))
    ends = torch.tensor([2, 2, 6, 9], dtype=torch.int32)

    def everything(x, stack, weight):
        yield F.linear(x, stack[1])
        yield F.linear(x, weight[3:7])  # inside of a group of scales
        yield torch._grouped_mm(x, stack.transpose(-2, -1), ends)
        yield x @ weight.T
        yield weight @ x.T
        yield F.embedding(torch.tensor([1, 95]), weight)

    x = torch.randn(9, 64, requires_grad=True)
    compiled = torch.compile(
        lambda *arguments: list(everything(*arguments)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    ours, theirs = compiled(x, stack, weight), list(everything(x, stack, weight))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    gradients = [torch.autograd.grad(sum(y.sum() for y in ys), x)[0] for ys in (ours, theirs)]
    # the same six products; torch adds their gradients in another order
    torch.testing.assert_close(*gradients, rtol=0, atol=6 * 2.0**-23 * float(gradients[1].abs().max()))


def test_a_weight_that_was_traced_is_as_before():
    """What a trace leaves behind (fake tensors, constants) would get into later calls, copies and pickles."""
    model = Adapted().eval()
    before = model.first.weight.parts()
    expected = step(model, inputs())
    torch.export.export(model, (inputs().detach(),))
    torch.compile(model, backend="aot_eager")(inputs())
    torch.jit.trace(model, (inputs().detach(),))
    assert all(ours is part for ours, part in zip(model.first.weight.parts(), before, strict=True))
    assert_all_equal(step(model, inputs()), expected)
    assert_all_equal(step(copy.deepcopy(model), inputs()), expected)
