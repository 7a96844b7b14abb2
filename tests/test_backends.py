"""The choice of a backend: by the user, by the device, and what is said where there is none."""

import asyncio
import importlib.metadata
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
from cases import make_weight

import lowbit
from lowbit.backends import native as native_backend
from lowbit.backends import triton as triton_backend

needs_native = pytest.mark.skipif(native_backend.missing_reason() is not None, reason="no compiled extension")
Q = lowbit.quantize(make_weight((33, 130)))


@needs_native
def test_use_backend_is_a_guard_and_local_to_the_task():
    """A backend chosen in one task or around one call must not leak into others, compiled or not."""
    x = torch.randn(6, 130)

    def which(x):
        return lowbit.backends.namespace_for(x.device.type, lowbit.backends.selected()) == "lowbit_reference"

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
    """An explicit choice would fall back silently."""
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
    """Triton for ROCm, Intel and Windows is imported as triton and installed under another name.

    lowbit must not fail to import there, also for the CPU.
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
