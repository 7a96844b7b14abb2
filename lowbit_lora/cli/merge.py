"""``lowbit merge``: a model with an adapter merged in."""

import enum
from typing import Annotated

import torch
import typer

from .models import DTYPES, adapter_settings, check_out, folder_bytes, is_quantized, load, save, with_adapter
from .output import Json, report


class Into(str, enum.Enum):
    dense = "dense"
    quantized = "quantized"


Dtype = enum.Enum("Dtype", {name: name for name in DTYPES}, type=str)


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: lowbit merge ./my-model ./adapter ./merged --dtype bfloat16")(merge)


def merge(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the base, dense or quantized.")],
    adapter: Annotated[str, typer.Argument(help="Folder or hub name of the adapter, by lowbit or PEFT.")],
    out: Annotated[str, typer.Argument(help="Folder to write.")],
    into: Annotated[Into, typer.Option(help="Dense weights, or quantized ones, which lose some of it.")] = Into.dense,
    dtype: Annotated[Dtype | None, typer.Option(help="Of dense weights; by default the base's.")] = None,
    json: Json = False,
) -> None:
    """Merge an adapter into its base. The folder is an ordinary one of transformers, which vLLM loads too.

    Into dense weights nothing is lost: the result computes what the quantized base and the adapter computed. Into
    quantized ones the report says how much of each layer's change is left at the least.
    """
    check_out(model, out)
    check_out(adapter, out)
    options = {}
    if into is Into.quantized and is_quantized(model) is None:
        options["quantization_config"] = _settings(adapter)
    wanted = None if dtype is None else DTYPES[dtype.value]
    if wanted is torch.float32:  # before merging: the base's own dtype would round the result
        options["dtype"] = wanted
    merged = with_adapter(load(model, **options), adapter)
    plain = merged.merge_and_unload(into=into.value, dtype=wanted)
    if wanted is not None and into is Into.dense:
        plain.to(wanted)
    copied = save(plain, model, out)
    values = {"out": out, "into": into.value, "stored_bytes": folder_bytes(out)}
    if merged.merge_report:
        values["layers"] = len(merged.merge_report)
        values["least_kept"] = min(layer.cosine for layer in merged.merge_report)
    report(values | {"copied": copied}, json)


def _settings(adapter: str):
    """How the base is to be quantized: as when the adapter was trained."""
    from ..hf.config import LowbitConfig

    about = adapter_settings(adapter)
    names = ("block_size", "double_quant", "scale", "quantize_head", "quantize_embeddings")
    known = {name: about[name] for name in names if name in about}
    return LowbitConfig(**known | ({"format": about["quantization"]} if "quantization" in about else {}))
