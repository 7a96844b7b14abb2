"""``lowbit convert``: a model's folder as other programs store it."""

import enum
import os
import tempfile
from typing import Annotated

import typer

from .models import check_out, copy_tokenizer, folder_bytes, is_quantized, load, save
from .output import Json, report


class Target(str, enum.Enum):
    lowbit = "lowbit"
    bitsandbytes = "bitsandbytes"
    gguf = "gguf"


class StoredAs(str, enum.Enum):
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: lowbit convert ./merged ./merged.gguf --to gguf --stored-as q8_0")(convert)


def convert(
    model: Annotated[str, typer.Argument(help="Folder or hub name: dense, or 4-bit by lowbit or bitsandbytes.")],
    out: Annotated[str, typer.Argument(help="Folder to write; for gguf the file.")],
    to: Annotated[Target, typer.Option(help="Whose format to write.")],
    stored_as: Annotated[StoredAs, typer.Option(help="How gguf stores the weights.")] = StoredAs.f16,
    tokenizer: Annotated[bool, typer.Option(help="Write the tokenizer into the gguf file.")] = True,
    json: Json = False,
) -> None:
    """Convert between 4-bit folders of lowbit and bitsandbytes, byte for byte, or write a GGUF file.

    GGUF holds the decoded weights, stored anew in one of its own formats; it has none for NF4.
    """
    check_out(model, out)
    if to is Target.gguf:
        written = _to_gguf(model, out, stored_as.value, tokenizer)
        report({"out": out, "to": to.value, "stored_as": stored_as.value, "stored_bytes": written}, json)
        return
    if is_quantized(model) is None:
        raise ValueError(f"MODEL: expected a quantized model, got a dense one; use lowbit quantize --as {to.value}")
    copied = save(load(model), model, out, format=to.value)
    report({"out": out, "to": to.value, "stored_bytes": folder_bytes(out), "copied": copied}, json)


def _to_gguf(model: str, out: str, stored_as: str, with_tokenizer: bool) -> int:
    from ..hf import gguf

    if not out.endswith(".gguf"):
        raise ValueError(f"OUT: expected a name that ends in .gguf, got {out!r}")
    with tempfile.TemporaryDirectory() as folder:
        if with_tokenizer and "tokenizer.json" not in copy_tokenizer(model, folder):
            raise ValueError(f"{model}: expected a tokenizer.json; --no-tokenizer writes the weights alone")
        return gguf.write(load(model), folder if with_tokenizer else None, os.fspath(out), stored_as)
