"""tools/codegen: what is made once for all test processes is made again when it should be."""

import os
import subprocess
import sys

import pytest
from codegen import cuda_build, once
from conftest_cuda import require_nvcc


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A call of ``made_once`` in a folder of its own, and how often it made something."""
    monkeypatch.setattr(once, "KEPT", tmp_path / "kept")
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "result").write_text(str(len(calls)))

    return lambda *inputs: (once.made_once("thing", inputs, make) / "result").read_text(), calls


def test_equal_inputs_are_made_once(made, tmp_path):
    """The contents of a file count, not its name."""
    get, calls = made
    (tmp_path / "a.cu").write_text("kernel")
    (tmp_path / "b.cu").write_text("kernel")
    assert get("flags", tmp_path / "a.cu") == get("flags", tmp_path / "b.cu") == "1"
    (tmp_path / "a.cu").write_text("edited kernel")
    assert get("flags", tmp_path / "a.cu") == "2"
    assert get("other flags", tmp_path / "a.cu") == "3"
    assert get("flags", b"") != get("flag", b"s")
    assert len(calls) == 5


def test_only_the_newest_is_kept(made, tmp_path):
    """The build folder does not grow with each edit."""
    get, _ = made
    get("one"), get("two")
    assert len([path for path in (tmp_path / "kept" / "thing").iterdir() if path.is_dir()]) == 1


def test_nothing_is_kept_of_a_failure(made, tmp_path):
    """A kernel that does not compile must not pass for compiled in the next run."""

    def fail(folder):
        (folder / "result").write_text("half")
        raise RuntimeError("does not compile")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not compile"):
            once.made_once("thing", ["input"], fail)
    get, calls = made
    assert get("input") == "1" and len(calls) == 1


def test_processes_wait_for_each_other(tmp_path):
    """Two workers of pytest-xdist would compile the same kernels, or read what is half written."""
    code = f"""
import sys, time
sys.path.insert(0, {str(once.ROOT / "tools")!r})
from pathlib import Path
from codegen import once
once.KEPT = Path({str(tmp_path)!r})
def make(folder):
    with open({str(tmp_path / "log")!r}, "a") as log:
        log.write("made ")
    (folder / "result").write_text("half")
    time.sleep(0.5)
    (folder / "result").write_text("whole")
print((once.made_once("thing", ["input"], make) / "result").read_text())
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == ["whole"] * 3
    assert (tmp_path / "log").read_text() == "made "


@pytest.mark.parametrize("edited", ["kernel.cu", "csrc/header.h", "csrc/device/header.cuh", "nvcc"])
def test_an_edit_compiles_cuda_again(tmp_path, monkeypatch, edited):
    """The edit would otherwise be tested, and installed, with the code from before it."""
    (tmp_path / "csrc" / "device").mkdir(parents=True)
    for name in ("kernel.cu", "csrc/header.h", "csrc/device/header.cuh"):
        (tmp_path / name).write_text("old")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("""#!/bin/sh
[ "$1" = --version ] && exit
while [ $# -gt 0 ]; do
  case $1 in
    --keep-dir) echo PTX > $2/kernel.compute_80.ptx;;
    -o) echo made >> $2;;
  esac
  shift
done
""")
    nvcc.chmod(0o755)
    build = cuda_build.setup
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "CUDA_OBJECTS", tmp_path / "cuda")
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)

    def compilations():
        made = build.compile_cuda(tmp_path / "kernel.cu", ("80", "120"))
        assert made.with_suffix(".ptx").read_text() == "PTX\n"
        return made.read_text().count("made")

    assert compilations() == compilations() == 1
    text = (tmp_path / edited).read_text()
    (tmp_path / edited).write_text(text.replace("] && exit", "] && echo newer && exit") if edited == "nvcc" else "new")
    assert compilations() == compilations() == 2


@pytest.mark.parametrize("archs", [("80",), ("80", "90"), ("90", "120")])
def test_nvcc_leaves_what_is_asked_for(tmp_path, monkeypatch, archs):
    """Users install for one GPU and the tests for three: nvcc names its files differently."""
    require_nvcc()
    build = cuda_build.setup
    monkeypatch.setattr(build, "CUDA_OBJECTS", tmp_path)
    made = build.compile_cuda(cuda_build.CSRC / "cuda" / "device.cu", archs)
    assert made.exists() and f".target sm_{archs[0]}" in made.with_suffix(".ptx").read_text()


def test_every_gpu_gets_machine_code_and_later_ones_ptx():
    """A wheel would lack a GPU, which then compiles at each start, or run code on it that spills registers."""
    made = cuda_build.setup.gencodes(("75", "80", "86", "90", "100", "120"))
    of_80 = ["sm_80", "sm_86", "sm_90"]
    assert made == {"75": ["sm_75"], "80": of_80, "100": ["sm_100"], "120": ["sm_120", "compute_120"]}
    assert cuda_build.setup.gencodes(("86",)) == {"86": ["sm_86", "compute_86"]}


def test_the_sources_stay_off_the_path():
    """Processes that tests start would import lowbit from the sources, without kernels, not from its installation."""
    code = f"import sys; from codegen import cuda_build; assert {str(once.ROOT)!r} not in sys.path, sys.path"
    environment = {**os.environ, "PYTHONPATH": str(once.ROOT / "tools")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
