"""``lowbit merge``: a model with an adapter merged in."""

import enum
from typing import Annotated, Any

import torch
import typer

from . import calibration
from .models import (
    DTYPES,
    Writer,
    adapter_settings,
    check_out,
    folder_bytes,
    is_quantized,
    load,
    read_config,
    save,
    with_adapter,
)
from .output import Json, report


class Into(str, enum.Enum):
    dense = "dense"
    quantized = "quantized"
    nf4 = "nf4"
    fp4 = "fp4"


Dtype = enum.Enum("Dtype", {name: name for name in DTYPES}, type=str)


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog="Examples: lowbit merge ./my-model ./adapter ./merged --dtype bfloat16, or, to ship 4 bits, "
        "lowbit merge ./my-model ./adapter ./merged --into nf4 --calibrate chats.jsonl"
    )(merge)


def merge(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the base, dense or quantized.")],
    adapter: Annotated[str, typer.Argument(help="Folder or hub name of the adapter, by lowbit or PEFT.")],
    out: Annotated[str, typer.Argument(help="Folder to write.")],
    into: Annotated[
        Into, typer.Option(help="Dense weights, or 4-bit ones; 'quantized': stored as the adapter's base is.")
    ] = Into.dense,
    dtype: Annotated[Dtype | None, typer.Option(help="Of dense weights; by default the base's.")] = None,
    calibrate: calibration.Calibrate = None,
    method: calibration.ByMethod = calibration.Method.sequential,
    text_column: calibration.TextColumn = "text",
    label_column: calibration.LabelColumn = "label",
    max_length: calibration.Length = 512,
    samples: calibration.Samples = 60,
    written_as: Annotated[Writer, typer.Option("--as", help="Whose folder of 4-bit weights to write.")] = Writer.lowbit,
    plot: calibration.Plot = None,
    json: Json = False,
) -> None:
    """Merge an adapter into its base. The folder is an ordinary one of transformers, which vLLM loads too.

    Into dense weights nothing is lost: the result computes what the quantized base and the adapter computed. Into
    4-bit ones nearly all that was trained is lost, unless --calibrate DATA gives texts like those of the training: then
    nearly all of it stays. A fifth of DATA is held out, to measure how much.
    """
    check_out(model, out)
    check_out(adapter, out)
    is_dense = into is Into.dense
    if is_dense and (calibrate is not None or plot is not None or written_as is not Writer.lowbit):
        raise ValueError("--into: expected nf4, fp4 or quantized with --calibrate, --plot or --as, got dense")
    if plot is not None and calibrate is None:
        raise ValueError("--plot: expected --calibrate DATA with it")
    options = {}
    if not is_dense and is_quantized(model) is None:
        options["quantization_config"] = _settings(adapter, into)
    wanted = None if dtype is None else DTYPES[dtype.value]
    if wanted is torch.float32:  # before merging: the base's own dtype would round the result
        options["dtype"] = wanted
    data = {}
    if calibrate is not None:
        texts = (calibrate, text_column, label_column, max_length, samples)
        data = {"batches": calibration.batches(model, read_config(model), *texts), "method": method.value}
    base = load(model, **options)
    _check_format(base, into)
    merged = with_adapter(base, adapter)
    with calibration.printing_to_stderr():
        plain = merged.merge_and_unload(into="dense" if is_dense else "quantized", dtype=wanted, **data)
    if wanted is not None and is_dense:
        plain.to(wanted)
    writer = {} if is_dense else {"format": written_as.value}
    copied = save(plain, model, out, **writer)
    values = {"out": out, "into": into.value, "stored_bytes": folder_bytes(out)}
    values |= _kept(merged.merge_report, out, plot, json)
    report(values | {"copied": copied}, json)


def _settings(adapter: str, into: Into):
    """How the base is to be quantized: as when the adapter was trained."""
    from ..hf.config import LowbitConfig

    about = adapter_settings(adapter)
    names = ("block_size", "double_quant", "scale", "quantize_head", "quantize_embeddings")
    known = {name: about[name] for name in names if name in about}
    format = about.get("quantization", "nf4") if into is Into.quantized else into.value
    return LowbitConfig(**known | {"format": format})


def _check_format(base: torch.nn.Module, into: Into) -> None:
    """ValueError unless the base's quantized weights have the format that is asked for."""
    from lowbit import QuantizedTensor

    if into not in (Into.nf4, Into.fp4):
        return
    found = {parameter.spec.format for parameter in base.parameters() if isinstance(parameter, QuantizedTensor)}
    if found != {into.value}:
        got = ", ".join(sorted(found)) or "no quantized weight"
        raise ValueError(f"--into: expected the format of the base's weights, got {into.value} for a base with {got}")


def _kept(found: Any, out: str, plot: str | None, as_json: bool) -> dict[str, Any]:
    """What is to be said of a merge into quantized weights."""
    if not found.layers:
        return {}
    values: dict[str, Any] = {"layers": len(found.layers), "least_kept": min(layer.cosine for layer in found.layers)}
    values["least_cosine"] = min(layer.weight_cosine for layer in found.layers)
    if found.losses is not None:
        losses = found.losses
        values |= {"loss_of_base": losses.base, "loss_with_adapter": losses.adapter, "loss_merged": losses.merged}
        values |= {"held_out_labels": losses.labels, "recovery": found.recovery}
    if found.calibration is not None:
        values |= calibration.described(found.calibration)
        if not as_json:
            import rich

            rich.print(found.table())
        drawn = calibration.show(found.calibration, out, plot, True)
        values |= {"plot": drawn} if drawn else {}
    return values | ({"notes": found.notes} if found.notes else {})  # those of the calibration too
