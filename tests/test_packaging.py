"""What setup.py builds, what an installation says about itself, and the check of torch's headers."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from lowbit.backends import native

ROOT = Path(__file__).parents[1]
BUILD_OPTIONS = ("LOWBIT_NATIVE", "LOWBIT_CUDA", "LOWBIT_CUDA_ARCHS", "CXX")
PACKAGES = ("lowbit", "lowbit_lora")
#: What a compiler without C++20 says.
OLD_COMPILER = "g++: error: unrecognized command-line option '-std=c++20'"


def load(path: Path):
    """Import the module in a file; return it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command, cwd, **variables) -> subprocess.CompletedProcess:
    """Run a command with only those of setup.py's options that are in ``variables``; return its result."""
    environment = {name: value for name, value in os.environ.items() if name not in (*BUILD_OPTIONS, "PYTHONPATH")}
    environment.update({name: str(value) for name, value in variables.items()})
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


def python_files(root: Path) -> set[str]:
    """The modules of both packages under ``root``."""
    return {path.relative_to(root).as_posix() for package in PACKAGES for path in (root / package).rglob("*.py")}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of what git tracks and a build needs, without anything built."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in (*PACKAGES, "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


@pytest.fixture(scope="module")
def old_compiler(tmp_path_factory) -> Path:
    """A compiler that is too old."""
    script = tmp_path_factory.mktemp("compiler") / "old-g++"
    script.write_text(f'#!/bin/sh\necho "{OLD_COMPILER}" >&2\nexit 1\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def source_archive(clone, tmp_path_factory) -> Path:
    """The unpacked source archive."""
    folder = tmp_path_factory.mktemp("archive")
    done = run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=clone, LOWBIT_NATIVE=0)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.iterdir()
    with tarfile.open(archive) as file:
        file.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def pure_installation(source_archive, old_compiler, tmp_path_factory) -> Path:
    """The contents of the wheel that pip makes of the source archive with a compiler that is too old."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    done = run(*command, cwd=source_archive, CXX=old_compiler)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == "lowbit-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "installed")
    return folder / "installed"


def test_the_source_archive_holds_what_a_build_needs(clone, source_archive):
    """pip builds from this archive where the package index has no wheel for a platform."""
    needed = {path.relative_to(clone) for path in (clone / "csrc").rglob("*") if path.is_file()}
    needed |= {Path(name) for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", *python_files(clone))}
    assert not [path for path in needed if not (source_archive / path).is_file()]


def test_a_pure_wheel_holds_both_packages_and_the_reason(clone, pure_installation):
    """A compiler that cannot build the kernels is no reason to fail: the reference needs none."""
    assert python_files(pure_installation) == python_files(clone)
    assert not list(pure_installation.rglob("*.so"))
    assert OLD_COMPILER in (pure_installation / "lowbit" / "native_missing.txt").read_text()


def test_a_pure_installation_says_why_and_what_to_do(pure_installation):
    """pip hides what a build prints, so the reason has to be said where somebody sees it."""
    done = run(sys.executable, "-c", "import lowbit; lowbit.use_backend('native').__enter__()", cwd=pure_installation)
    warning = next(line for line in done.stderr.splitlines() if "RuntimeWarning" in line)
    error = done.stderr.splitlines()[-1]
    for message in (warning, error):
        assert str(pure_installation / "lowbit") in message and OLD_COMPILER in message
        assert "pip install --no-build-isolation ." in message and "LOWBIT_NATIVE=1" in message


def test_a_build_without_native_kernels_says_so_once(clone, old_compiler, tmp_path):
    done = run(
        *(sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", tmp_path, "--bdist-dir", tmp_path / "a"),
        *("build", "--build-base", tmp_path / "build"),
        cwd=clone,
        CXX=old_compiler,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("building without native kernels") == 1 and done.stderr.count(OLD_COMPILER) == 1


def test_native_1_insists(clone, old_compiler, tmp_path):
    """With LOWBIT_NATIVE=1 a compiler that cannot build the kernels fails the build, and says what it said."""
    command = [sys.executable, "setup.py", "build", "--build-base", tmp_path]
    done = run(*command, cwd=clone, CXX=old_compiler, LOWBIT_NATIVE=1, LOWBIT_CUDA=0)
    assert done.returncode != 0 and OLD_COMPILER in done.stdout + done.stderr


def test_an_earlier_build_leaves_nothing_in_the_next(clone, tmp_path):
    """Modules that were removed or renamed since would be installed with the others."""
    gone = tmp_path / "lib" / "lowbit" / "gone.py"
    gone.parent.mkdir(parents=True)
    gone.touch()
    done = run(sys.executable, "setup.py", "build", "--build-base", tmp_path, cwd=clone, LOWBIT_NATIVE=0)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lib" / "lowbit" / "format.py").exists() and not gone.exists()


def test_the_command_needs_no_more_than_is_installed():
    """After `pip install .` the command `lowbit train` would ask for further packages."""
    declared = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    installed = {re.split(r"[>=]", text)[0] for text in re.findall(r'"(.*?)"', declared[1])}
    imported = set()
    for path in (ROOT / "lowbit_lora" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    imported = {"pyyaml" if name == "yaml" else name for name in imported - {*sys.stdlib_module_names, "lowbit"}}
    assert imported - installed == {"datasets"}  # only for parquet files and the hub
    # transformers' Trainer needs both: without peft it takes no model for one with adapters, and evaluates no loss.
    assert {"accelerate", "peft"} <= installed


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module, with none of its options set."""
    for name in BUILD_OPTIONS:
        monkeypatch.delenv(name, raising=False)
    return load(ROOT / "setup.py")


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", r"no C\+\+ compiler was found \(tried no-such-compiler\)"),
        ("false", r"the C\+\+ compiler false cannot build .*exit status 1"),
    ],
)
def test_a_compiler_that_is_no_compiler(setup, monkeypatch, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    assert re.search(reason, setup.missing_native_reason())
    monkeypatch.setenv("LOWBIT_NATIVE", "1")
    assert setup.missing_native_reason() is None


@pytest.mark.parametrize("free_threaded", [False, True])
def test_only_pythons_with_a_limited_api_use_it(setup, monkeypatch, free_threaded):
    """Python.h of a free-threaded build refuses Py_LIMITED_API, and setuptools the abi3 tag."""
    get_config_var = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: free_threaded if name == "Py_GIL_DISABLED" else get_config_var(name)
    )
    monkeypatch.setenv("LOWBIT_CUDA", "0")
    build = setup.native_build()
    (extension,) = build["ext_modules"]
    limited = not free_threaded
    assert any("Py_LIMITED_API" in flag for flag in extension.extra_compile_args) == limited
    assert extension.py_limited_api == limited
    assert build["options"] == ({"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {})


def installed_with_extension() -> Path | None:
    """The folder of the lowbit that is installed here, if it has the extension."""
    try:
        distribution = importlib.metadata.distribution("lowbit")
    except importlib.metadata.PackageNotFoundError:
        return None
    files = [distribution.locate_file(file) for file in distribution.files or () if Path(file).match("lowbit/_C.*")]
    return Path(files[0]).parent if files else None


needs_installation = pytest.mark.skipif(
    installed_with_extension() is None, reason="no lowbit with its extension is installed"
)


@needs_installation
def test_a_compiler_that_built_the_extension_is_asked_for_no_more(setup):
    """The question to the compiler asks for nothing that the kernels do not need."""
    assert setup.missing_native_reason() is None


@needs_installation
def test_the_wheel_serves_every_later_python():
    """The tag says cp310-abi3, and so does the extension's file name."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("a free-threaded Python has no limited API")
    assert "Tag: cp310-abi3-" in importlib.metadata.distribution("lowbit").read_text("WHEEL")
    if os.name == "posix":
        assert (installed_with_extension() / "_C.abi3.so").exists()


@pytest.mark.parametrize("file", ["_C.abi3.so", "native_missing.txt"])
def test_python_m_lowbit_in_a_clone_tells_of_the_installed_package(clone, tmp_path, file):
    """README's line after an installation would not work in the clone, where Python finds unbuilt sources first."""
    installed = tmp_path / "lowbit"
    installed.mkdir()
    (installed / "__init__.py").touch()
    (installed / "__main__.py").write_text("import sys; print(__file__, sys.argv[1:]); sys.exit(3)")
    (installed / file).touch()
    done = run(sys.executable, "-W", "ignore", "-m", "lowbit", "--self-test", cwd=clone, PYTHONPATH=tmp_path)
    assert done.stdout.splitlines() == [
        f"The sources in {clone / 'lowbit'} are not built. The installed lowbit:",
        f"{installed / '__main__.py'} ['--self-test']",
    ]
    assert done.returncode == 3


@pytest.mark.parametrize("installed", [True, False])
def test_sources_that_are_not_built_say_what_to_do(monkeypatch, tmp_path, installed):
    """Users would not be told to start Python elsewhere if a package is installed, and to build if none is."""
    sources, site = tmp_path / "clone" / "lowbit", tmp_path / "site" / "lowbit"
    sources.mkdir(parents=True)
    (sources.parent / "setup.py").touch()
    if installed:
        site.mkdir(parents=True)
        (site / "_C.abi3.so").touch()
    monkeypatch.setattr(native, "PACKAGE", sources)
    monkeypatch.setattr(native, "_IMPORT_ERROR", ImportError("No module named 'lowbit._C'"))
    monkeypatch.setattr(sys, "path", [str(sources.parent), str(site.parent)])
    reason = native._missing_reason()
    assert str(sources) in reason and "python setup.py build_ext --inplace" in reason
    assert (f"that in {site} has one: start Python in another folder" in reason) == installed


def test_an_extension_that_does_not_load_is_named(monkeypatch, tmp_path):
    """An extension built for another torch would not be named, or hidden by another copy."""
    (tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    monkeypatch.setattr(native, "_IMPORT_ERROR", ImportError("undefined symbol: aoti"))
    assert native.installed_copy() is None
    assert str(tmp_path) in native._missing_reason() and "undefined symbol: aoti" in native._missing_reason()


def test_the_check_of_the_headers_reports_and_remembers(setup, monkeypatch, tmp_path):
    """A file that uses what a version lacks is reported each time; one that compiles is not compiled again."""
    if setup.find_compiler() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.syspath_prepend(ROOT)
    check_headers = load(ROOT / "tools" / "check_headers.py")
    monkeypatch.setattr(check_headers, "ROOT", tmp_path)
    headers, sources = tmp_path / "include", tmp_path / "csrc"
    headers.mkdir()
    sources.mkdir()
    (headers / "torch.h").write_text("#define CHECK_THAT_EXISTS(x) (x)\n")
    wrong, right = sources / "wrong.cpp", sources / "right.cpp"
    wrong.write_text("#include <torch.h>\nint value = CHECK_THAT_IS_MISSING(1);\n")
    right.write_text("#include <torch.h>\nint value = CHECK_THAT_EXISTS(1);\n")
    for _ in range(2):
        assert "CHECK_THAT_IS_MISSING" in check_headers.check(wrong, headers)
        assert check_headers.check(right, headers) is None
    right.write_text("int value = CHECK_THAT_IS_MISSING(1);\n")
    assert "CHECK_THAT_IS_MISSING" in check_headers.check(right, headers)
