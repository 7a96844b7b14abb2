"""Running a block and seeing what enters its stages: inputs, residual streams, the attention that tokens receive."""

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lowbit import QuantizedTensor
from lowbit.adapted import Adapted, walk, with_nested

from ..layers import LoRABaseLayer
from .blocks import Call, Stop, hidden_of
from .stages import Place, Stage


@dataclass
class Seen:
    """What one batch showed of a block.

    ``inputs``: [tokens, in] by the number of a stage. ``routes``: of a stage of experts, their numbers [tokens, any].
    ``residuals``: [tokens, width] by a layer's name. ``received``: [tokens] by the number of a stage, 1 on average.
    ``hidden``: what the block returned.
    """

    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    routes: dict[int, torch.Tensor] = field(default_factory=dict)
    residuals: dict[str, torch.Tensor] = field(default_factory=dict)
    received: dict[int, torch.Tensor] = field(default_factory=dict)
    hidden: torch.Tensor | None = None

    def take(self, number: int, stage: Stage) -> "Seen":
        """What concerns one stage."""
        return Seen(
            {number: self.inputs[number]},
            {number: self.routes[number]} if number in self.routes else {},
            {name: self.residuals[name] for name in stage.layers if name in self.residuals},
            {number: self.received[number]} if number in self.received else {},
        )


class Worker:
    """A copy of a block that computes in fp32 and can get other weights; its fp32 parameters are the block's own.

    Args:
        block: stays as it is.
        stages: of it; they can be set later.
        attention: keep what attention tokens receive; it costs one product of queries and keys.
    """

    def __init__(self, block: nn.Module, stages: Sequence[Stage] = (), attention: bool = False):
        self.block, self.stages, self._attention = working_copy(block), stages, attention

    def run(
        self,
        call: Call,
        hidden: torch.Tensor,
        kept: torch.Tensor | None = None,
        *,
        until: int | None = None,
        at: Callable[[int, Seen], None] | None = None,
    ) -> Seen:
        """Run one batch.

        Args:
            kept: bool [rows, tokens]: which tokens count; None: all.
            until: end as soon as the input of this stage is known.
            at: called with the number of each stage before its layers compute; it may change their weights.
        """
        seen, attended = Seen(), None
        places: dict[Place, torch.Tensor] = {}

        def flat(tensor: torch.Tensor) -> torch.Tensor:
            rows = tensor.detach().reshape(-1, tensor.shape[-1])
            if kept is None or rows.shape[0] != kept.numel():
                return rows
            return rows[kept.reshape(-1)]

        def enter(number: int, stage: Stage):
            def before(module, args, kwargs):
                nonlocal attended
                if number in seen.inputs:
                    return
                tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
                seen.inputs[number] = flat(tensors[0])
                if stage.experts:
                    seen.routes[number] = flat(next(t for t in tensors[1:] if not t.is_floating_point()))
                for name, place in stage.residuals.items():
                    if place in places:
                        seen.residuals[name] = flat(places[place])
                if stage.attended:
                    attended = number
                if at is not None:
                    at(number, seen)
                if until == number:
                    raise Stop

            return before

        def keep(place: Place):
            def hook(module, args, kwargs, output=None):
                tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
                places.setdefault(place, hidden_of(output) if place.is_output else tensors[0])

            return hook

        def receive(weights: torch.Tensor) -> None:
            if attended is not None and attended not in seen.received and weights.numel() == hidden.shape[:-1].numel():
                seen.received[attended] = flat(weights.reshape(-1, 1))[:, 0]

        with contextlib.ExitStack() as stack:
            for place in {place for stage in self.stages for place in stage.residuals.values()}:
                module = self.block.get_submodule(place.module)
                register = module.register_forward_hook if place.is_output else module.register_forward_pre_hook
                stack.callback(register(keep(place), with_kwargs=True).remove)
            for number, stage in enumerate(self.stages):
                module = self.block.get_submodule(stage.layers[0])
                stack.callback(module.register_forward_pre_hook(enter(number, stage), with_kwargs=True).remove)
            if self._attention and any(stage.attended for stage in self.stages):
                stack.enter_context(_AttentionWatch(receive))
                for module in {self.block.get_submodule(s.layers[0].rpartition(".")[0]) for s in self.stages}:
                    stack.callback(module.register_forward_hook(_returned(receive)).remove)
            args, kwargs = call.around(hidden)
            with contextlib.suppress(Stop):
                seen.hidden = hidden_of(self.block(*args, **kwargs))
        return seen


