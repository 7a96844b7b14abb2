"""``lowbit quantize``: a model's folder in 4 bits."""

import enum
import time
from typing import Annotated

import typer

from lowbit import WeightSpec

from . import calibration
from .models import Writer, check_out, folder_bytes, is_quantized, load, read_config, save
from .output import Json, report


class Format(str, enum.Enum):
    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


class Scale(str, enum.Enum):
    absmax = "absmax"
    search = "search"


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog="Examples: lowbit quantize ./my-model ./my-model-nf4 --scale search, or, for the best of these bytes, "
        "lowbit quantize ./my-model ./my-model-nf4 --calibrate texts.jsonl"
    )(quantize)


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
    calibrate: calibration.Calibrate = None,
    method: calibration.ByMethod = calibration.Method.sequential,
    text_column: calibration.TextColumn = "text",
    label_column: calibration.LabelColumn = "label",
    max_length: calibration.Length = 512,
    samples: calibration.Samples = 48,
    plot: calibration.Plot = None,
    json: Json = False,
) -> None:
    """Store a model in 4 bits: its weights are quantized as they are read, so that memory stays near the result's.

    With --calibrate DATA codes and scales are chosen so that the model loses little of what it does with such data, in
    the same bytes. The dense model is in memory then.
    """
    from ..hf.config import LowbitConfig

    check_out(model, out)
    stored = is_quantized(model)
    if stored is not None:
        raise ValueError(f"MODEL: expected a dense model, got one that {stored} has quantized; see lowbit convert")
    if calibrate is None and plot is not None:
        raise ValueError("--plot: expected --calibrate DATA with it")
    if calibrate is not None:
        if head or embeddings or scale is not Scale.absmax:
            raise ValueError("--calibrate: expected none of --head, --embeddings and --scale with it")
        spec = WeightSpec(format.value, block_size, double_quant)
        data = (calibrate, text_column, label_column, max_length, samples)
        _calibrated(model, out, spec, skip or [], method.value, data, written_as.value, plot, json)
        return
    options = (format.value, block_size, double_quant, scale.value, skip, head, embeddings)
    config = LowbitConfig(*options, conv1d_transposed=written_as is Writer.bitsandbytes)
    started = time.perf_counter()
    quantized = load(model, quantization_config=config)
    dense = sum(parameter.numel() * parameter.dtype.itemsize for parameter in quantized.parameters())
    copied = save(quantized, model, out, format=written_as.value)
    values = {"out": out, "written_as": written_as.value, "weights": config.spec.text, "dense_bytes": dense}
    values |= {"stored_bytes": folder_bytes(out), "seconds": time.perf_counter() - started, "copied": copied}
    report(values, json)


def _calibrated(model, out, spec: WeightSpec, skip, method: str, data: tuple, written_as: str, plot, as_json: bool):
    from .. import calibrate

    started = time.perf_counter()
    batches = calibration.batches(model, read_config(model), *data)
    quantized = load(model)
    dense = sum(parameter.numel() * parameter.dtype.itemsize for parameter in quantized.parameters())
    with calibration.printing_to_stderr():
        found = calibrate(quantized, batches, method, spec=spec, skip=skip)
    copied = save(quantized, model, out, format=written_as)
    drawn = calibration.show(found, out, plot, as_json)
    values = {"out": out, "written_as": written_as, "weights": spec.text, "dense_bytes": dense}
    values |= {"stored_bytes": folder_bytes(out), "seconds": time.perf_counter() - started, "copied": copied}
    report(values | calibration.described(found) | ({"plot": drawn} if drawn else {}), as_json)
