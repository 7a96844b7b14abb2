"""tools/native_proofs.py: which runs of the CPU kernels under an emulator are spared."""

import importlib.util

import pytest
from codegen.once import ROOT


@pytest.fixture
def proofs(monkeypatch, tmp_path):
    """The tool, on sources of its own: a kernel, its test, and a compiler."""
    spec = importlib.util.spec_from_file_location("native_proofs", ROOT / "tools" / "native_proofs.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for name in ("csrc/format.h", "csrc/cpu/isa/neon.cpp", "tests/native/driver.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho version 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "PROOFS", tmp_path / "proofs.txt")
    monkeypatch.setattr(tool, "SHARE", 0)
    return tool


def test_what_passed_is_spared(proofs, monkeypatch):
    """A run would be executed each time, or count as proved before one passed; one time in ten it is executed."""
    assert proofs.main(["neon", "-O2 -static", "compiler"]) == 1
    assert proofs.main(["--record", "neon", "-O2 -static", "compiler"]) == 0
    assert proofs.main(["neon", "-O2 -static", "compiler"]) == 0
    assert proofs.main(["other", "-O2 -static", "compiler"]) == 1
    monkeypatch.setattr(proofs, "SHARE", 1)
    assert proofs.main(["neon", "-O2 -static", "compiler"]) == 1


@pytest.mark.parametrize(
    "edited", ["csrc/format.h", "csrc/cpu/isa/neon.cpp", "tests/native/driver.cpp", "compiler", "option"]
)
def test_every_change_is_executed(proofs, edited):
    """An edited kernel or test, or another compiler, would go untested."""
    proofs.main(["--record", "neon", "-O2 -static", "compiler"])
    if edited == "compiler":
        (proofs.ROOT / edited).write_text("#!/bin/sh\necho version 2\n")
    elif edited != "option":
        (proofs.ROOT / edited).write_text("new")
    assert proofs.main(["neon", "-O3 -static" if edited == "option" else "-O2 -static", "compiler"]) == 1
