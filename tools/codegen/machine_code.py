"""The machine code of CUDA kernels: instructions and loops, as cuobjdump prints them.

The disassembler is the one in Triton's package, because the CUDA toolkit of a slim image has none.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .once import made_once


@dataclass
class Kernel:
    """One compiled kernel; ``instructions`` are (address, text without the predicate)."""

    name: str
    arch: str
    registers: int
    stack: int
    local: int
    instructions: list[tuple[int, str]]
    shared: int = 0  # bytes that it declares

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
        """The shortest loop that holds all of these opcodes (with any suffix between their dots)."""
        fitting = [body for body in self.loops() if all(count(body, opcode) for opcode in opcodes)]
        assert fitting, f"{self.name} for {self.arch}: no loop with {', '.join(opcodes)}"
        return min(fitting, key=len)


def count(body: list[str], opcode: str) -> int:
    """How many instructions are ``opcode``: "LDG.128" counts LDG.E.NA.128.CONSTANT, "LDG" every global load."""
    parts = opcode.split(".")
    opcodes = Counter(tuple(text.split()[0].split(".")) for text in body)
    return sum(n for have, n in opcodes.items() if have[0] == parts[0] and set(parts) <= set(have))


def cuobjdump() -> str:
    """The disassembler's path. Raises FileNotFoundError, which says how to get one."""
    spec = importlib.util.find_spec("triton")
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec else None
    found = str(carried) if carried and carried.exists() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("cuobjdump not found: `pip install triton` brings it")
    return found


def _dump(option: str, binary: Path, arch: str) -> str:
    command = [cuobjdump(), option, "-arch", arch, str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources_in(usage: str) -> dict[str, tuple[int, int, int, int]]:
    lines = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*?SHARED:(\d+).*?LOCAL:(\d+)", usage)
    return {name: tuple(map(int, numbers)) for name, *numbers in lines}


def resources(binary: Path, arch: str) -> dict[str, tuple[int, int, int, int]]:
    """Registers, bytes of stack, of shared and of local memory of each kernel of a cubin or a library."""
    return _resources_in(_dump("-res-usage", binary, arch))


def _kernels_in(sass: str, usage: str, arch: str) -> list[Kernel]:
    used = _resources_in(usage)
    found = []
    for part in sass.split("Function : ")[1:]:
        name = part.split()[0]
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?);", part)
        registers, stack, shared, local = used[name]
        instructions = [(int(address, 16), text) for address, text in lines]
        found.append(Kernel(name, arch, registers, stack, local, instructions, shared))
    return found


def disassemble(binary: Path, arch: str) -> list[Kernel]:
    """The kernels that a cubin, or a library, has for an architecture such as "sm_90"."""
    return _kernels_in(_dump("-sass", binary, arch), _dump("-res-usage", binary, arch), arch)


def disassemble_once(binary: Path, arch: str) -> list[Kernel]:
    """The kernels of a large file, as of `disassemble`. The disassembler runs once for all test processes."""

    def make(folder: Path) -> None:
        (folder / "sass").write_text(_dump("-sass", binary, arch))
        (folder / "usage").write_text(_dump("-res-usage", binary, arch))

    folder = made_once(f"{binary.stem}.{arch}", [binary, Path(cuobjdump())], make)
    return _kernels_in((folder / "sass").read_text(), (folder / "usage").read_text(), arch)
