"""Settings of all tests: where compilers keep their results, and which tests need Triton's interpreter."""

import functools
import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

pytest_plugins = ["ptxemu.proofs"]

# Triton compiles each kernel once for all tests, and for the next run.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "triton"))

#: Tests that execute CUDA kernels on inputs that their own files make: through the launchers, and through the bindings.
LAUNCHER_PROOFS = {f"test_cuda_{name}.py" for name in ("dequantize", "descent", "gemm", "gemv", "large", "lora")}
LAUNCHER_PROOFS |= {"test_cuda_grad_input.py", "test_cuda_quantize.py"}
BINDING_PROOFS = {"test_cuda_bindings.py", "test_cuda_bindings_linear.py", "test_cuda_optim.py"}
#: Those that go through the public functions and layers: any source of the packages may decide what they launch.
LAYER_PROOFS = {"test_cuda_bindings_factors.py", "test_cuda_bindings_lora.py"}
#: What `make test-fast` leaves out: tests that execute, compile or count machine code, and those that start programs.
SLOW = ("test_cuda_", "test_triton_", "test_ptxemu_", "test_predict_gpu", "test_benchmarks", "test_example")
FAST = ("test_triton_autotune", "test_triton_traced")


def pytest_ignore_collect(collection_path):
    """Import only the files that have tests for Triton's interpreter, where it is on."""
    is_test = collection_path.name.startswith("test_")
    if os.environ.get("TRITON_INTERPRET") == "1" and is_test and "interpreted" not in collection_path.read_text():
        return True
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.startswith(SLOW) and not item.path.name.startswith(FAST):
            item.add_marker("slow")


@functools.cache
def told_by_interpreter() -> str:
    """A hash of what decides what Triton's interpreter computes: lowbit's sources, Triton, numpy and torch."""
    from ptxemu import proofs

    import lowbit

    sources = sorted(Path(lowbit.__file__).parent.rglob("*.py"))
    versions = [importlib.metadata.version(name) for name in ("triton", "numpy", "torch")]
    return proofs.digest([*versions, *(path.read_bytes() for path in sources)])


@functools.cache
def told_by_packages() -> str:
    """A hash of the Python sources of lowbit and lowbit_lora below the command line, and of transformers' version."""
    from ptxemu import proofs

    import lowbit
    import lowbit_lora

    folders = [Path(package.__file__).parent for package in (lowbit, lowbit_lora)]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py")) if path.parent.name != "cli"]
    sources = [path.read_bytes() for path in paths]
    return proofs.digest([importlib.metadata.version("transformers"), *sources])


@pytest.fixture(autouse=True)
def proved_by_sources(request):
    """Skip a test that passed with the same kernels, launchers, bindings and sources of tests."""
    if request.node.get_closest_marker("interpreted"):
        from ptxemu import proofs

        proofs.step(told_by_interpreter())
    name = request.path.name
    if name in LAUNCHER_PROOFS | BINDING_PROOFS | LAYER_PROOFS:
        import conftest_cuda
        from ptxemu import proofs

        bindings = [conftest_cuda.told_by_bindings()] if name in BINDING_PROOFS | LAYER_PROOFS else []
        packages = [told_by_packages()] if name in LAYER_PROOFS else []
        proofs.step(conftest_cuda.told_by_sources(), *bindings, *packages)


def pytest_runtest_setup(item):
    from lowbit.backends import triton

    if item.get_closest_marker("interpreted") and not triton.INTERPRETED:
        pytest.skip("runs under TRITON_INTERPRET=1; `make test` does both")


@pytest.fixture(scope="module")
def example(request):
    """The example that the tests' module names, as a module; its neighbours are found as when it runs as a script."""
    examples = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, examples)
    try:
        yield importlib.import_module(request.module.EXAMPLE)
    finally:
        sys.path.remove(examples)


@pytest.fixture
def assert_stops_at_once(example, tmp_path, capsys):
    """Asserts that the example, given these arguments, says a text and ends with status 2 before any work."""

    def check(arguments: list[str], expected: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            example.main(arguments)
        assert stopped.value.code == 2
        assert expected in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()

    return check
