"""``lowbit_lora.calibrate``: a dense model to 4 bits, chosen by what its layers see of data."""

import contextlib
import functools
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lowbit import QuantizedTensor, WeightSpec, models
from lowbit.adapted import adapted_modules
from lowbit.checks import check_choice, check_count, check_positive, named_errors
from lowbit.modules import (
    check_weights_at_hand,
    find_weights,
    has_quantized_weights,
    is_conv1d,
    is_quantized,
    replace_weights,
    skipped_modules,
)
from lowbit.quantizers.quantize import quantize_to

from . import blocks, inputs, room
from .layers import METHODS, Settings
from .report import CalibrationReport, LayerReport
from .saving import remember
from .state import State
from .walk import Found, Walk, own_parameters

#: Where nothing is gained by more at once, so many tokens are run together: their activations stay in caches.
_TOKENS_IN_CACHE = 2048


def calibrate(
    model: nn.Module,
    batches: Iterable,
    method: str = "sequential",
    *,
    spec: WeightSpec = WeightSpec(),  # noqa: B008 (frozen)
    skip: Iterable[str] = (),
    damping: float = 0.1,
    sweeps: int = 3,
    shift: float = 0.5,
    ridge: float = 1.0,
    tokens_at_once: int = 16384,
    activations: str | os.PathLike | None = None,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Quantize a dense model in place, so that it loses little of what it does with the data; the bytes are the same.

    The weights are those of :func:`lowbit.quantize_`. Blocks of the model are run one at a time on all batches. Layers
    outside of them are quantized by a search weighted with the mean squares of their inputs. Besides the model and its
    4-bit weights, memory holds two copies of a block in fp32, its activations, and the Gram matrices of its inputs.

    Args:
        model: a transformers model, or any whose blocks pass hidden states to each other; evaluated in fp32.
        batches: dictionaries of tensors, as the model's forward takes them, or tensors of token ids [rows, tokens]:
            text of the kind that the model is for, 10,000 tokens or more. Hidden tokens of ``attention_mask`` do not
            count.
        method: "scale": a search of scales, weighted by the mean squares of inputs. "static": codes and scales by
            descent on the Gram matrices of the dense model's inputs. "sequential", the best: on the inputs that the
            quantized layers before make of the data, towards the dense model's outputs; twice the forwards.
        spec: how each weight is stored: in 4 bits.
        skip: modules that stay dense, with all inside of them: names or dotted suffixes.
        damping: of the Gram matrices, in units of their diagonal's mean.
        sweeps: of the descent; more take longer.
        shift: "sequential" goes this share of the way towards the dense model's outputs, 0 to 1.
        ridge: holds that way near the weight, in units of the diagonal's mean.
        tokens_at_once: batches that differ in their tokens alone are joined up to so many.
        activations: a folder on whose disk hidden states are kept, instead of in memory.
        resume: a folder that keeps the state of the run after each block. A run with the same arguments goes on from
            there. It can be removed afterwards.
        progress: show a bar.

    Returns:
        What was done, with the errors of each layer before and after.

    Raises:
        TypeError, ValueError: an argument; no data, data of another model, a model that is quantized already or whose
            weights are elsewhere, a layer whose inputs are NaN or inf (it is named), or a folder of another run.
        MemoryError, OSError: the system says that there is too little memory or disk, before the first layer.

        After any of these, and any other, the model is as it was.
    """
    settings = checked_settings(method, spec, damping=damping, sweeps=sweeps, shift=shift, ridge=ridge)
    check_dense(model)
    names = find_weights(model, skipped_modules(model, skip))
    options = {"tokens_at_once": tokens_at_once, "activations": activations, "resume": resume, "progress": progress}
    found, report = choose_of_dense(model, names, batches, settings, **options)
    new = {p: nn.Parameter(found.weights[name], requires_grad=False) for p, name in names.items()}
    replace_weights(model, new)
    remember(model, report)
    return report


def choose_of_dense(
    model: nn.Module, names: dict[nn.Parameter, str], batches: Iterable, settings: Settings, **options: Any
) -> tuple[Found, CalibrationReport]:
    """What :func:`calibrate` puts into a model that :func:`check_dense` accepts, and says of it; the model stays.

    Args:
        names: the weights to quantize, with the model's name of each.
        batches: see :func:`calibrate`, also for the errors.
        options: tokens_at_once, activations, resume, progress and ranks of :func:`choose`.
    """
    _check_weights(model, names)
    checked = inputs.checked(model, batches)
    report = CalibrationReport.of(settings.method, checked)
    found = choose(model, names, checked, settings, report, nn.Parameter.detach, **options)
    for note in report.notes:
        warnings.warn(note, stacklevel=3)
    report.note_unplaced()
    return found, report


def choose(
    model: nn.Module,
    names: dict[nn.Parameter, str],
    batches: list[inputs.Batch],
    settings: Settings,
    report: CalibrationReport,
    dense: Callable[[nn.Parameter], torch.Tensor],
    tokens_at_once: int = 16384,
    activations: str | os.PathLike | None = None,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
    ranks: dict[nn.Parameter, int] | None = None,
) -> Found:
    """The quantized weights, by name; the model, whose active adapters count, stays as it is.

    Args:
        names: the parameters, with the model's name of each.
        batches: as :func:`~.inputs.checked` returns them.
        report: layers, weights outside of blocks, notes and seconds are filled in.
        dense: returns the values of a parameter that is in no block.
        ranks: of the factors that weights in blocks get, which begin with what quantization takes away.
    """
    check_count("tokens_at_once", tokens_at_once)
    about = {"data": report.data, "weights": len(names), "tokens_at_once": tokens_at_once}
    about |= {key: getattr(value, "text", value) for key, value in vars(settings).items()}
    if ranks:
        about["ranks"] = {names[parameter]: rank for parameter, rank in ranks.items()}
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        folder = None
        if activations is not None:
            os.makedirs(activations, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="activations-", dir=activations))
        bar = stack.enter_context(tqdm(total=len(names), desc=f"Calibrating ({settings.method})", disable=not progress))
        at_once = tokens_at_once if settings.method == "sequential" else min(tokens_at_once, _TOKENS_IN_CACHE)
        chains, rest = _prepared(model, batches, names, at_once)
        placed = {parameter: name for parameter, name in names.items() if name not in rest}
        state = State(None if resume is None else os.fspath(resume), about, model)
        if chains:
            room.check(chains, list(names), settings.spec, settings.method == "sequential", folder, state.folder)
        walk = Walk(placed, settings, folder, state, bar, ranks)
        for chain in chains:
            walk.along(chain)
        weights = walk.found.weights
        report.layers, resumed = walk.found.rows, walk.seconds
        for parameter, name in names.items():
            if name not in weights:
                weights[name], row = _searched(name, dense(parameter), rest.get(name), settings)
                report.layers.append(row)
                report.unplaced.append(name)
                bar.update()
    order = list(names.values())
    report.layers.sort(key=lambda row: order.index(row.name))
    report.seconds = max(time.perf_counter() - began, resumed)
    report.notes = walk.notes()
    return walk.found


def checked_settings(method: str, spec: WeightSpec, **others: Any) -> Settings:
    """TypeError/ValueError for a setting that is out of range."""
    settings = Settings(method, spec, **others)
    shift = settings.shift
    check_choice("method", method, METHODS)
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"spec: expected a lowbit.WeightSpec, got {type(spec).__name__}")
    if not spec.record.scales.double_quant:
        raise ValueError(f"spec: expected a format in 4 bits, got {spec.text!r}")
    check_positive("damping", settings.damping)
    check_positive("ridge", settings.ridge)
    check_count("sweeps", settings.sweeps)
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 <= shift <= 1:
        raise ValueError(f"shift: expected a number from 0 to 1, got {shift!r}")
    return settings


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the options of :func:`calibrate`, those that are settings, and the others."""
    own = {field.name for field in fields(Settings)} - {"method", "spec"}
    return {k: v for k, v in options.items() if k in own}, {k: v for k, v in options.items() if k not in own}


def check_dense(model: nn.Module) -> None:
    """TypeError/ValueError unless the model is a dense one in memory."""
    models.check_module(model)
    if has_quantized_weights(model) or is_quantized(model):
        raise ValueError("model: expected a dense model, got one that is quantized already; calibrate it before that")
    check_weights_at_hand(model)


def _check_weights(model: nn.Module, names: dict[nn.Parameter, str]) -> None:
    if not names:
        raise ValueError(f"model: expected linear layers to quantize, got none in {type(model).__name__}")
    for parameter, name in names.items():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name}: expected finite values, got NaN or inf in the weight")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which the model is in eval mode, without caches of keys and values."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, value in training.items():
            module.training = value


