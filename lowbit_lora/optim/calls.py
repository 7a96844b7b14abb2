"""One call of the op: the parameters that it steps, and their gradients and norm."""

from collections import defaultdict
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from lowbit.optim import sum_of_squares

from .states import DTensor, local_part


@dataclass
class Call:
    """The parameters with states on one device that had gradients in the last step, and what the op is told of them.

    Attributes:
        device: where the states are.
        params: the parameters.
        sizes: of each how many elements its states have.
        is_sharded: whether any is a DTensor.
        states: of each what ``optimizer.state`` has.
        layout: of the op.
        buckets: for each row of the constants a group, and the state of one of its parameters: all have made as many
            steps.
    """

    device: torch.device
    params: list[torch.nn.Parameter]
    sizes: list[int]
    is_sharded: bool
    states: list[dict[str, Any]]
    layout: torch.Tensor
    buckets: list[tuple[dict[str, Any], dict[str, Any]]]


def local_parts(call: Call) -> list[torch.Tensor]:
    """This process's parts of the parameters."""
    return [local_part(p) for p in call.params] if call.is_sharded else call.params


def dense_gradients(call: Call) -> list[torch.Tensor]:
    """This process's parts of the gradients."""
    grads = list(map(attrgetter("grad"), call.params))
    for kind in set(map(attrgetter("layout"), grads)) - {torch.strided}:
        shapes = [list(p.shape) for p, grad in zip(call.params, grads, strict=True) if grad.layout is kind]
        raise TypeError(
            f"gradients: expected dense ones, got {kind} for a parameter {shapes[0]}; make the embedding with "
            "sparse=False"
        )
    if call.is_sharded:
        grads = [_sharded_like(grad, p) for grad, p in zip(grads, call.params, strict=True)]
    return grads


def contiguous(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, of those that are not contiguous a copy."""
    if all(map(torch.Tensor.is_contiguous, tensors)):
        return tensors
    return [tensor.contiguous() for tensor in tensors]


def _sharded_like(grad: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        grad = grad.redistribute(parameter.device_mesh, parameter.placements)
    return local_part(grad)


def common_norm(calls: list[Call], grads: list[list[torch.Tensor]]) -> torch.Tensor:
    """The common L2 norm of all gradients, those of other processes' shards included: fp64, on the first's device."""
    total = None
    for call, of_call in zip(calls, grads, strict=True):
        by_sharding = defaultdict(list)
        for p, grad in zip(call.params, of_call, strict=True):
            by_sharding[(p.device_mesh, p.placements) if isinstance(p, DTensor) else None].append(grad)
        for sharding, members in by_sharding.items():
            part = sum_of_squares(members)
            mesh, placements = sharding or (None, ())
            for dimension, placement in enumerate(placements):
                if placement.is_shard():
                    torch.distributed.all_reduce(part, group=mesh.get_group(dimension))
            total = part if total is None else total + part.to(total.device)
    return total.sqrt()
