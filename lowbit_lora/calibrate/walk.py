"""The walk over the blocks of a model: each is run on all data, its layers are quantized, its outputs go on."""

import time
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from lowbit.adapted import base_of
from lowbit.adapted import walk as named_places
from lowbit.checks import named_errors
from lowbit.modules import is_conv1d
from lowbit.names import few

from ..heap import return_memory
from . import stages
from .blocks import Chain
from .experts import Experts, quantize_stack
from .layers import Result, Settings, quantize_layers
from .report import LayerReport
from .stages import Stage
from .state import State, Tensors
from .statistics import Group, Squares
from .watch import Seen, Worker


@dataclass
class Found:
    """What a walk finds: quantized weights by the model's name of each, and what is said of them.

    ``few``: stacks with how many experts of them had few tokens, and how many next to none. ``starts``: the first
    factors (A, B) of weights that get some, for which scaling is 1.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: list[LayerReport] = field(default_factory=list)
    few: list[tuple[str, int, int]] = field(default_factory=list)
    starts: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def add(self, other: "Found") -> None:
        self.weights |= other.weights
        self.rows += other.rows
        self.few += other.few
        self.starts |= other.starts


class Walk:
    """Walks along the chains of a model; the model stays as it is.

    Args:
        names: the weights to quantize, by parameter, with the model's name of each.
        folder: where hidden states are kept; None: in memory.
        bar: moves by one per weight.
        ranks: of the factors that weights get.
    """

    def __init__(
        self,
        names: dict[nn.Parameter, str],
        settings: Settings,
        folder: str | None,
        state: State,
        bar: tqdm,
        ranks: dict[nn.Parameter, int] | None = None,
    ):
        self._names, self._settings, self._folder, self._state, self._bar = names, settings, folder, state, bar
        self._ranks = ranks or {}
        self.found = Found()
        self.seconds = 0.0

    def along(self, chain: Chain) -> None:
        """Quantize the weights of a chain's blocks."""
        done = self._state.finished(chain.name)
        for saved in self._state.blocks(chain.name, done):
            self.found.add(Found(**{key: saved[key] for key in vars(self.found)}))
            self.seconds += saved["seconds"]
            self._bar.update(len(saved["weights"]))
        start = self._state.hidden(chain.name, done) if done else [chain.hidden] * (1 + self._is_sequential)
        streams = [Tensors(self._folder, hidden) for hidden in start]
        chain.hidden = []
        for number in range(done, len(chain.blocks)):
            began = time.perf_counter()
            found = _Block(self, chain, number, streams).quantize()
            seconds = time.perf_counter() - began
            self.found.add(found)
            self.seconds += seconds
            return_memory()
            self._state.save(chain.name, number, streams, **vars(found), seconds=seconds)

    def notes(self) -> list[str]:
        """What a user should know, one sentence each."""
        if not self.found.few:
            return []
        damped, searched = (sum(entry[index] for entry in self.found.few) for index in (1, 2))
        return [
            f"{few(entry[0] for entry in self.found.few)}: {damped} experts had fewer tokens than inputs, and were "
            f"damped more; {searched} had next to none, and were searched; more batches would help"
        ]

    @property
    def _is_sequential(self) -> bool:
        return self._settings.method == "sequential"


