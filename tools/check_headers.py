"""Checks that the extension's bindings compile against the headers of every torch that lowbit supports.

    python tools/check_headers.py [VERSION ...]

The extension uses torch's stable ABI, so one binary serves every torch from 2.10 on. But a build uses the headers of
the installed torch, and a macro of one version may be missing from another. For each version this fetches torch's wheel
without its dependencies, keeps the headers in build/headers/, and lets the compiler check (-fsyntax-only) each file of
the bindings with setup.py's own flags. Files that passed before and have not changed are not checked again.

The wheels are those for 64-bit ARM, because they are small. The stable ABI's headers are the same in each wheel.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "headers"
sys.path.insert(0, str(ROOT))

import setup  # noqa: E402  (the build's flags and files)

#: The oldest torch that is supported, those with other headers, and the newest that pip finds.
VERSIONS = ("2.10.0", "2.11.0", "2.12.0", "newest")
#: The folders of torch/include that the stable ABI consists of. Nothing else of torch may be included.
STABLE = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/", "torch/headeronly/")
WHEEL_OPTIONS = [
    *("--no-deps", "--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.12"),
    *("--platform", "manylinux_2_28_aarch64"),
]


def run_pip(*arguments: str) -> str:
    """What pip prints. A failure ends the program with pip's message."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} failed with exit status {done.returncode}:\n{done.stderr}")
    return done.stdout


def newest_version() -> str:
    """The newest torch that pip would install, as "2.13.0". Asked once a day: pip fetches the wheel to know."""
    remembered = FOLDER / "newest"
    if remembered.exists() and time.time() - remembered.stat().st_mtime < 24 * 3600:
        return remembered.read_text()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--dry-run", "--ignore-installed", "--target", folder, "--report", "-"]
        report = json.loads(run_pip("install", *options, *WHEEL_OPTIONS, "torch"))
    version = report["install"][0]["metadata"]["version"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    remembered.write_text(version)
    return version


def headers_of(version: str) -> Path:
    """The folder with the stable headers of a released torch, which is fetched if it is missing."""
    folder = FOLDER / f"torch-{version}"
    if folder.exists():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        run_pip("download", "--quiet", "--dest", temporary, *WHEEL_OPTIONS, f"torch=={version}")
        (wheel,) = Path(temporary).glob("*.whl")
        unpacked = Path(temporary, "unpacked")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.removeprefix("torch/include/").startswith(STABLE)]
            archive.extractall(unpacked, names)
        # Renamed last, so that an interrupted run leaves nothing that looks complete.
        shutil.move(unpacked / "torch" / "include", folder)
    return folder


def key_of(command: list[str]) -> str:
    """A hash of the command, of its compiler and of everything in csrc/ that it may read."""
    compiler = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(json.dumps([command, compiler]).encode())
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def check(source: Path, headers: Path) -> str | None:
    """None if ``source`` compiles against ``headers``, else what the compiler said."""
    command = [*shlex.split(setup.find_compiler()), *setup.cxx_flags(), *setup.python_include_flags()]
    command += ["-fsyntax-only", "-isystem", str(headers), str(source)]
    passed = headers / f"{source.stem}.passed"
    key = key_of(command)
    if passed.exists() and passed.read_text() == key:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return f"{shlex.join(command)}\n{done.stderr}"
    passed.write_text(key)
    return None


def main() -> int:
    """Checks every version that the command line names; returns the exit status, 1 if a file does not compile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "versions", nargs="*", default=VERSIONS, help=f"versions of torch (default: {', '.join(VERSIONS)})"
    )
    names = parser.parse_args().versions
    if setup.find_compiler() is None:
        raise SystemExit("no C++ compiler was found: install g++ or clang++, or name one in CXX")
    versions = [newest_version() if name == "newest" else name for name in names]
    cases = [(version, source) for version in versions for source in (setup.CPU_BINDINGS, setup.CUDA_BINDINGS)]
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        folders = dict(zip(versions, pool.map(headers_of, versions), strict=True))
        problems = pool.map(lambda case: check(case[1], folders[case[0]]), cases)
        for (version, source), problem in zip(cases, problems, strict=True):
            result = "compiles" if problem is None else f"DOES NOT COMPILE:\n{problem}"
            print(f"torch {version}: {source.relative_to(ROOT)} {result}", flush=True)
            failed += problem is not None
    print(f"{len(cases) - failed} of {len(cases)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
