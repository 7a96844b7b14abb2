"""torch.compile and the Triton backend: the graph holds the kernels' launches, and may be made without a GPU."""

import pytest
import torch
from conftest_triton import compiled_only
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode

import lowbit

pytestmark = compiled_only


class _Traced(Exception):
    """Ends a compilation once its graph is there: no GPU could run it."""


def graph_of(function, *tensors) -> list:
    """The nodes of the graph that torch.compile's tracer makes of ``function`` on CUDA tensors like these."""
    graphs = []

    def compiler(graph_module, arguments):
        graphs.append(list(graph_module.graph.nodes))
        raise _Traced

    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [
            None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            for t in tensors
        ]
        with pytest.raises(_Traced):
            aot_function(function, fw_compiler=compiler)(*fakes)
    return graphs[0]


def calls(nodes) -> list[str]:
    return [str(node.target) for node in nodes if node.op == "call_function"]


def test_launches_are_seen():
    """An opaque op in their place would keep torch.compile from fusing what surrounds them."""
    q = lowbit.quantize(torch.randn(64, 64))

    def function(*parts):
        return torch.ops.lowbit_triton.dequantize(*parts, "nf4", 64, [64, 64], torch.float32).relu()

    names = calls(graph_of(function, *q.parts()))
    assert "triton_kernel_wrapper_functional" in names and "aten.relu.default" in names
    assert names.count("lowbit_triton.scale_map.default") == 1
    assert not [name for name in names if name.startswith("lowbit_triton") and "scale_map" not in name]
