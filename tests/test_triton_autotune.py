"""LOWBIT_TRITON_AUTOTUNE=1: which configurations are measured, when, and what is kept. No GPU is needed."""

import contextlib
import dataclasses
import json
import os
import pathlib
import stat

import pytest
import torch
from conftest_triton import A100, compiled_only, function, interpreted, launches, tensor, weight
from triton.compiler.errors import CompilationError, CompileTimeAssertionFailure
from triton.runtime.errors import OutOfResources, PTXASError

import lowbit
from lowbit.backends.triton import shapes
from lowbit.backends.triton.launch import traced
from lowbit.backends.triton.shapes import Gpu, Problem
from lowbit.format import WeightSpec

H100 = Gpu(90, 132)
PROBLEM = Problem("linear", 8, 64, 256, torch.bfloat16, WeightSpec())
CONFIGS = [shapes.Config(8, 64, 64, 2, stages, True) for stages in (2, 3, 4)]


@pytest.fixture
def autotune(monkeypatch, tmp_path):
    """The module, switched on, with an empty cache in a folder of its own, and a call's result for its time."""
    from lowbit.backends.triton import autotune

    monkeypatch.setattr(autotune, "WANTED", True)
    monkeypatch.setattr(autotune, "INTERPRETED", False)
    monkeypatch.setattr(autotune, "cache_folder", lambda: tmp_path / "cache" / "found")
    monkeypatch.setattr(autotune, "measure", lambda run: run())
    monkeypatch.setattr(autotune, "_KNOWN", {})
    return autotune


@contextlib.contextmanager
def process(autotune, known: dict | None = None):
    """Act as another process, which knows only ``known`` (nothing, if it is new) and what it reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "_KNOWN", {} if known is None else known)
        yield


def search(autotune, problem=PROBLEM, best=3):
    """The chosen configuration if that with ``best`` stages is the fastest."""
    return autotune.chosen(problem, A100, CONFIGS, lambda config: abs(config.stages - best))


def kept(autotune, problem=PROBLEM):
    """What a new process chooses without measuring."""
    with process(autotune):
        return autotune.chosen(problem, A100, CONFIGS, lambda config: pytest.fail("measured"))


def test_keeps_the_fastest(autotune):
    """Measured once per shape and machine: the next process reads what was found."""
    measured = []
    run = lambda config: measured.append(config) or abs(config.stages - 3)  # noqa: E731
    assert autotune.chosen(PROBLEM, A100, CONFIGS, run) == CONFIGS[1]
    assert measured == CONFIGS
    with process(autotune):
        assert autotune.chosen(PROBLEM, A100, CONFIGS, run) == CONFIGS[1]
    assert autotune.chosen(PROBLEM, H100, CONFIGS[:1], run) == CONFIGS[0]
    assert len(measured) == 4


def test_reads_a_file_once(autotune):
    """Every product of every layer asks: from the second time on it must not cost a look at the disk."""
    search(autotune)
    with process(autotune):
        assert search(autotune) == CONFIGS[1]
        for path in autotune.cache_folder().iterdir():
            path.unlink()
        assert search(autotune, best=4) == CONFIGS[1]


def test_processes_keep_each_others_finds(autotune):
    """Two that tune at the same time, a training run on each GPU: else the later to write drops what the other found,
    and every start searches again.
    """
    wider = dataclasses.replace(PROBLEM, n=128)
    first, second = {}, {}
    for known, problem, best in ((first, PROBLEM, 3), (second, wider, 4)):
        with process(autotune, known):
            assert search(autotune, problem, best).stages == best
    assert (kept(autotune), kept(autotune, wider)) == (CONFIGS[1], CONFIGS[2])
    with process(autotune, first):
        assert search(autotune, wider, best=2) == CONFIGS[2]  # what the other has found is used while both run


BROKEN = {
    "half of it": b'{"key": "linear',
    "a list": b"[]",
    "no key": b'{"config": {}}',
    "another key": b'{"key": "another", "config": {}}',
    "no fields": b'{"key": "KEY", "config": 3}',
    "deeply nested": b"[" * 200_000,
    "binary": b"\xff\xfe\x00",
    "empty": b"",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_searches_again_after_a_broken_file(autotune, content):
    """A half-written or foreign file must cost a search, not the training run."""
    search(autotune)
    (path,) = autotune.cache_folder().iterdir()
    path.write_bytes(content.replace(b"KEY", json.loads(path.read_text())["key"].encode()))
    with process(autotune), pytest.warns(UserWarning, match=f"{path.name}: cannot be read"):
        assert search(autotune, best=4) == CONFIGS[2]
    assert kept(autotune) == CONFIGS[2]


def test_searches_again_for_a_configuration_that_is_no_more(autotune):
    """A file that an older version wrote: its fields, or their values, may be none of this one's."""
    search(autotune)
    (path,) = autotune.cache_folder().iterdir()
    path.write_text(path.read_text().replace('"stages": 3', '"stages": 9'))
    with process(autotune):
        assert search(autotune, best=4) == CONFIGS[2]
    assert kept(autotune) == CONFIGS[2]


