"""Runs csrc/bindings/cuda.cpp on CPU tensors over the stub runtime, for its tests.

tests/cuda/stub_bindings.cpp registers the ops of the CUDA bindings as ``torch.ops.lowbit_stub``.
"""

import contextlib
import ctypes
import functools
import itertools

import numpy as np
import pytest
import torch
from cases import (
    UNIT_ROUNDOFF,
    assert_within,
    make_weight,
    product_tolerance,
    tensor_core_tolerance,
    weight_error_cuda,
)
from conftest_cuda import emulator, launchers, spec_of, stub_bindings
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit import backends, ops
from lowbit.ops import linear, shared_input

STREAM = 0x5EED  # torch's current stream of device 0, says the stub; the next device's is one further
REFERENCE = torch.ops.lowbit_reference
alive = []  # memory that the emulator knows must not be given to another tensor


allocated = {}  # what torch has not filled, by address


def know_allocation(address: int, size: int, filled: bool) -> None:
    """Make an op's allocation known: kernels may write it, but not read it before, unless torch filled it."""
    if filled and address in allocated:
        allocated.pop(address).written[:] = True
    elif size:
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        if not filled:
            memory = allocated[address] = emulator("address_space").Uninitialized(memory)
        launchers().know(memory)


CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool)(know_allocation)


@functools.cache
def stub_library():
    """tests/cuda/stub_bindings.cpp, loaded by ctypes."""
    return ctypes.CDLL(str(stub_bindings()))


@functools.cache
def stub():
    """``torch.ops.lowbit_stub``: compiled, loaded, and told of the emulator."""
    definitions = torch.library.Library("lowbit_stub", "DEF")
    for op in ops.OPS.values():
        definitions.define(op.schema)
    definitions.define(shared_input.CAPTURE_ID)
    alive.append(definitions)
    torch.ops.load_library(str(stub_bindings()))
    stub_library().stub_set_callback_of_bindings(CALLBACK)
    return torch.ops.lowbit_stub


def run(op: str, *args, device: int = 0):
    """Run an op of the CUDA bindings with its tensors on ``device``; return its result.

    Asserts that the op does no more than launch kernels there, on torch's current stream: no allocation, no wait.
    """
    op, library = getattr(stub(), op), launchers()
    lists = [a if isinstance(a, (list, tuple)) else [a] for a in args]
    tensors = [a for a in itertools.chain(*lists) if isinstance(a, torch.Tensor)]
    for tensor in tensors:
        tensor = tensor if tensor.is_contiguous() else tensor.mT  # one of LoRA's factors
        if tensor.is_contiguous():  # else no kernel reads it: the bindings copy it
            library.know(tensor)
    earlier = len(library.launches)
    library.runtime_calls.clear()
    result = op(*args)
    alive.extend((tensors, result))
    assert {(launch.device, launch.stream) for launch in library.launches[earlier:]} <= {(device, STREAM + device)}
    assert not library.runtime_calls
    assert library.current_device == 0
    return result


#: Ops of torch that launch nothing on a GPU: they make memory or look at it in another shape.
NO_LAUNCH = {
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "as_strided",
    "view",
    "_unsafe_view",
    "_reshape_alias",
}
NO_LAUNCH |= {"t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach", "alias"}


def stub_capture(x: torch.Tensor) -> tuple[int, int] | None:
    """What lowbit.ops.shared_input asks of a GPU."""
    graph = stub().capture_id(x)
    return (STREAM, graph) if graph else None


class OnStub(TorchDispatchMode):
    """Context in which lowbit's public functions run on the CUDA bindings, over the stub runtime.

    ``launches`` lists what would have been launched on a GPU: our kernels, and torch's ops by name. ``in_fp32`` has the
    ``(op, elements)`` of each tensor in fp32 that an op returned.
    """

    def __init__(self):
        super().__init__()
        self.launches, self.in_fp32 = [], []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self):
        stub()
        self._patch.setitem(backends.NAMESPACES, "native", "lowbit_stub")
        self._patch.setattr(shared_input, "_capture", stub_capture)
        self._patch.setattr(linear, "HAVE_LORA_KERNELS", {("lowbit_stub", "cpu")})
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if lowbit.QuantizedTensor in types:
            return NotImplemented
        if op.namespace == "lowbit_stub":
            library, of_torch = launchers(), stub_library().stub_launches_of_torch
            earlier, earlier_of_torch = len(library.launches), of_torch()
            result = run(op._opname, *args)
            self.launches += [launch.kernel for launch in library.launches[earlier:]]
            self.launches += ["torch"] * (of_torch() - earlier_of_torch)
        else:
            if op._opname not in NO_LAUNCH:
                self.launches.append(op.name())
            result = op(*args, **(kwargs or {}))
        made = [each for each in pytree.tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.in_fp32 += [(op.name(), each.numel()) for each in made if each.dtype == torch.float32]
        return result


@contextlib.contextmanager
def two_gpus(arch: str):
    """Context with two GPUs of different architectures: tensors are on the second, the first is current."""
    library = launchers()
    library.set_device_count(2)
    library.other_devices = {1: emulator("device").Device.for_arch(arch)}
    library.on_device_change()
    stub_library().stub_set_device_of_tensors(1)
    try:
        yield
    finally:
        stub_library().stub_set_device_of_tensors(0)
        library.other_devices = {}
        library.on_device_change()
        library.set_device_count(1)


def assert_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype and torch.equal(our, their)


def quantized(shape, format="nf4", block_size=64, double_quant=False):
    """The arguments from packed to spec of a random weight, double-quantized if its format can be."""
    plain = spec_of(format, block_size)
    packed, absmax = REFERENCE.quantize(make_weight(shape), plain)
    spec = spec_of(format, block_size, double_quant)
    if spec == plain:
        return packed, absmax, None, None, plain
    offset = absmax.mean()
    return packed, *REFERENCE.quantize_scales(absmax, offset), offset, spec


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
    bias_dtype=None,
):
    """Check ``linear`` against fp64 arithmetic; return the last kernel. ``sizes`` scale t's and lora_b's elements."""
    weight = quantized((n, k), format, double_quant=double_quant)
    x, bias_values, t, lora_b = operands(rows, n, k, rank, dtype, lora_dtype)
    bias_values = bias_values.to(bias_dtype or dtype)
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


def assert_grad_input_is_right(out, grad, parts, k, grad_t=None, lora_a=None):
    """Check an output of linear_grad_input, however it was computed."""
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
