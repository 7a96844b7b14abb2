"""A pytest plugin that skips proofs which passed before with the same code, inputs, emulator and test.

A test that runs kernels on the emulator calls ``step`` before each run, with all that decides the run's result: the PTX
(or all that its compiler makes it of), the launch and its input. The plugin adds the sources of the emulator, of the
test and of what is expected. The hash of all steps of a test is its proof. The file of proofs is under version control.
If it has the hash of a test, the last step is not executed and the test is skipped. Any change of the hash makes the
test run again.

Each run executes a random tenth of the proofs in the file. ``--prove`` executes all, and replaces what the file has of
the test files that ran. Tests of hypothesis draw other inputs each time and always run: their proofs are the steps that
fixtures take, and a known one that is not due runs a tenth of its examples.
"""

import ast
import contextlib
import functools
import hashlib
import random
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from .address_space import as_bytes

EMULATOR = Path(__file__).parent
#: The share of known proofs that each run executes.
SHARE = 0.1
_DEBUG_SECTION = re.compile(r"^\s*\.section\s+\.debug_.*?^\s*\}", re.MULTILINE | re.DOTALL)
_DEBUG_LINE = re.compile(r"^\s*(\.loc|\.file|//|\$L__(tmp|func_begin|func_end)\d+:)")
# nvcc's names of what has internal linkage in a file: "_5c99390c_7_gemm_cu_5fb329c2" has hashes of the file's path.
_HASHES_OF_PATH = re.compile(r"_[0-9a-f]{8}_(\d+_\w+?_cu)_[0-9a-f]{8}")


def digest(parts: Iterable) -> str:
    """A hash of texts, numbers, bytes and arrays (with their dtype, shape and strides) in this order."""
    hashed = hashlib.sha256()
    for part in parts:
        contents, description = b"", repr(part) if isinstance(part, (str, int, float, tuple, type(None))) else ""
        if type(part).__module__ == "torch":
            description, contents = f"{part.dtype} {tuple(part.shape)} {part.stride()}", _tensor_bytes(part)
        elif isinstance(part, np.ndarray):
            description, contents = f"array {part.dtype} {part.shape} {part.strides}", part.tobytes()
        elif isinstance(part, bytes):
            contents = part
        elif not description:
            raise TypeError(f"a proof cannot depend on {part!r}")
        hashed.update(f"{len(description)} {len(contents)} {description}".encode() + contents)
    return hashed.hexdigest()


def _tensor_bytes(tensor) -> bytes:
    """Return the bytes in the order of the elements, without importing torch, which the emulator does not need."""
    if tensor.is_meta:
        return b""
    alignment = tensor.data_ptr() % 16
    return bytes([alignment]) + as_bytes(tensor.contiguous()).tobytes()


def code_of(ptx: str) -> str:
    """Return PTX without what decides nothing: debug information, and the paths of this machine in it and in names."""
    lines = _HASHES_OF_PATH.sub(r"_\1", _DEBUG_SECTION.sub("", ptx)).splitlines()
    return "\n".join(line for line in lines if line.strip() and not _DEBUG_LINE.match(line))


@functools.cache
def sources_of(test: Path) -> tuple[Path, ...]:
    """Return a test's file and the files of its folder that it imports, directly or through each other."""
    found, waiting = set(), [test]
    while waiting:
        path = waiting.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            imported = {test.parent / f"{name.split('.')[0]}.py" for name in names}
            waiting += [path for path in imported if path.exists() and path not in found]
    return tuple(sorted(found))


@functools.cache
def emulator_sources(folder: Path = EMULATOR) -> tuple[Path, ...]:
    """Return the files of the emulator, without its tests and this plugin."""
    own = (*folder.glob("*.py"), *folder.glob("*.c"), *(folder / "instructions").glob("*.py"))
    return tuple(sorted(path for path in own if path.name != Path(__file__).name))


class Proof:
    """What is known of the running test: ``digest`` of its steps so far, None before the first."""

    def __init__(self, name: str, sources: Iterable[Path], known: str | None, is_due: bool, draws: bool = False):
        self.name, self.known, self.is_due, self.draws = name, known, is_due, draws
        self.sources, self.digest = tuple(sources), None
        self.taken: list = []  # what steps were of
        self.is_drawing = False  # hypothesis draws the inputs of all steps from now on

    @property
    def is_spared(self) -> bool:
        """Whether this is a known proof that is not due."""
        return self.digest is not None and self.digest == self.known and not self.is_due

    def step(self, parts: Iterable, of: object = None) -> None:
        """Add a run to the proof; skip the test if this ends a known proof that is not due."""
        self.taken.append(of)
        if self.is_drawing:
            return
        before = [self.digest] if self.digest else [path.read_bytes() for path in self.sources]
        self.digest = digest([self.name, *before, *parts])[:24]
        if self.is_spared and not self.draws:
            pytest.skip("proved before, with the same code, inputs, emulator and test")


