"""Which proofs are skipped: none that changed, none that failed, and of the rest all but a tenth."""

import sys

import numpy as np
import pytest
import torch
from ptxemu import proofs

pytest_plugins = ["pytester"]

PTX = """
.version 8.4
.target sm_80
.address_size 64
    .file 1 "/somewhere/kernel.py"
.visible .entry add()
{
    .loc 1 3 0
    // a comment
    add.s32 %r1, %r2, 1;
$L__tmp0:
$L__BB0_1:
    ret;
}
    .section .debug_abbrev
    {
.b8 1
    }
"""

TEST = """
import numpy as np
import pytest
from helper import EXPECTED
from ptxemu import proofs

@pytest.mark.parametrize("case", [1, 2])
def test_add(case):
    proofs.step("PTX", np.array([case]))
    with open("executed.txt", "a") as executed:
        executed.write(f"{case}")
    assert case < EXPECTED
"""


@pytest.fixture
def project(pytester, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # none is needed, and they take long to import
    # Byte code is taken for that of a file of the same size and second, and tests edit files faster than that.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    pytester.makepyfile(helper="EXPECTED = 3", test_kernels=TEST)
    return pytester


def executed(project, *arguments):
    """The cases that a run executes. With this seed no known one is due."""
    log = project.path / "executed.txt"
    log.write_text("")
    project.runpytest_inprocess("-p", "ptxemu.proofs", "-p", "no:cacheprovider", "--proof-seed=0", *arguments)
    return sorted(log.read_text())


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_what_was_proved_is_not_executed_again(project):
    """A proof would be executed in every run, or count as proved before `--prove` has recorded it."""
    assert executed(project) == executed(project) == ["1", "2"]
    assert executed(project, "--prove") == ["1", "2"]
    assert executed(project) == []
    assert executed(project, "--prove") == ["1", "2"]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("ptx", "add", "sub"),
        ("input", "1", "2"),
        ("test_kernels.py", "case < EXPECTED", "case <= EXPECTED"),
        ("helper.py", "EXPECTED = 3", "EXPECTED = 4"),
        ("engine.py", "lanes", "no lanes"),
    ],
)
def test_every_change_is_executed(tmp_path, file, old, new):
    """A change of the kernel, input, test, its imports, emulator or expectation would go untested."""
    files = {"ptx": "add", "input": "1", "test_kernels.py": TEST, "helper.py": "EXPECTED = 3", "engine.py": "lanes"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    def is_executed(known):
        sources = [tmp_path / "engine.py", *proofs.sources_of(tmp_path / "test_kernels.py")]
        proof = proofs.Proof("test_add[1]", sources, known, is_due=False)
        try:
            proof.step([(tmp_path / "ptx").read_text(), (tmp_path / "input").read_bytes()])
        except pytest.skip.Exception:
            return False, proof.digest
        return True, proof.digest

    first, digest = is_executed(None)
    assert first and is_executed(digest) == (False, digest)
    edit(tmp_path / file, old, new)
    again, other = is_executed(digest)
    assert again and other != digest


def test_the_emulator_is_all_its_files():
    """A file that is left out could change without a proof being executed again."""
    found = {path.relative_to(proofs.EMULATOR).as_posix() for path in proofs.emulator_sources()}
    assert {"engine.py", "parser.py", "cudart_stub.c", "instructions/matrix.py"} <= found
    everything = {path.relative_to(proofs.EMULATOR) for path in proofs.EMULATOR.rglob("*") if path.is_file()}
    others = {path for path in everything if path.as_posix() not in found}
    assert all(
        path.parts[0] == "tests" or "__pycache__" in path.parts or path.suffix == ".md" or path.name == "proofs.py"
        for path in others
    )


def test_a_failing_proof_is_not_recorded(project):
    """A proof that fails now would stay known because it passed before, or those that passed would run again."""
    executed(project, "--prove")
    edit(project.path / "helper.py", "3", "2")
    assert executed(project, "--prove") == ["1", "2"]
    assert list(proofs.read(project.path / "proofs.txt")) == ["test_kernels.py::test_add[1]"]
    assert executed(project) == executed(project) == ["2"]


def test_proofs_of_other_files_stay(project):
    """Recording the proofs of one file would have every run execute all others again."""
    other = project.path / "test_more.py"
    other.write_text(TEST)
    executed(project, "--prove")
    both = proofs.read(project.path / "proofs.txt")
    assert len(both) == 4
    executed(project, "--prove", "test_kernels.py")
    assert proofs.read(project.path / "proofs.txt") == both
    other.unlink()
    executed(project, "--prove", "test_kernels.py")
    assert len(proofs.read(project.path / "proofs.txt")) == 2


def test_a_tenth_is_executed_by_the_seed():
    """Every proof comes around, and the seed says which."""

    class Config:
        rootpath = proofs.EMULATOR

        class option:
            prove, proof_seed = False, 0

        def getini(self, name):
            return "none.txt" if name == "proofs" else []

    session = proofs._Session(Config())
    names = [f"test[{number}]" for number in range(1000)]
    due = [name for name in names if session.is_due(name)]
    assert 70 < len(due) < 130 and due == [name for name in names if session.is_due(name)]
    Config.option.proof_seed = 1
    assert due != [name for name in names if session.is_due(name)]


def test_the_seed_is_printed(project):
    """A run that fails on a proof can be repeated."""
    result = project.runpytest_inprocess("-p", "ptxemu.proofs")
    result.stdout.re_match_lines([r"proofs: 0 known, --proof-seed \d+", r"proofs executed: 0 known ones, 2 new ones.*"])


def test_only_the_last_step_is_spared(project):
    """The input of a later step may be what an earlier one makes."""
    steps = TEST.replace(
        "    assert", "    proofs.step('another')\n    open('executed.txt', 'a').write('+')\n    assert"
    )
    (project.path / "test_kernels.py").write_text(steps)
    assert executed(project, "--prove") == ["+", "+", "1", "2"]
    assert executed(project) == ["1", "2"]


def test_steps_are_taken_once(project):
    """Launches that were collected together are one step, whichever of them is first."""
    twice = TEST.replace("case):", "case, made=[]):").replace("([case]))", "([case]), of=made)")
    twice += "    assert proofs.has_taken(made) and not proofs.has_taken([])"
    (project.path / "test_kernels.py").write_text(twice)
    assert executed(project, "--prove") == ["1", "2"]
    assert executed(project) == []


def test_hypothesis_runs_a_tenth_of_its_examples(project):
    """hypothesis draws other inputs each time: some must be tried in every run, and all after a change of the code."""
    (project.path / "conftest.py").write_text(
        "import pytest\nfrom helper import EXPECTED\nfrom ptxemu import proofs\n"
        "@pytest.fixture(autouse=True)\ndef code(): proofs.step('PTX', EXPECTED)\n"
    )
    given = "from hypothesis import given, settings, strategies\n@settings(max_examples=30, database=None)\n"
    given += "@given(strategies.integers(-(2**40), 2))"
    (project.path / "test_kernels.py").write_text(TEST.replace('@pytest.mark.parametrize("case", [1, 2])', given))

    def examples(*arguments):
        executed(project, *arguments)
        return (project.path / "executed.txt").read_text().count("|")

    edit(project.path / "test_kernels.py", "{case}", "{case}|")
    assert examples() == examples("--prove") == 30
    assert examples() == 3
    assert examples("--prove") == 30
    edit(project.path / "helper.py", "EXPECTED = 3", "EXPECTED = 4")
    assert examples() == 30


def test_steps_of_drawn_inputs_are_no_proof(project):
    """Their hash would be another one in each run."""
    given = "from hypothesis import given, strategies\n@given(strategies.just(1))"
    (project.path / "test_kernels.py").write_text(TEST.replace('@pytest.mark.parametrize("case", [1, 2])', given))
    assert executed(project, "--prove") and executed(project)
    assert proofs.read(project.path / "proofs.txt") == {}


def test_workers_share_the_seed_and_the_file(project, monkeypatch):
    """With pytest-xdist, workers would choose different tenths, or their proofs would be lost."""
    pytest.importorskip("xdist")
    monkeypatch.setenv("PYTHONPATH", str(proofs.EMULATOR.parent))
    project.runpytest_subprocess("-p", "ptxemu.proofs", "-p", "xdist", "-n2", "--prove").assert_outcomes(passed=2)
    assert len(proofs.read(project.path / "proofs.txt")) == 2
    result = project.runpytest_subprocess("-p", "ptxemu.proofs", "-p", "xdist", "-n2", "--proof-seed=0")
    result.assert_outcomes(skipped=2)


def test_the_folder_of_the_sources_is_no_code():
    """nvcc makes names of the sources' path: every proof would be unknown in another clone."""
    ours, theirs = (
        f".entry _ZN6lowbit39_GLOBAL__N__{path}_7_gemm_cu_5fb329c26kernelE() {{ mov.u64 %rd1, "
        f"_ZN37_INTERNAL_{path}_7_gemm_cu_5fb329c26lowbit3mapE; }}"
        for path in ("5c99390c", "faaa4246")
    )
    assert proofs.code_of(ours) == proofs.code_of(theirs) != proofs.code_of(theirs.replace("_gemm_", "_gemv_"))


def test_debug_information_is_no_code():
    """Debug information holds the folder and line numbers of the sources, which would change each hash."""
    code = proofs.code_of(PTX)
    assert "add.s32" in code and "$L__BB0_1" in code
    assert all(word not in code for word in ("somewhere", ".loc", "comment", "tmp0", "debug", ".b8"))
    assert code == proofs.code_of(PTX.replace("/somewhere", "/elsewhere").replace(".loc 1 3", ".loc 1 4"))
    assert code != proofs.code_of(PTX.replace("%r2, 1", "%r2, 2"))


def test_a_digest_tells_values_apart():
    """Values with equal bytes but other types or shapes would share a proof."""
    zeros = torch.zeros(4, 4)
    values = [
        *("1", 1, 1.0, (1,), None, b"1", zeros, zeros.int(), zeros.view(16), zeros.t()[::2], zeros + 1),
        *(np.zeros(4), np.zeros(4, np.int64)),
    ]
    digests = [proofs.digest([value]) for value in values]
    assert len(set(digests)) == len(values) and digests == [proofs.digest([value]) for value in values]
    assert proofs.digest(["ab", "c"]) != proofs.digest(["a", "bc"])
    with pytest.raises(TypeError, match="cannot depend on"):
        proofs.digest([object()])
