"""lowbit's ratios to the other contenders, recorded for each machine, and whether a new run has fallen behind them.

Times of a shared machine move by a third from run to run; the ratio to a contender that took turns in the same process
moves less. ``bench_matmul.py --record`` keeps the ratios of a run in ``recorded_ratios.json``, and ``--check`` compares
a run with those of the same machine. This prints the table of machines in docs/performance.md:

    python benchmarks/ratios.py
"""

import json
import re
from pathlib import Path

from machine import cpu_name
from report import write_json

RECORDED = Path(__file__).with_name("recorded_ratios.json")
#: A ratio below this share of the recorded one is a regression.
LEAST = 0.8
RATIOS = {"vs_dense": "dense", "vs_bitsandbytes": "bitsandbytes"}
#: Of the flags that Linux lists, those that choose a kernel of any contender.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16")


def machine_key() -> str:
    """The CPU's name, family, model and stepping: hypervisors call many CPUs "Intel(R) Xeon(R) Processor"."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = {name.strip(): value.strip() for name, value in re.findall(r"(.*?)\t*: (.*)", text.partition("\n\n")[0])}
    numbers = [found[key] for key in ("cpu family", "model", "stepping") if key in found]
    return f"{cpu_name()} ({'/'.join(numbers)})" if numbers else cpu_name()


def instruction_sets() -> str:
    """Which of the vector instruction sets this CPU has."""
    info = Path("/proc/cpuinfo")
    listed = re.search(r"^(?:flags|Features)\s*: (.*)", info.read_text(), re.MULTILINE) if info.exists() else None
    return ", ".join(flag for flag in _FLAGS if listed and flag in listed[1].split())


def ratios_of(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Of each case that lowbit was timed in, its speed relative to other contenders."""
    found = {}
    for row in rows:
        ratios = {name: round(row[key], 3) for key, name in RATIOS.items() if key in row}
        if row["name"] in ("lowbit", "lowbit int8") and ratios:
            found[f"{row['operation']}, {row['dtype']}, {row['n']}x{row['k']}, {row['m']} rows"] = ratios
    return found


def recorded(path: Path = RECORDED) -> dict[str, dict]:
    """By machine: ``instruction_sets``, ``threads``, ``torch``, ``lowbit`` (its kernels) and ``ratios``."""
    return json.loads(path.read_text()) if path.exists() else {}


def record(machine, rows: list[dict], path: Path = RECORDED) -> None:
    """Keep the ratios of these cases; those of other cases and machines stay."""
    machines = recorded(path)
    entry = machines.setdefault(machine_key(), {"ratios": {}})
    entry |= {"instruction_sets": instruction_sets(), "threads": machine.threads, "torch": machine.torch_version}
    entry["lowbit"] = machine.lowbit_isa
    entry["ratios"] |= ratios_of(rows)
    write_json(path, machines)


def regressions(rows: list[dict], path: Path = RECORDED) -> list[str] | None:
    """A line for each ratio below :data:`LEAST` of the recorded one; None if this machine has no record."""
    entry = recorded(path).get(machine_key())
    if entry is None:
        return None
    lines = []
    for case, ratios in ratios_of(rows).items():
        for other, ratio in ratios.items():
            before = entry["ratios"].get(case, {}).get(other)
            if before and ratio < LEAST * before:
                lines.append(f"{case}: {ratio:.2f} times as fast as {other}, recorded {before:.2f}")
    return lines


def table(path: Path = RECORDED) -> str:
    """The recorded machines as Markdown: ratios of one row and of 256 rows of bf16 through 4096 x 4096."""
    lines = [
        "| CPU (family/model/stepping) | instruction sets | threads | torch | lowbit's kernels "
        "| bf16, 1 row, x dense, x bnb | 256 rows, x dense, x bnb |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in recorded(path).items():
        cells = [name, entry["instruction_sets"], str(entry["threads"]), entry["torch"], entry["lowbit"]]
        for rows in (1, 256):
            ratios = entry["ratios"].get(f"linear, bfloat16, 4096x4096, {rows} rows", {})
            cells.append(", ".join(f"{ratios[other]:.2f}" if other in ratios else "-" for other in RATIOS.values()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