def _prepared(model, batches, names, tokens_at_once) -> tuple[list[blocks.Chain], dict[str, torch.Tensor | None]]:
    """The chains with what enters them, and the weights outside, by name, with the mean squares of their inputs."""
    if "use_cache" in inputs.arguments(model):
        batches = [{"use_cache": False} | batch for batch in batches]
    wanted = {m for m in model.modules() if not names.keys().isdisjoint(own_parameters(m))}
    chains, really = blocks.trace(model, inputs.first_row(batches[0]), blocks.candidates(model, wanted))
    inside: dict[nn.Parameter, int] = {}
    for block in (block for chain in chains for block in chain.blocks.values()):
        for parameter in block.parameters():
            inside[parameter] = inside.get(parameter, 0) + 1
    rest = {name: None for parameter, name in names.items() if inside.get(parameter) != 1}
    outside = {m: names[m.weight] for m in wanted if names.get(m._parameters.get("weight")) in rest}
    with _mean_squares(outside, {part.base: part for part in adapted_modules(model).values()}, rest):
        if chains or outside:
            for _ in blocks.record(model, batches, chains, really or bool(rest)):
                pass
    for chain in chains:
        chain.kept = [inputs.is_kept(b, h) for b, h in zip(batches, chain.hidden, strict=True)]
        for number, hidden in enumerate(chain.hidden):
            if not bool(torch.isfinite(hidden).all()):
                raise ValueError(
                    f"{next(iter(chain.blocks))}: expected finite activations, got NaN or inf in what enters it in "
                    f"batches[{number}]"
                )
        blocks.merge(chain, tokens_at_once)
    return chains, rest


