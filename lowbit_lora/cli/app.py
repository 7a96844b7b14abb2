"""The commands together, and what becomes of errors."""

import sys
import traceback as tracebacks
from typing import Annotated

import typer
from safetensors import SafetensorError

from . import convert, doctor, generate, memory, merge, quantize, train

app = typer.Typer(
    name="lowbit",
    help="Fine-tune and run models whose weights are stored in 4 bits.",
    epilog="Exit status: 0 done, 1 it cannot be done (the message says why), 2 wrong options.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for module in (quantize, train, merge, convert, generate, memory, doctor):
    module.add_to(app)

_shows_traceback = False


@app.callback()
def _options(traceback: Annotated[bool, typer.Option(help="Show where in the code an error comes from.")] = False):
    global _shows_traceback
    _shows_traceback = traceback


def run(arguments: list[str]) -> int:
    """Run a command; returns the exit status."""
    try:
        app(arguments)
    except SystemExit as end:
        return end.code or 0
    # What is raised for a wrong argument, a missing or broken file, a missing package, a full disk.
    except (ValueError, TypeError, OSError, ImportError, MemoryError, SafetensorError) as error:
        if _shows_traceback:
            tracebacks.print_exc()
        text = str(error).strip() or type(error).__name__
        print(f"lowbit: error: {text}", file=sys.stderr)
        return 1
    return 0
