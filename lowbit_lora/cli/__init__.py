"""The command ``lowbit``: quantize, train, merge, convert, generate, memory and doctor, each in a module of its own."""

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for what cannot be done, 2 for wrong options.

    ``arguments``: of the command line, by default this process's.
    """
    try:
        from .app import run
    except ImportError as error:
        print(f"lowbit: error: the command line needs {error.name}: pip install {error.name}", file=sys.stderr)
        return 1
    return run(sys.argv[1:] if arguments is None else arguments)
