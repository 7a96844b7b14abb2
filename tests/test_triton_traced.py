"""torch.compile and the Triton backend: the graph holds the kernels' launches. It can be made without a GPU."""

import importlib
import types

import pytest
import torch
from conftest_triton import compiled_only, gpu_target, weight
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_calls import parts_of

import lowbit
from lowbit.backends import triton as backend
from lowbit.format import WeightSpec

pytestmark = compiled_only
OPS = torch.ops.lowbit_triton
WEIGHT = parts_of(torch.randn(64, 128))


class _Traced(Exception):
    """Ends a compilation once its graph is there: no GPU could run it."""


@pytest.fixture
def gpu_driver(monkeypatch):
    """A GPU to plan for. torch asks Triton for its kind, to learn what a kernel writes; the backend asks its size."""
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
    "linear of many rows with LoRA": (
        OPS.linear,
        (half(999, 128), *WEIGHT, 64, None, torch.randn(999, 4), torch.randn(64, 4), 0.5),
    ),
    "linear_grad_input of many rows": (OPS.linear_grad_input, (half(999, 64), *WEIGHT, 128)),
    "linear_grad_input": (OPS.linear_grad_input, (half(5, 64), *WEIGHT, 128)),
    "linear_grad_input with LoRA": (
        OPS.linear_grad_input,
        (half(70, 64), *WEIGHT, 128, torch.randn(70, 4), torch.randn(4, 128)),
    ),
    "linear_grad_input of many rows with LoRA": (
        OPS.linear_grad_input,
        (half(999, 64).half(), *WEIGHT, 128, torch.randn(999, 4), torch.randn(4, 128)),
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
    decoded = "many rows" in name
    assert names.count("triton_kernel_wrapper_functional") == (not decoded or "LoRA" in name)
    assert ("lowbit_triton.dequantize.default" in names) == decoded
    assert names.count("lowbit_triton.scale_map.default") <= 1
    (output,) = [node for node in nodes if node.op == "output"]
    assert len(output.args[0]) == 1, "a weight is written to"


def test_what_torch_cannot_analyse_is_opaque(gpu_driver):
    """Lanes that exchange values look to it as if every argument were written: a copy of the weight at each call."""

    def function(x, *parts):
        return OPS.linear(x, *parts, WEIGHT[4], 64, None, None, None, 1.0).relu()

    nodes = graph_of(function, torch.randn(5, 128), *WEIGHT[:4])
    names = [str(node.target) for node in nodes if node.op == "call_function"]
    assert names == ["lowbit_triton.linear.default", "aten.relu.default"]


BF16, FP32 = torch.bfloat16, torch.float32
KERNEL = "triton_kernel_wrapper_functional"


@pytest.fixture
def on_cpu(gpu_driver, monkeypatch):
    """Launches are seen for tensors of a CPU: torch has no autograd for a device that it was not built for."""
    monkeypatch.setattr(backend, "_SHOWN_ON", ("cpu",))
    monkeypatch.setattr(backend, "DEVICE_TYPES", ("cpu",))
    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), lowbit.use_backend("triton"):
        yield
    torch.compiler.reset()


def compiled_whole(function, dynamic=None):
    """(``function`` as torch.compile makes it on fake tensors, what each of its graphs calls), backward graphs too."""
    graphs = []

    def compiler(graph_module, arguments):
        names = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]
        graphs.append([n for n in names if n == KERNEL or n.startswith("lowbit") and "scale_map" not in n])
        return make_boxed_func(graph_module)

    collect = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=collect), graphs


def empty_weight(*shape: int) -> lowbit.QuantizedTensor:
    parts = (torch.empty_like(part, device="cpu") for part in weight(shape, "nf4")[:4])
    return lowbit.QuantizedTensor(*parts, shape=shape, dtype=BF16, spec=WeightSpec())


def leaf(*shape: int, dtype=FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def lora_operands(rows, n=64, k=128, dtype=BF16):
    return leaf(rows, k, dtype=dtype), empty_weight(n, k), leaf(8, k), leaf(n, 8)


def expert_operands(rows):
    ends = torch.empty(3, dtype=torch.int32)
    return leaf(rows, 128, dtype=BF16), empty_weight(3, 64, 128), ends, leaf(3, 8, 128), leaf(3, 64, 8)


def lora_linear(*operands):
    return lowbit.lora_linear(*operands, 0.5)


def expert_linear(*operands):
    return lowbit.grouped_lora_linear(*operands, 0.5)


def decoded_product(x, q):
    return x @ lowbit.dequantize(q, x.dtype).T


def names_of(*ops: str) -> list[str]:
    return [f"lowbit_triton.{op}.default" for op in ops]


#: Layer -> (its function, its operands for a number of rows, what the forward's and what the backward's graph calls).
LAYERS = {
    "lora_linear": (lora_linear, lora_operands, [KERNEL], [KERNEL]),
    "lora_linear in fp32": (
        lora_linear,
        lambda rows: lora_operands(rows, dtype=FP32),
        names_of("linear"),
        names_of("linear_grad_input"),
    ),
    "grouped_lora_linear": (
        expert_linear,
        expert_operands,
        names_of("grouped_matmul", "grouped_linear"),
        names_of("grouped_linear_grad_input", "grouped_matmul", "grouped_outer", "grouped_outer"),
    ),
    "dequantize": (decoded_product, lambda rows: lora_operands(rows)[:2], names_of("dequantize"), []),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_for_many_batch_sizes(on_cpu, name):
    """A graph that breaks, or one for each length of a text, makes a compiled model slower than one that is not."""
    function, make, forward, backward = LAYERS[name]
    compiled, graphs = compiled_whole(function, dynamic=True)
    for rows in (5, 7, 8):
        operands = make(rows)
        leaves = [a for a in operands if isinstance(a, torch.Tensor) and a.requires_grad]
        gradients = torch.autograd.grad(compiled(*operands).sum(), leaves)
        assert [g.shape for g in gradients] == [a.shape for a in leaves]
    assert sorted(graphs[0]) == sorted(forward) and sorted(graphs[1]) == sorted(backward)
    assert len(graphs) == 2


@pytest.mark.parametrize("dynamic", [None, True])
def test_layers_of_several_sizes(on_cpu, dynamic):
    """Where layers that share code differ in size torch.compile has symbols for it: the choice of a kernel must not
    fail on them.
    """
    compiled, graphs = compiled_whole(lora_linear, dynamic)
    for n, k in ((64, 128), (96, 64), (64, 320)):
        operands = lora_operands(5, n, k)
        y = compiled(*operands)
        assert y.shape == (5, n)
        assert torch.autograd.grad(y.sum(), operands[0])[0].shape == (5, k)
    assert graphs == [[KERNEL]] * 6
