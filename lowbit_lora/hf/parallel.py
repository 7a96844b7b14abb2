"""Many GPUs: tensor parallelism by transformers' plans, and the way of DeepSpeed's that quantized weights cannot go."""

import functools
import re
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lowbit import QuantizedTensor, models
from lowbit.adapted import base_of
from lowbit.checks import named_errors
from lowbit.parts import columns_of, rows_of

from ..layers import LoRALinear

#: Styles of transformers' plans by the dimension of the weight [out, in] that is split.
_SPLIT = {"colwise": 0, "rowwise": 1}
#: Those whose modules stay whole in every process: what they compute is the same.
_WHOLE = {"colwise_gather_output", "colwise_rep", "embedding_rowwise", "sequence_parallel"}


def tensor_parallel_(
    model: nn.Module, group: dist.ProcessGroup | None = None, plan: dict[str, str] | None = None
) -> nn.Module:
    """Leave to each process of a group its part of the linear layers, in place; every process calls this.

    A layer that the plan calls "colwise" keeps a part of its outputs (rows of the weight) and reads the whole input.
    One that it calls "rowwise" keeps a part of its inputs (columns), and the sum over the processes is its output.
    Adapters are split with their layers; the factor that stays whole is the first process's, and its gradient is the
    sum over the processes. Embeddings, norms and the head stay whole. All processes compute on the same batch. Make the
    optimizer afterwards. A norm of all gradients, as for clipping, is another in each process: clip by value, or not.

    Args:
        model: a transformers model, quantized or dense, or a LoraModel on one, whose ``save_pretrained`` then gathers
            the adapters: all processes have to call it.
        group: by default all processes.
        plan: from patterns of module names to styles; by default the model's own ``tp_plan``.

    Raises:
        ValueError: a style that there is none of here; a size, or a number of heads, that the group does not divide; a
            cut inside a block; DoRA, lora_bias, biases that train, merged adapters. Nothing has changed then.
    """
    group = dist.group.WORLD if group is None else group
    ranks = dist.get_world_size(group)
    base = models.unwrapped(getattr(model, "model", model) if hasattr(model, "configs") else model)
    plan = dict(getattr(base, "tp_plan", None) or {}) if plan is None else plan
    _check_heads(base, ranks)
    found = _found(base, plan)
    parts = {module: _part(name, module, dim, group) for name, (module, dim) in found.items()}
    for module, dim in found.values():
        base_of(module).weight = nn.Parameter(parts[module], requires_grad=False)
        _split_layer(module, dim, group)
    return model


def _check_heads(base: nn.Module, ranks: int) -> None:
    config = getattr(base, "config", None)
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if heads is not None and heads % ranks:
            raise ValueError(f"group: expected a number of processes that divides {key}={heads}, got {ranks}")


def _found(base: nn.Module, plan: dict[str, str]) -> dict[str, tuple[nn.Module, int]]:
    """``(module, dimension to split)`` by name."""
    for pattern, style in plan.items():
        if style not in _SPLIT and style not in _WHOLE:
            known = ", ".join([*_SPLIT, *sorted(_WHOLE)])
            raise ValueError(f"plan: {pattern!r}: expected one of {known}, got {style!r}")
    found = {}
    for pattern, style in plan.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        for name, module in base.named_modules():
            if style in _SPLIT and expression.fullmatch(name):
                found[name] = module, _SPLIT[style]
    if not found:
        raise ValueError(f"plan: expected one that means linear layers of {type(base).__name__}, got {plan}")
    return found


