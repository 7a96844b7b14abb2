"""LOWBIT_TRITON_AUTOTUNE=1: which configurations are measured, when, and what is kept of it. No GPU is needed."""

import json

import pytest
import torch
from conftest_triton import compiled_only, function, launches, tensor, weight

from lowbit.backends.triton import shapes_backward
from lowbit.backends.triton import shapes_forward as shapes
from lowbit.backends.triton.gpu import Gpu
from lowbit.backends.triton.launch import traced
from lowbit.backends.triton.shapes import Problem

A100, H100 = Gpu(80, 108), Gpu(90, 132)
PROBLEM = Problem(8, 64, 256, torch.bfloat16, "nf4", 64)
CONFIGS = [shapes.Config(8, 64, 64, 2, stages, True) for stages in (2, 3, 4)]


@pytest.fixture
def autotune(monkeypatch, tmp_path):
    """The module, switched on, with an empty cache in a folder of its own, and a call's result for its time."""
    from lowbit.backends.triton import autotune

    monkeypatch.setattr(autotune, "WANTED", True)
    monkeypatch.setattr(autotune, "cache_path", lambda: tmp_path / "cache" / "found.json")
    monkeypatch.setattr(autotune, "measure", lambda run: run())
    autotune._found.cache_clear()
    yield autotune
    autotune._found.cache_clear()


def test_keeps_the_fastest(autotune):
    """Measured once per shape and machine: the next process reads what was found."""
    measured = []
    run = lambda config: measured.append(config) or abs(config.stages - 3)  # noqa: E731
    assert autotune.chosen("linear", PROBLEM, A100, CONFIGS, run) == CONFIGS[1]
    assert measured == CONFIGS
    autotune._found.cache_clear()
    assert autotune.chosen("linear", PROBLEM, A100, CONFIGS, run) == CONFIGS[1]
    assert autotune.chosen("linear", PROBLEM, H100, CONFIGS[:1], run) == CONFIGS[0]
    assert len(measured) == 4
    assert [path.name for path in autotune.cache_path().parent.iterdir()] == ["found.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_searches_again_after_a_broken_file(autotune, content):
    """A half-written or foreign file must cost a search, not the training run."""
    autotune.cache_path().parent.mkdir()
    autotune.cache_path().write_text(content)
    with pytest.warns(UserWarning, match="found.json: cannot be read"):
        assert autotune.chosen("linear", PROBLEM, A100, CONFIGS, lambda config: config.stages) == CONFIGS[0]
    assert len(json.loads(autotune.cache_path().read_text())) == 1


def test_passes_over_what_does_not_run(autotune):
    """A configuration that a GPU has too little shared memory for is no reason to stop."""
    from triton.runtime.errors import OutOfResources

    def run(config):
        if config.stages < 4:
            raise OutOfResources(2, 1, "shared memory")
        return 1.0

    assert autotune.chosen("linear", PROBLEM, A100, CONFIGS, run) == CONFIGS[2]
    with pytest.raises(RuntimeError, match="none of 2 configurations"):
        autotune.chosen("linear", PROBLEM, H100, CONFIGS[:2], run)


def test_measures_nothing_while_a_graph_is_made(autotune, monkeypatch):
    """Nothing runs then: a measurement would end the capture of a CUDA graph, or be a node of torch.compile's."""
    run = lambda config: -config.stages  # noqa: E731
    with traced():
        assert autotune.chosen("linear", PROBLEM, A100, CONFIGS, run) == CONFIGS[0]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert autotune.chosen("linear", PROBLEM, A100, CONFIGS, run) == CONFIGS[0]
    assert autotune.chosen("linear", PROBLEM, A100, CONFIGS, run) == CONFIGS[2]
    with traced():  # what is known is used
        assert autotune.chosen("linear", PROBLEM, A100, CONFIGS, run) == CONFIGS[2]


def operands(name: str) -> tuple:
    """A call of 8 rows, or 8 tokens of 4 experts, of a matrix or matrices [1024, 4096]."""
    half = {"dtype": torch.bfloat16}
    experts = 4 if name.startswith("grouped") else 1
    x = tensor(8, 1024 if name.endswith("grad_input") else 4096, **half)
    ends = (tensor(experts, dtype=torch.int32),) if experts > 1 else ()
    tail = (4096,) if name.endswith("grad_input") else (1024, None, None, None, 1.0)
    return x, *weight((experts * 1024, 4096), "nf4"), *ends, *tail


@compiled_only
@pytest.mark.parametrize("name", ["linear", "linear_grad_input", "grouped_linear", "grouped_linear_grad_input"])
def test_every_product_is_tuned(autotune, monkeypatch, name):
    """An operation left out would run as predicted, whatever its user asked for."""
    choices = shapes_backward.grad_input_configs if name.endswith("grad_input") else shapes.linear_configs
    problem = Problem(8, 1024, 4096, torch.bfloat16, "nf4", 64, 4 if name.startswith("grouped") else 0)
    expected = choices(problem, A100)
    assert len(expected) > 1
    times = iter([*[2.0] * (len(expected) - 1), 1.0])
    monkeypatch.setattr(autotune, "measure", lambda run: run() or next(times))
    with launches("sm_80") as made:
        function(name)(*operands(name))
    ((key, kept),) = json.loads(autotune.cache_path().read_text()).items()
    assert key == f"{name} {problem} {A100}"
    assert kept == vars(expected[-1])
    kernels = [launch for launch in made if "SPLITS" not in launch.values or "packed" in launch.values]
    assert len(kernels) == len(expected) + 1  # each configuration once, then the fastest


@compiled_only
def test_nothing_is_measured_unless_asked(autotune, monkeypatch):
    """Without the variable the first call must not take seconds, nor numbers depend on a measurement."""
    monkeypatch.setattr(autotune, "WANTED", False)
    monkeypatch.setattr(autotune, "measure", lambda run: pytest.fail("measured"))
    with launches("sm_80") as made:
        function("linear_grad_input")(*operands("linear_grad_input"))
    assert [launch.kernel.__name__ for launch in made] == ["grad_input_kernel", "sum_splits_kernel"]