@contextlib.contextmanager
def _mean_squares(
    modules: dict[nn.Module, str], places: dict[nn.Module, nn.Module], sums: dict[str, torch.Tensor | None]
) -> Iterator[None]:
    """Context that adds up the squares of what enters the layers, by the names of their weights.

    ``places``: what is called in the place of a layer.
    """

    def add(name, module, args):
        x = args[0].detach().float()
        squares = x.reshape(-1, x.shape[-1]).square().sum(0)
        if not bool(torch.isfinite(squares).all()):
            raise ValueError(f"{name}: expected finite activations, got NaN or inf in what enters the layer")
        sums[name] = squares if sums[name] is None else sums[name] + squares

    with contextlib.ExitStack() as stack:
        for module, name in modules.items():
            if isinstance(module, nn.Linear) or is_conv1d(module):
                called = places.get(module, module)
                stack.callback(called.register_forward_pre_hook(functools.partial(add, name)).remove)
        yield


def _searched(name: str, weight: torch.Tensor, squares: torch.Tensor | None, settings: Settings):
    """A weight that is in no chain, by search: ``(quantized, row of the report)``."""
    importance = squares if squares is not None and squares.shape == weight.shape[-1:] else None
    with named_errors(name):
        quantized: QuantizedTensor = quantize_to(weight, settings.spec, "search", importance)
    how = "weighted search" if importance is not None else "search"
    return quantized, LayerReport(name, tuple(weight.shape), None, None, None, how, 0)
