"""The CUDA half of the extension on a machine without a GPU loads, is found, and reports what is missing."""

import os
import subprocess
import sys

import pytest
import torch
from conftest_cuda import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

import lowbit
from lowbit import backends
from lowbit.backends import native

needs_cuda_half = pytest.mark.skipif(
    native.missing_cuda_reason() is not None, reason=f"no CUDA half: {native.missing_cuda_reason()}"
)

OPS = (
    *("quantize", "quantize_scales", "search_scales", "encode", "gptq_block", "descend_block"),
    *("dequantize", "dequantize_out", "linear", "linear_approximate", "linear_grad_input"),
    *("lora_linear", "lora_linear_backward", "lora_down", "lora_up", "lora_outer"),
)


@needs_cuda_half
def test_ops_are_registered_for_cuda_tensors():
    """An op that was forgotten would run on the reference, hundreds of times slower, and nobody would be told."""
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lowbit::{op}", "CUDA"), op


@needs_cuda_half
def test_cuda_tensors_go_to_the_native_kernels():
    """The automatic choice for a GPU is its kernels; `python -m lowbit` says which GPUs they are for."""
    assert native.CUDA_CAPABILITIES
    assert backends.namespace_for("cuda", None) == "lowbit"
    assert backends.namespace_for("cuda", "native") == "lowbit"


@pytest.mark.skipif(native.missing_reason() is not None, reason="no compiled extension")
@pytest.mark.parametrize("selected", [None, "native"])
def test_a_build_without_cuda_says_what_to_install(monkeypatch, selected):
    """On a GPU the reference would be so slow that a user must choose it, not get it in silence."""
    monkeypatch.setattr(native, "CUDA_CAPABILITIES", ())
    monkeypatch.setattr(native, "DEVICE_TYPES", ("cpu", "meta"))
    monkeypatch.setattr(backends.triton, "_MISSING_REASON", "Triton is not installed; `pip install triton`")
    with pytest.raises(
        RuntimeError, match="on 'cuda'.*CUDA toolkit.*LOWBIT_CUDA=1 pip install.*pip install triton.*reference"
    ):
        backends.namespace_for("cuda", selected)
    with pytest.raises(RuntimeError, match="on 'xpu'.*pip install triton.*reference"):
        backends.namespace_for("xpu", selected)
    assert backends.namespace_for("cuda", "reference") == "lowbit_reference"
    lowbit.quantize(torch.ones(64))  # the CPU is served as before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LOWBIT_CUDA", "yes", "LOWBIT_CUDA: expected 0 or 1, got 'yes'"),
        ("LOWBIT_CUDA_ARCHS", "sm_80", "LOWBIT_CUDA_ARCHS: expected numbers like \"80,90\", got 'sm_80'"),
    ],
)
def test_a_wrong_build_option_is_named(name, value, message):
    """A typing error in an environment variable must not build something else."""
    code = "import runpy; build = runpy.run_path('setup.py'); build['wants_cuda'](); build['cuda_archs']()"
    environment = {**os.environ, name: value}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.parametrize(
    ("rows", "dtype", "format", "capability", "expected"),
    [
        (64, torch.bfloat16, "nf4", (9, 0), "lowbit"),
        (64, torch.bfloat16, "nf4", (10, 0), "lowbit"),
        (65, torch.bfloat16, "nf4", (10, 0), "lowbit_triton"),
        (512, torch.float16, "fp4", (10, 0), "lowbit_triton"),
        (513, torch.bfloat16, "nf4", (10, 0), "lowbit"),
        (128, torch.float32, "nf4", (10, 0), "lowbit"),
        (128, torch.bfloat16, "nf4", (9, 0), "lowbit"),
        (128, torch.bfloat16, "int8", (9, 0), "lowbit"),
        (4, torch.bfloat16, "int8", (8, 0), "lowbit"),
        (5, torch.bfloat16, "int8", (8, 0), "lowbit_triton"),
        (128, torch.float16, "int8", (7, 5), "lowbit"),
        (128, torch.float32, "int8", (8, 0), "lowbit"),
        (128, torch.bfloat16, "nf4", (8, 0), "lowbit"),
        (128, torch.bfloat16, "nf4", (12, 0), "lowbit"),
    ],
)
def test_cuda_or_triton(monkeypatch, rows, dtype, format, capability, expected):
    """Batches on a B200 lose without tcgen05, and int8 without tensor cores. All else is not known to gain."""
    monkeypatch.setattr(native, "DEVICE_TYPES", ("cpu", "meta", "cuda"))
    monkeypatch.setattr(backends.triton, "_MISSING_REASON", None)
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    monkeypatch.setattr(backends, "_CAPABILITIES", {})
    with FakeTensorMode():
        x = torch.empty(rows, 1, 64, dtype=dtype, device="cuda")
    assert backends.namespace_for_product("cuda", x, format, None) == expected
    assert backends.namespace_for_product("cuda", x, format, None) == expected and len(asked) == 1
    for chosen, namespace in backends.NAMESPACES.items():
        assert backends.namespace_for_product("cuda", x, format, chosen) == namespace
    assert backends.namespace_for_experts("cuda", None) == "lowbit_triton"
    monkeypatch.setattr(backends.triton, "_MISSING_REASON", "not installed")
    assert backends.namespace_for_product("cuda", x, format, None) == "lowbit"
    assert backends.namespace_for_experts("cuda", None) == "lowbit"


@pytest.mark.skipif(native.missing_cuda_reason() is not None, reason="this build is the one without CUDA kernels")
def test_the_build_without_cuda(tmp_path):
    """Where nvcc is not found the extension is built all the same, serves the CPU, and says what a GPU would need."""
    environment = os.environ | {"LOWBIT_CUDA": "0", "LOWBIT_NATIVE": "1"}
    # In the folder of the installed package's build: the kernels for CPUs are the same, and are not compiled again.
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "package")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = """
import torch, lowbit
from lowbit.backends import native, triton
assert lowbit.__file__.startswith(FOLDER), lowbit.__file__
assert native.missing_reason() is None and native.CUDA_CAPABILITIES == ()
assert "install the CUDA toolkit" in native.missing_cuda_reason()
q = lowbit.quantize(torch.randn(64, 64))
torch.testing.assert_close(lowbit.linear(torch.eye(64), q), q.dequantize().T)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "package")}
    command = [sys.executable, "-c", code.replace("FOLDER", repr(str(tmp_path)))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