def working_copy(block: nn.Module) -> nn.Module:
    """A plain copy in fp32 for inference: quantized weights decoded, active adapters merged in.

    Dense parameters in fp32 are shared, not copied.
    """
    parts = list(dict.fromkeys(module for _, module in walk(block) if isinstance(module, Adapted)))
    merged = {layer.stored_weight for part in parts for layer in _lora(part) if layer.active}
    known: dict[int, Any] = {}
    for tensor in dict.fromkeys((*block.parameters(), *block.buffers())):
        if isinstance(tensor, QuantizedTensor):
            if tensor not in merged:
                known[id(tensor)] = _frozen(tensor.dequantize(torch.float32))
        elif tensor.dtype == torch.float32:
            known[id(tensor)] = tensor
    for part in parts:
        own = known | _merged(part)  # of this part alone: layers that share a weight may have different adapters
        # What is nested in a part's base is copied before it. Then its copy stands for it there.
        for inner in reversed(list(with_nested(part, "").values())):
            own[id(inner)] = base = copy.deepcopy(inner.base, own)
            if not isinstance(inner, LoRABaseLayer):
                for key, tensor in inner.merged_tensors(inner.active).items():
                    owner, _, name = key.rpartition(".")
                    setattr(base.get_submodule(owner), name, tensor)
        known[id(part)] = own[id(part)]
    return copy.deepcopy(block, known).float().eval()


def _lora(part: Adapted) -> list[LoRABaseLayer]:
    return [layer for layer in with_nested(part, "").values() if isinstance(layer, LoRABaseLayer)]


def _merged(part: Adapted) -> dict[int, nn.Parameter]:
    """By the id of a parameter: what stands for it, with the active adapters merged in, in fp32."""
    found = {}
    for layer in _lora(part):
        if layer.active:
            found[id(layer.stored_weight)] = _frozen(layer.merged_values(layer.active))
            if layer.bias is not None and any(layer.adapters[name].lora_bias for name in layer.active):
                found[id(layer.bias)] = layer.merged_tensors(layer.active)["bias"]
    return found


def _frozen(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


class _AttentionWatch(TorchFunctionMode):
    """Context that tells how much attention each key receives in torch's own attention."""

    def __init__(self, receive: Callable[[torch.Tensor], None]):
        super().__init__()
        self._receive = receive

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            with torch._C.DisableTorchFunctionSubclass():
                self._receive(_received(*args, **kwargs))
        return function(*args, **kwargs)


def _received(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor:
    """How much attention each key gets: mean over heads, sum over queries; [rows, keys]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    causal = query.new_full((query.shape[-2], key.shape[-2]), -torch.inf).triu_(1) if is_causal else None
    received = []
    for row in range(query.shape[0]):
        scores = (query[row] @ key[row].transpose(1, 2)).mul_(scale)
        if causal is not None:
            scores += causal
        if attn_mask is not None:
            mask = attn_mask.expand(query.shape[0], *attn_mask.shape[1:])[row] if attn_mask.dim() == 4 else attn_mask
            scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
        received.append(scores.softmax(-1).nan_to_num_(0.0).mean(0).sum(0))
    return torch.stack(received)


def _returned(receive: Callable[[torch.Tensor], None]):
    """A hook for attention that returns its weights [rows, heads, queries, keys], as models' own code does."""

    def hook(module, args, output):
        for value in output[1:] if isinstance(output, tuple) else ():
            if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[-1] == value.shape[-2]:
                receive(value.mean(1).sum(1))

    return hook
