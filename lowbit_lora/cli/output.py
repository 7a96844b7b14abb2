"""What commands print: a table for people, or JSON. Progress goes to stderr."""

import json
from typing import Annotated, Any

import typer

#: The option of every command that reports.
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


def report(values: dict[str, Any], as_json: bool) -> None:
    """Print what a command found."""
    if as_json:
        print(json.dumps(values, indent=2))
        return
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name.replace('_', ' '):{width}}  {shown(name, value)}")


def shown(name: str, value: Any) -> str:
    """A value for people; the name says its unit."""
    if name.endswith("bytes") and isinstance(value, int):
        return megabytes(value)
    if name.endswith("seconds"):
        return f"{value:.1f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def megabytes(count: int) -> str:
    """Bytes in MB, or in GB from ten of them on."""
    return f"{count / 1e9:,.1f} GB" if count >= 10e9 else f"{count / 1e6:,.1f} MB"


def write(path: str, values: dict[str, Any]) -> None:
    """Write a report to a JSON file."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; all columns but the first are aligned to the right."""
    # A rule is a dash and a colon at least, where a column has one letter.
    widths = [max(2, *map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: list[str]) -> str:
        first, *others = cells
        padded = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    return "\n".join(line(cells) for cells in (columns, rule, *rows))