def _part(name: str, module: nn.Module, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This process's part of a layer's weight. ValueError for a layer that cannot be split."""
    linear = base_of(module)
    if not isinstance(linear, nn.Linear) or not isinstance(module, (nn.Linear, LoRALinear)):
        raise ValueError(f"{name}: expected a linear layer to split, got {type(module).__name__}")
    if linear.bias is not None and linear.bias.requires_grad:
        raise ValueError(f"{name}: expected a frozen bias to split, got one that trains")
    if isinstance(module, LoRALinear):
        adapters = module.adapters.values()
        if module.merged or any(adapter.use_dora or adapter.lora_bias for adapter in adapters):
            raise ValueError(f"{name}: expected adapters to split that are not merged, without DoRA and lora_bias")
    weight = linear.weight.detach()
    begin, end = _bounds(name, weight.shape[dim], group)
    if not isinstance(weight, QuantizedTensor):
        return weight.narrow(dim, begin, end - begin).clone()
    with named_errors(name):
        return columns_of(weight, begin, end) if dim else rows_of(weight, begin, end)


def _bounds(name: str, size: int, group: dist.ProcessGroup) -> tuple[int, int]:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if size % ranks:
        raise ValueError(f"{name}: expected a size that {ranks} processes divide, got {size}")
    return size // ranks * rank, size // ranks * (rank + 1)


@torch.no_grad()
def _split_layer(module: nn.Module, dim: int, group: dist.ProcessGroup) -> None:
    linear = base_of(module)
    linear.out_features, linear.in_features = linear.weight.shape
    if linear.bias is not None and dim == 0:
        begin, end = _bounds("bias", len(linear.bias), group)
        linear.bias = nn.Parameter(linear.bias[begin:end].clone(), requires_grad=False)
    elif linear.bias is not None and dist.get_rank(group):
        linear.bias.zero_()  # the sum has it once
    if isinstance(module, LoRALinear):
        module._setup()
        for name in module.adapters:
            _split_factors(module.lora_A[name], module.lora_B[name], dim, group)
    if dim == 0:
        module.register_forward_pre_hook(lambda _, args: (_Copied.apply(args[0], group), *args[1:]))
    else:
        module.register_forward_hook(lambda _, args, output: _Summed.apply(output, group))


def _split_factors(down: nn.Module, up: nn.Module, dim: int, group: dist.ProcessGroup) -> None:
    for factor in (down, up):
        dist.broadcast(factor.weight, dist.get_global_rank(group, 0), group)
    split, whole = (up, down) if dim == 0 else (down, up)
    begin, end = _bounds("factors", split.weight.shape[dim], group)
    trains = split.weight.requires_grad
    split.weight = nn.Parameter(split.weight.narrow(dim, begin, end - begin).clone(), requires_grad=trains)
    split.weight.gathered = functools.partial(_gathered, split.weight, dim, group)  # for saving
    if whole.weight.requires_grad:
        whole.weight.register_hook(lambda gradient: _sum(gradient, group))


def _gathered(part: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The whole tensor; all processes of the group have to ask."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.detach().contiguous(), group)
    return torch.cat([part.detach() for part in parts], dim)


def _sum(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    summed = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed, group=group)
    return summed


class _Copied(torch.autograd.Function):
    """The input of layers that each have a part of the outputs: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum of the outputs of layers that each have a part of the inputs."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _sum(y, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def check_not_split(model: nn.Module) -> None:
    """ValueError if transformers splits a model over processes while it loads it (``tp_plan``, DistributedConfig)."""
    if getattr(model, "_device_mesh", None) is not None:
        raise ValueError(
            "tp_plan and distributed_config: expected None for quantized weights, which are quantized whole. To split "
            "a model over GPUs load it without them, and call lowbit_lora.hf.parallel.tensor_parallel_(model) or shard "
            "it by FSDP2 (examples/accelerate/fsdp2.yaml)"
        )


def check_not_zero3() -> None:
    """ValueError under DeepSpeed's ZeRO-3, which splits every parameter as a flat tensor of its dtype."""
    deepspeed = sys.modules.get("transformers.integrations.deepspeed")
    if deepspeed is not None and deepspeed.is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed: expected ZeRO stage 0, 1 or 2 with quantized weights, got stage 3, which splits each parameter "
            "as a flat tensor of floats. To split the base over GPUs use FSDP2, which splits it in 4 bits "
            "(examples/accelerate/fsdp2.yaml)"
        )
