"""torch.compile and the Triton backend: the graph holds the kernels' launches. It can be made without a GPU."""

import importlib
import types

import pytest
import torch
from conftest_triton import compiled_only, gpu_target
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode

import lowbit
from lowbit.backends import triton as backend

pytestmark = compiled_only
OPS = torch.ops.lowbit_triton
Q = lowbit.quantize(torch.randn(64, 128))
WEIGHT = (*Q.parts(), "nf4", 64)


class _Traced(Exception):
    """Ends a compilation once its graph is there: no GPU could run it."""


@pytest.fixture
def gpu_driver(monkeypatch):
    """A GPU to plan for: torch asks Triton which, to find out what a kernel writes, and the backend how large."""
    from triton.runtime import driver

    class Driver:
        def get_current_target(self):
            return gpu_target("sm_90")

    h100 = types.SimpleNamespace(multi_processor_count=132, major=9, minor=0, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(driver, "_active", Driver(), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for module in set(backend.MODULES.values()):
        module = importlib.import_module(f"lowbit.backends.triton.{module}")
        monkeypatch.setattr(module, "PORTABLE", False, raising=False)


def graph_of(function, *arguments) -> list:
    """The nodes of the graph that torch.compile's tracer makes of ``function`` on CUDA tensors like these."""
    graphs = []

    def compiler(graph_module, arguments):
        graphs.append(list(graph_module.graph.nodes))
        raise _Traced

    def on_cuda(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [on_cuda(a).requires_grad_(a.requires_grad) for a in arguments]
        with pytest.raises(_Traced):
            aot_function(function, fw_compiler=compiler, bw_compiler=compiler)(*fakes)
    return graphs[0]


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


CALLS = {
    "linear": (OPS.linear, (half(5, 128), *WEIGHT, 64, None, torch.randn(5, 4), torch.randn(64, 4), 0.5)),
    "linear of many rows": (OPS.linear, (half(999, 128), *WEIGHT, 64, None, None, None, 1.0)),
    "linear_grad_input": (OPS.linear_grad_input, (half(5, 64), *WEIGHT, 128)),
    "linear_grad_input with LoRA": (
        OPS.linear_grad_input,
        (half(70, 64), *WEIGHT, 128, torch.randn(70, 4), torch.randn(4, 128)),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_launches_are_seen(gpu_driver, name):
    """An opaque op keeps torch.compile from fusing around it; an argument taken for written is copied at each call."""
    op, arguments = CALLS[name]
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]

    def function(*given):
        given = iter(given)
        return op(*(next(given) if isinstance(a, torch.Tensor) else a for a in arguments)).relu()

    nodes = graph_of(function, *tensors)
    names = [str(node.target) for node in nodes if node.op == "call_function"]
    opaque = [n for n in names if n.startswith("lowbit_triton") and "scale_map" not in n and "dequantize" not in n]
    assert not opaque, opaque
    if name != "linear of many rows":
        assert "triton_kernel_wrapper_functional" in names
    assert names.count("lowbit_triton.scale_map.default") <= 1
    (output,) = [node for node in nodes if node.op == "output"]
    assert len(output.args[0]) == 1, "a weight is written to"


def test_what_torch_cannot_analyse_is_opaque(gpu_driver):
    """Lanes that exchange values look to it as if every argument were written: a copy of the weight at each call."""

    def function(x, *parts):
        return OPS.linear(x, *parts, "nf4", 64, 64, None, None, None, 1.0).relu()

    nodes = graph_of(function, torch.randn(5, 128), *Q.parts())
    names = [str(node.target) for node in nodes if node.op == "call_function"]
    assert names == ["lowbit_triton.linear.default", "aten.relu.default"]
