"""``lowbit memory``: what fine-tuning a model takes, and which GPU has as much."""

from dataclasses import asdict, replace
from typing import Annotated, Any

import typer
from tqdm import tqdm

from .. import memory as estimates
from ..memory import METHODS, SHAPES, Estimate, Setting
from .merge import Dtype
from .models import read_config
from .output import Json, megabytes, report, table

#: The models of the first table of docs/scaling.md, with the rows and tokens of a step, and those of the second.
_ALONE = {"BERT 110M": (32, 128), "RoBERTa 355M": (32, 128)}
_ALONE |= dict.fromkeys(("LLaMA 7B", "LLaMA 13B", "LLaMA 33B", "LLaMA 65B"), (1, 512))
_SHARED = ("LLaMA 7B", "LLaMA 13B", "LLaMA 33B", "Llama 3 70B", "Llama 3 405B", "Mixtral 8x7B")
_COUNTS = (1, 2, 4, 8, 16, 32, 64)
_PARTS = ("weights", "adapters", "gradients", "states", "activations", "peak")


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Examples: lowbit memory ./my-model --length 2048, or lowbit memory 'LLaMA 7B'")(memory)


def memory(
    model: Annotated[
        str | None, typer.Argument(help=f"Folder or hub name, of which the config is read, or {', '.join(SHAPES)}.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step on a GPU.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 512,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter, on every linear layer but the head.")] = 8,
    dtype: Annotated[Dtype, typer.Option(help="Of dense weights and activations.")] = Dtype.bfloat16,
    plans: Annotated[
        bool, typer.Option("--plans", help="Print the tables of docs/scaling.md: known models on 1 to 64 GPUs.")
    ] = False,
    json: Json = False,
) -> None:
    """Estimate the memory of full fine-tuning, LoRA and QLoRA from a model's config alone.

    A training step runs on tensors without data, and what is alive at once is added up: see docs/scaling.md.
    """
    setting = Setting("qlora", batch, length, False, dtype.value, rank)
    if plans:
        _print_plans(setting, json)
        return
    if model is None:
        raise typer.BadParameter("expected a model, or --plans", param_hint="model")
    config = SHAPES[model] if model in SHAPES else read_config(model).to_dict()
    rows = [_known(method, setting, config) for method in tqdm(METHODS, "Estimating", leave=False, disable=None)]
    if json:
        report({"model": model, **asdict(setting), "estimates": [row for pair in rows for row in pair]}, True)
        return
    print(f"{model}: {batch} x {length} tokens a step, {dtype.value}, AdamW\n")
    columns = ["trained", "checkpointing", *_PARTS, "fits on"]
    print(table(columns, [_shown(row) for pair in rows for row in pair]))
    print(f"\nA GPU fits if {megabytes(estimates.RESERVED)} are left on it for CUDA and the kernels.")


def _known(method: str, setting: Setting, config: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for checkpointing in (False, True):
        chosen = replace(setting, method=method, checkpointing=checkpointing)
        found.append({"method": method, "checkpointing": checkpointing} | _parts(estimates.estimate(config, chosen)))
    return found


def _parts(found: Estimate) -> dict[str, Any]:
    parts = {part: getattr(found, part) for part in _PARTS}
    return parts | {"fits_on": estimates.fitting_gpu(found.peak)}


def _shown(row: dict[str, Any]) -> list[str]:
    numbers = [megabytes(row[part]) for part in _PARTS]
    return [row["method"], "yes" if row["checkpointing"] else "no", *numbers, row["fits_on"] or "none of those known"]


def _print_plans(setting: Setting, as_json: bool) -> None:
    """The tables of docs/scaling.md."""
    first: list[dict[str, Any]] = []
    for name, (batch, length) in tqdm(_ALONE.items(), "One GPU", leave=False, disable=None):
        for method in METHODS:
            sized = replace(setting, batch=batch, length=length)
            known = _known(method, sized, SHAPES[name])
            first += [{"model": name, "batch": batch, "length": length} | row for row in known]
    shared = {}
    for method, names in (("qlora", _SHARED), ("full", _SHARED)):
        chosen = replace(setting, method=method, length=2048, checkpointing=True)
        bar = tqdm(names, f"Many GPUs, {method}", leave=False, disable=None)
        shared[method] = estimates.table({name: SHAPES[name] for name in bar}, chosen, _COUNTS)
    if as_json:
        report({"one_gpu": first, "gpus": list(_COUNTS), "many_gpus": shared}, True)
        return
    columns = ["model", "rows x tokens", "trained", "checkpointing", *_PARTS]
    rows = [[row["model"], f"{row['batch']} x {row['length']}", *_shown(row)[:-1]] for row in first]
    print(table(columns, rows))
    for method, models in shared.items():
        print(f"\n{method}, checkpointing, 1 x 2048 tokens a GPU; GB on each GPU\n")
        rows = [
            [name, plan, *("-" if peak is None else f"{peak / 1e9:,.1f}" for peak in peaks)]
            for name, of_plans in models.items()
            for plan, peaks in of_plans.items()
        ]
        print(table(["model", "plan", *map(str, _COUNTS)], rows))
