"""``lowbit quantize``: a model's folder in 4 bits."""

import enum
import time
from typing import Annotated

import typer

from .models import check_out, folder_bytes, is_quantized, load, save
from .output import Json, report


class Format(str, enum.Enum):
    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


class Scale(str, enum.Enum):
    absmax = "absmax"
    search = "search"


class Writer(str, enum.Enum):
    lowbit = "lowbit"
    bitsandbytes = "bitsandbytes"


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: lowbit quantize ./my-model ./my-model-nf4 --scale search")(quantize)


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a dense model.")],
    out: Annotated[str, typer.Argument(help="Folder to write.")],
    format: Annotated[Format, typer.Option(help="How a weight is stored.")] = Format.nf4,
    block_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Store the scales in 8 bits.")] = True,
    scale: Annotated[Scale, typer.Option(help="How scales are found; a search leaves less error.")] = Scale.absmax,
    head: Annotated[bool, typer.Option("--head", help="Quantize the output layer too.")] = False,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Quantize embeddings too.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="A module that stays dense; can be given often.")] = None,
    written_as: Annotated[Writer, typer.Option("--as", help="Whose folder to write.")] = Writer.lowbit,
    json: Json = False,
) -> None:
    """Store a model in 4 bits: its weights are quantized as they are read, so that memory stays near the result's."""
    from ..hf.config import LowbitConfig

    check_out(model, out)
    method = is_quantized(model)
    if method is not None:
        raise ValueError(f"MODEL: expected a dense model, got one that {method} has quantized; see lowbit convert")
    transposed = written_as is Writer.bitsandbytes
    options = (format.value, block_size, double_quant, scale.value, skip, head, embeddings)
    config = LowbitConfig(*options, conv1d_transposed=transposed)
    started = time.perf_counter()
    quantized = load(model, quantization_config=config)
    dense = sum(parameter.numel() * parameter.dtype.itemsize for parameter in quantized.parameters())
    copied = save(quantized, model, out, format=written_as.value)
    values = {"out": out, "written_as": written_as.value, "weights": config.spec.text, "dense_bytes": dense}
    values |= {"stored_bytes": folder_bytes(out), "seconds": time.perf_counter() - started, "copied": copied}
    report(values, json)