class _Block:
    """One block of a walk. ``streams``: what enters it, of the dense model and of the quantized one; what it returns
    takes their place.
    """

    def __init__(self, walk: Walk, chain: Chain, number: int, streams: list[Tensors]):
        self.walk, self.streams, self.settings, self.found = walk, streams, walk._settings, Found()
        self.name, block = list(chain.blocks.items())[number]
        self.block, self.is_last = block, number == len(chain.blocks) - 1
        self.calls, self.kept = chain.calls[number], chain.kept
        walk._bar.set_postfix_str(self.name)
        self.dense = Worker(block, attention=self.settings.method != "scale")
        #: The modules of the block, without adapters, by the names that they have in a plain copy.
        self.own = {place: base_of(module) for place, module in named_places(block)}
        wanted = {place: m for place, m in self.own.items() if not walk._names.keys().isdisjoint(own_parameters(m))}
        layers = {place for place, m in wanted.items() if isinstance(m, nn.Linear) or is_conv1d(m)}
        stacks = {place for place, m in wanted.items() if is_stack(m)}
        self.stages = stages.find(self.dense.block, chain.probes[number], layers, stacks)
        self.dense.stages = self.stages

    def quantize(self) -> Found:
        """Quantize the weights of the block, and move the streams behind it."""
        if len(self.streams) == 1:
            self._on_dense_inputs()
        else:
            self._on_quantized_inputs()
        return self.found

    # ---- "static" and "scale"

    def _on_dense_inputs(self) -> None:
        (stream,) = self.streams
        sums = [self._groups(stage) for stage in self.stages]
        held = [Tensors(self.walk._folder) for _ in self.stages]
        for batch, call in enumerate(self.calls):
            seen = self.dense.run(call, stream[batch], self.kept[batch])
            for number, stage in enumerate(self.stages):
                if stage.experts:
                    held[number].append(vars(seen.take(number, stage)))
                else:
                    self._add(sums[number], number, seen)
            stream[batch] = self._checked(seen.hidden)
        for number, stage in enumerate(self.stages):
            if stage.experts:
                self._finish_experts(stage, number, held[number])
            else:
                self._finish(sums[number])

    # ---- "sequential"

    def _on_quantized_inputs(self) -> None:
        ahead, behind = self.streams
        targets = [Tensors(self.walk._folder) for _ in self.stages]
        for batch, call in enumerate(self.calls):
            seen = self.dense.run(call, ahead[batch], self.kept[batch])
            for number, stage in enumerate(self.stages):
                targets[number].append(vars(seen.take(number, stage)))
            ahead[batch] = self._checked(seen.hidden)
            del seen
        worker = Worker(self.block, self.stages)
        if len(self.calls) == 1:  # the forward waits while a stage is quantized
            seen = worker.run(
                self.calls[0],
                behind[0],
                self.kept[0],
                until=len(self.stages) - 1 if self.is_last else None,
                at=lambda number, seen: self._quantize_stage(number, [seen], targets[number], worker),
            )
            behind[0] = behind[0] if self.is_last else seen.hidden
            return
        for number in range(len(self.stages)):
            batches = enumerate(self.calls)
            seen = (worker.run(call, behind[b], self.kept[b], until=number) for b, call in batches)
            self._quantize_stage(number, seen, targets[number], worker)
        if not self.is_last:
            for batch, call in enumerate(self.calls):
                behind[batch] = worker.run(call, behind[batch]).hidden

    def _quantize_stage(self, number: int, batches, targets: Tensors, worker: Worker) -> None:
        """Quantize a stage on what the quantized layers before it make of the data, and have the worker use it."""
        stage = self.stages[number]
        if stage.experts:
            seen = Tensors(self.walk._folder, (vars(one.take(number, stage)) for one in batches))
            self._finish_experts(stage, number, seen, worker)
            return
        groups = self._groups(stage)
        for seen, wanted in zip(batches, (Seen(**kept) for kept in targets), strict=True):
            self._add(groups, number, seen, wanted)
        self._finish(groups, worker)

    # ---- both

    def _groups(self, stage: Stage) -> list[Group | Squares]:
        if stage.experts:
            return []
        weights = {name: self._matrix(name) for name in stage.layers}
        if self.settings.method == "scale":
            return [Squares(weights)]
        attended = {name: weight for name, weight in weights.items() if name in stage.attended}
        others = {name: weight for name, weight in weights.items() if name not in stage.attended}
        return [Group(w, is_attended=w is attended) for w in (others, attended) if w]

    def _add(self, groups, number: int, seen: Seen, wanted: Seen | None = None) -> None:
        x = seen.inputs[number]
        source = seen if wanted is None else wanted
        received = source.received.get(number)
        target = residuals = None
        if wanted is not None:
            target = wanted.inputs[number]
            residuals = {
                name: residual - seen.residuals[name]
                for name, residual in wanted.residuals.items()
                if name in seen.residuals
            }
        for group in groups:
            group.add(x, received, target, residuals)

    def _finish(self, groups, worker: Worker | None = None) -> None:
        for group in groups:
            diagonal = group.diagonal if isinstance(group, Squares) else group.hessian.diagonal()
            if not bool(torch.isfinite(diagonal).all()):
                self._complain(next(iter(group.layers)))
            ranks = {name: self.walk._ranks.get(self.own[name].weight, 0) for name in group.layers}
            for name, result in quantize_layers(group, self.settings, f"{self.name}.", ranks).items():
                self._keep(name, result, group.tokens, worker)

    def _keep(self, layer: str, result: Result, tokens: int, worker: Worker | None) -> None:
        parameter = self.own[layer].weight
        quantized = result.quantized.to(parameter.dtype)
        if is_conv1d(self.own[layer]):
            quantized = quantized.transpose(-1, -2)
        self._note(parameter, quantized, result, tokens)
        if result.start is not None:
            self.found.starts[self.walk._names[parameter]] = result.start
        if worker is not None:
            module, weight = worker.block.get_submodule(layer), quantized.dequantize(torch.float32)
            if result.start is not None:
                product = result.start[1] @ result.start[0]
                weight += product.T if is_conv1d(module) else product
            module.weight = nn.Parameter(weight, requires_grad=False)

    def _note(self, parameter: nn.Parameter, quantized: torch.Tensor, result: Result, tokens: int) -> None:
        name = self.walk._names[parameter]
        losses = result.absmax, result.search, result.final
        self.found.weights[name] = quantized
        self.found.rows.append(LayerReport(name, tuple(parameter.shape), *losses, result.chosen, tokens))
        self.walk._bar.update()

    def _finish_experts(self, stage: Stage, number: int, seen: Tensors, worker: Worker | None = None) -> None:
        """Quantize both stacks, the second on what the first, quantized if there is a worker, makes of the data."""
        (layer,) = stage.layers
        parts = [Seen(**one) for one in seen]
        tokens = torch.cat([part.inputs[number] for part in parts])
        if not bool(torch.isfinite(tokens).all()):
            self._complain(layer)
        experts = Experts(
            self.dense.block.get_submodule(layer), tokens, torch.cat([part.routes[number] for part in parts])
        )
        up = None
        for name in (experts.up_name, "down_proj"):
            parameter = self.own[layer]._parameters[name]
            if parameter not in self.walk._names:
                up = experts.module._parameters[name].detach()
                continue
            count = range(len(parameter))
            inputs = [experts.of(e) if up is None else experts.inside(e, up) for e in count]
            weight = experts.module._parameters[name].detach()
            with named_errors(self.walk._names[parameter]):
                result = quantize_stack(weight, inputs, self.settings)
            quantized = result.quantized.to(parameter.dtype)
            self._note(parameter, quantized, result, sum(map(len, inputs)))
            if result.damped or result.searched:
                self.found.few.append((self.walk._names[parameter], result.damped, result.searched))
            up = weight if worker is None else quantized.dequantize(torch.float32)
            if worker is not None:
                worker.block.get_submodule(layer)._parameters[name] = nn.Parameter(up, requires_grad=False)

    def _matrix(self, layer: str) -> torch.Tensor:
        """The weight [out, in] of a layer, fp32."""
        module = self.dense.block.get_submodule(layer)
        weight = module.weight.detach()
        return weight.T.contiguous() if is_conv1d(module) else weight

    def _checked(self, hidden: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(hidden).all()):
            raise ValueError(f"{self.name}: expected finite activations, got NaN or inf in what it returns")
        return hidden

    def _complain(self, layer: str) -> None:
        raise ValueError(f"{self.name}.{layer}: expected finite activations, got NaN or inf in what enters it")


def is_stack(module: nn.Module) -> bool:
    """Whether a module is a stack of experts whose inputs can be found."""
    return not isinstance(module, nn.Linear) and not getattr(module, "is_transposed", False) and Experts.fits(module)


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module, without those of modules inside."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]