@contextlib.contextmanager
def few_examples(test):
    """Context in which a test of hypothesis runs a tenth of its examples."""
    import hypothesis

    name = "_hypothesis_internal_use_settings"  # hypothesis has no public way; test_ptxemu_proofs.py checks this one
    every = getattr(test, name)
    setattr(test, name, hypothesis.settings(every, max_examples=max(1, round(every.max_examples * SHARE))))
    try:
        yield
    finally:
        setattr(test, name, every)


_running: Proof | None = None


def step(*parts, of: object = None) -> None:
    """Call this before a kernel runs, with all that decides its result. It skips the test if the result is known.

    ``of`` is the object that ``has_taken`` looks for.
    """
    if _running is not None:
        _running.step(parts, of)


def has_taken(of: object) -> bool:
    """Whether the running test took a step ``of`` this very object, or is no proof."""
    return _running is None or any(taken is of for taken in _running.taken)


def read(path: Path) -> dict[str, str]:
    """Return the hash of each test in the file of proofs."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: proof for proof, name in (line.split(" ", 1) for line in lines)}


def write(path: Path, proofs: dict[str, str]) -> None:
    """Write one line per test, in the order of their names."""
    path.write_text("".join(f"{proofs[name]} {name}\n" for name in sorted(proofs)))


# ---- pytest's hooks


def pytest_addoption(parser):
    group = parser.getgroup("proofs", "emulated proofs")
    group.addoption("--prove", action="store_true", help="execute every proof, and record those that pass")
    group.addoption("--proof-seed", type=int, help="chooses the known proofs that are executed")
    parser.addini("proofs", "the file of proofs", default="proofs.txt")
    parser.addini("proofs_expect", "files that say what proofs expect", type="paths", default=[])


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if config.option.proof_seed is None:  # the workers of pytest-xdist get the options, and so this number
        config.option.proof_seed = random.SystemRandom().randrange(10**6)
    config.pluginmanager.register(_Session(config), "proofs-session")


class _Session:
    """The plugin's state in one process."""

    def __init__(self, config):
        self.config, self.path = config, config.rootpath / config.getini("proofs")
        self.known, self.proved, self.new = read(self.path), {}, 0
        self.ran: set[str] = set()  # test files
        self.common = [*emulator_sources(), *config.getini("proofs_expect")]

    def pytest_report_header(self):
        return f"proofs: {len(self.known)} known, --proof-seed {self.config.option.proof_seed}"

    def is_due(self, name: str) -> bool:
        generator = random.Random(f"{self.config.option.proof_seed} {name}")
        return self.config.option.prove or generator.random() < SHARE

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        """Fixtures may take steps too. A test of this plugin runs pytest, and has its own proof afterwards."""
        global _running
        outer, known = _running, self.known.get(item.nodeid)
        sources = [*self.common, *sources_of(item.path)]
        draws = hasattr(getattr(item, "obj", None), "hypothesis")
        _running = Proof(item.nodeid, sources, known, self.is_due(item.nodeid), draws)
        yield
        _running = outer

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        _running.is_drawing = _running.draws
        with few_examples(item.obj) if _running.draws and _running.is_spared else contextlib.nullcontext():
            yield
        if _running is not None and _running.digest is not None:
            item.user_properties.append(("proof", _running.digest))

    def pytest_runtest_logreport(self, report):
        self.ran.add(_file_of(report.nodeid))
        proof = dict(report.user_properties).get("proof")
        if report.when == "call" and report.passed and proof is not None:
            self.proved[report.nodeid] = proof
            self.new += self.known.get(report.nodeid) != proof

    def pytest_terminal_summary(self, terminalreporter):
        if self.proved and not self.config.option.prove:
            again = len(self.proved) - self.new
            advice = " (`make prove` records them)" if self.new else ""
            terminalreporter.write_line(f"proofs executed: {again} known ones, {self.new} new ones{advice}")

    def pytest_sessionfinish(self, exitstatus):
        is_worker = hasattr(self.config, "workerinput")
        # A test that failed is left out of the file; those that passed need not run again.
        if self.config.option.prove and not is_worker and exitstatus in (0, pytest.ExitCode.TESTS_FAILED):
            others = {name: proof for name, proof in self.known.items() if self._is_elsewhere(name)}
            write(self.path, others | self.proved)

    def _is_elsewhere(self, name: str) -> bool:
        """Whether a test is in a file that exists, and that this run left out."""
        file = _file_of(name)
        return file not in self.ran and (self.config.rootpath / file).exists()


def _file_of(name: str) -> str:
    return name.split("::", 1)[0]
