"""``lowbit doctor``: what is installed, and what runs here."""

import contextlib
import importlib.metadata
import io
import sys

import typer

from lowbit import __main__ as checks

from .output import Json, report

#: Package -> what needs it.
_PACKAGES = {
    "transformers": "from_pretrained, lowbit train",
    "accelerate": "lowbit train, device_map, several GPUs",
    "peft": "Trainer, PeftModel on lowbit's weights",
    "trl": "SFTTrainer, DPOTrainer",
    "datasets": "parquet files and data sets of the hub in lowbit train",
    "gguf": "lowbit convert --to gguf",
    "bitsandbytes": "nothing of lowbit's; its folders are read without it",
    "triton": "kernels for GPUs other than NVIDIA's",
}


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: lowbit doctor --json")(doctor)


def doctor(json: Json = False) -> None:
    """Print what was built, what runs here, and which packages are missing, and check the kernels.

    The exit status is 1 if a kernel computes something wrong.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if json else contextlib.nullcontext():
        status = checks.main([])
    versions = {name: _version(name) for name in _PACKAGES}
    if json:
        lines = printed.getvalue().splitlines()
        report({"passed": status == 0, "lowbit": lines, "packages": versions}, True)
    else:
        for name, version in versions.items():
            print(f"{name:17} {version or f'not installed (for: {_PACKAGES[name]})'}")
    sys.exit(status)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
