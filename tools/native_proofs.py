"""Tells whether the kernels without torch passed before under an emulator, with the same sources and tools.

    python tools/native_proofs.py NAME TOOL ...           exit status 0: it is known, and not drawn to be executed
    python tools/native_proofs.py --record NAME TOOL ...  after a run that passed: writes it down

What an emulator computes is decided by the sources of the kernels and of their tests, and by the compiler, its options
and the emulator. Their hash stands in tests/native/proofs.txt. A tenth of the calls execute a known one all the same.
A TOOL is a program, of which the hash takes what ``--version`` prints, a file, or a text such as an option.
"""

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROOFS = ROOT / "tests" / "native" / "proofs.txt"
SHARE = 0.1


def hash_of(tools: list[str]) -> str:
    """A hash of the kernels, of their tests and of the tools."""
    folders = (ROOT / "csrc" / "cpu", ROOT / "tests" / "native")
    sources = [*(ROOT / "csrc").glob("*.h"), *(path for folder in folders for path in folder.rglob("*"))]
    made_of = hashlib.sha256()
    for path in sorted(path for path in sources if path.suffix in (".h", ".cpp")):
        made_of.update(path.relative_to(ROOT).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    for tool in tools:
        made_of.update(tool.encode())
        if Path(tool).is_file():
            made_of.update(Path(tool).read_bytes())
        elif shutil.which(tool):
            made_of.update(subprocess.run([tool, "--version"], capture_output=True, check=True).stdout)
    return made_of.hexdigest()[:24]


def read() -> dict[str, str]:
    """The hash of each name in the file of proofs."""
    lines = PROOFS.read_text().splitlines() if PROOFS.exists() else []
    return {name: proof for proof, name in (line.split(" ", 1) for line in lines)}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where the tests have to be executed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write the hash down")
    parser.add_argument("name")
    parser.add_argument("tools", nargs="*", metavar="TOOL")
    options = parser.parse_args(arguments)
    known, proof = read(), hash_of(options.tools)
    if options.record:
        known[options.name] = proof
        PROOFS.write_text("".join(f"{known[name]} {name}\n" for name in sorted(known)))
        return 0
    if known.get(options.name) != proof:
        print(f"{options.name}: new, executed")
        return 1
    if random.SystemRandom().random() < SHARE:
        print(f"{options.name}: proved before, executed again")
        return 1
    print(f"{options.name}: proved before, with the same sources, compiler and emulator")
    return 0


if __name__ == "__main__":
    sys.exit(main())