@pytest.mark.parametrize("fails", [(os, "replace"), (pathlib.Path, "write_text")], ids=["replace", "write"])
def test_a_failed_write_leaves_nothing(autotune, monkeypatch, fails):
    """On a full or odd disk each new shape would leave one more file behind; and the search itself must not be lost."""
    owner, name = fails

    def refuse(path, *rest):
        pathlib.Path(path).touch()  # a disk may be full after half of it was written
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse)
        with pytest.warns(UserWarning, match="cannot be written .no space left"):
            assert search(autotune) == CONFIGS[1]
    assert list(autotune.cache_folder().iterdir()) == []
    assert search(autotune, best=4) == CONFIGS[1]


def test_a_folder_that_cannot_be_is_no_error(autotune):
    """A cache directory on a read-only disk must not end a training run."""
    autotune.cache_folder().parent.write_text("a file in its place")
    with pytest.warns(match="cannot be read"), pytest.warns(match="cannot be written"):
        assert search(autotune) == CONFIGS[1]


def test_others_may_read_what_is_kept(autotune):
    """A cache directory that users of a machine share: a file of mode 0600 is a warning and a search for all others."""
    mask = os.umask(0o022)
    try:
        search(autotune)
    finally:
        os.umask(mask)
    (path,) = autotune.cache_folder().iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


DO_NOT_RUN = [
    OutOfResources(2, 1, "shared memory"),
    CompilationError(None, None, "no such tile"),
    CompileTimeAssertionFailure(None, None, "no such tile"),
    PTXASError("ptxas fatal"),
]


@pytest.mark.parametrize("error", DO_NOT_RUN, ids=lambda error: type(error).__name__)
def test_passes_over_what_does_not_run(autotune, error):
    """A configuration that a GPU has too little shared memory for, or that a compiler refuses, is no reason to stop."""

    def run(config):
        if config.stages < 4:
            raise error
        return 1.0

    assert autotune.chosen(PROBLEM, A100, CONFIGS, run) == CONFIGS[2]
    with pytest.raises(RuntimeError, match="none of 2 configurations"):
        autotune.chosen(PROBLEM, H100, CONFIGS[:2], run)


def test_other_errors_are_told(autotune):
    """A fault of the kernel, such as an illegal address, must not be hidden as a slow configuration."""

    def run(config):
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        autotune.chosen(PROBLEM, A100, CONFIGS, run)


@interpreted
def test_nothing_is_measured_by_the_interpreter(monkeypatch):
    """There is no GPU, whose driver a measurement asks for: the variable set for all runs would end those on a CPU."""
    from lowbit.backends.triton import autotune

    monkeypatch.setattr(autotune, "WANTED", True)
    monkeypatch.setattr(autotune, "measure", lambda run: pytest.fail("measured"))
    eye = torch.eye(64)
    with lowbit.use_backend("triton"):
        y = lowbit.linear(eye.bfloat16(), lowbit.quantize(eye, double_quant=False))
    assert torch.equal(y, eye.bfloat16())


def test_measures_nothing_while_a_graph_is_made(autotune, monkeypatch):
    """Nothing runs then: a measurement would end the capture of a CUDA graph, or be a node of torch.compile's."""
    run = lambda config: -config.stages  # noqa: E731
    with traced():
        assert autotune.chosen(PROBLEM, A100, CONFIGS, run) == CONFIGS[0]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert autotune.chosen(PROBLEM, A100, CONFIGS, run) == CONFIGS[0]
    assert autotune.chosen(PROBLEM, A100, CONFIGS, run) == CONFIGS[2]
    with traced():  # what is known is used
        assert autotune.chosen(PROBLEM, A100, CONFIGS, run) == CONFIGS[2]


def operands(name: str) -> tuple:
    """The operands of 8 rows for a matrix [1024, 4096], or of 8 tokens for 4 experts of that size."""
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
    op, experts = name.removeprefix("grouped_"), 4 if name.startswith("grouped") else 0
    problem = Problem(op, 8, 1024, 4096, torch.bfloat16, WeightSpec(), experts)
    expected = shapes.configs(problem, A100)
    assert len(expected) > 1
    times = iter([*[2.0] * (len(expected) - 1), 1.0])
    monkeypatch.setattr(autotune, "measure", lambda run: run() or next(times))
    with launches("sm_80") as made:
        function(name)(*operands(name))
    (path,) = autotune.cache_folder().iterdir()
    assert json.loads(path.read_text()) == {"key": f"{problem} {A100}", "config": vars(expected[-1])}
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
