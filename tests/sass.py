"""The machine code that nvcc makes of a kernel: its instructions, its loops, its registers.

The disassembler is the one in Triton's package (the CUDA toolkit of a slim image has none).
"""

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest_cuda import ROOT, nvcc

ARCHS = ("sm_80", "sm_90", "sm_120")


@dataclass
class Kernel:
    """One compiled kernel; ``instructions`` are (address, text without the predicate)."""

    name: str
    arch: str
    registers: int
    stack: int
    local: int
    instructions: list[tuple[int, str]]

    def loops(self) -> list[list[str]]:
        """The bodies of all loops: from the target of each backward branch to the branch."""
        index = {address: i for i, (address, _) in enumerate(self.instructions)}
        bodies = []
        for end, (address, text) in enumerate(self.instructions):
            branch = re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)", text)
            if branch and int(branch[1], 16) < address:
                start = index[int(branch[1], 16)]
                bodies.append([text for _, text in self.instructions[start : end + 1]])
        return bodies

    def smallest_loop(self, *opcodes: str) -> list[str]:
        """The shortest loop that has each of these opcodes (with any suffix between their dots)."""
        fitting = [body for body in self.loops() if all(count(body, opcode) for opcode in opcodes)]
        assert fitting, f"{self.name} for {self.arch}: no loop with {', '.join(opcodes)}"
        return min(fitting, key=len)


def count(body: list[str], opcode: str) -> int:
    """How many instructions are ``opcode``: "LDG.128" counts LDG.E.NA.128.CONSTANT, "LDG" every global load."""
    parts = opcode.split(".")
    opcodes = Counter(tuple(text.split()[0].split(".")) for text in body)
    return sum(n for have, n in opcodes.items() if have[0] == parts[0] and set(parts) <= set(have))


def _cuobjdump() -> str:
    spec = importlib.util.find_spec("triton")
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec else None
    found = str(carried) if carried and carried.exists() else shutil.which("cuobjdump")
    if found is None:
        pytest.skip("cuobjdump not found: `pip install triton` brings it")
    return found


def _compile(source: Path, arch: str) -> tuple[str, str]:
    """What cuobjdump prints of a .cu file: ``(resource usage, machine code)``."""
    tool = _cuobjdump()
    cubin = ROOT / "build" / "tests" / f"{source.stem}.{arch}.cubin"
    cubin.parent.mkdir(parents=True, exist_ok=True)
    nvcc("-cubin", f"-arch={arch}", source, "-o", cubin)

    def dump(option: str) -> str:
        return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout

    return dump("-res-usage"), dump("-sass")


@functools.cache
def kernels(source: Path) -> tuple[Kernel, ...]:
    """Every kernel of a .cu file, for each of :data:`ARCHS`."""
    with ThreadPoolExecutor() as pool:
        printed = list(pool.map(functools.partial(_compile, source), ARCHS))
    found = []
    for arch, (usage, listing) in zip(ARCHS, printed, strict=True):
        resources = {
            name: tuple(map(int, numbers))
            for name, *numbers in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
        }
        for part in listing.split("Function : ")[1:]:
            name = part.split()[0]
            lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?);", part)
            instructions = [(int(address, 16), text) for address, text in lines]
            found.append(Kernel(name, arch, *resources[name], instructions))
    return tuple(found)
