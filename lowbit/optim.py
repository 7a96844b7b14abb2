"""Steps of optimizers: the ops of ``lowbit/ops/optim.py`` on the chosen backend, and the numbers that they take."""

import math
from collections.abc import Sequence

import torch

from . import backends
from .ops.record import is_traced, op_of
from .reference_optim import LAYOUT, RULES, STATE_BLOCK, Constants

__all__ = ["LAYOUT", "RULES", "STATE_BLOCK", "Constants", "constants", "optimizer_step", "sum_of_squares"]


def constants(rule: str, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int):
    """A :class:`Constants` of step number ``step``, the first being 1; computed in fp64."""
    beta1, beta2 = betas
    step_size, second_scale = lr, 1.0
    if rule == "adamw":
        step_size, second_scale = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    return Constants(1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, second_scale, eps)


def optimizer_step(
    rule: str,
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    arenas: Sequence[torch.Tensor],
    layout: torch.Tensor,
    constants: Sequence[Constants],
    grad_scale: torch.Tensor | None = None,
    seed: int | None = None,
) -> None:
    """Change parameters and their states in place: one step, one launch.

    Args:
        rule: "adamw" or "lion".
        params: contiguous, float32, float16 or bfloat16, all on one device; at least one.
        grads: as many, of the same sizes, contiguous, in any of the three dtypes.
        arenas: uint8 [bytes] on that device, which hold the states.
        layout: int64 [parameters, 6] on the CPU: a row of :data:`LAYOUT` for each parameter.
        constants: the rows that the layout's first column numbers.
        grad_scale: fp32, one number on that device: what gradients are multiplied by first.
        seed: bf16 parameters are rounded up or down at random, by this seed of 64 bits; None: to the nearest.

    Raises:
        RuntimeError: arguments that do not fit together; nothing has changed then.
    """
    namespace = backends.namespace_for(params[0].device.type, backends.selected())
    op, rows = op_of(namespace, "optimizer_step"), torch.tensor(constants, dtype=torch.float32)
    if is_traced():
        return op(params, grads, arenas, layout, rows, rule, grad_scale, seed)
    # What the op's own kernel for autograd does; here it costs a third less time for hundreds of parameters.
    torch.autograd.graph.increment_version([*params, *arenas])
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return op(params, grads, arenas, layout, rows, rule, grad_scale, seed)


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all elements: fp64, one number on the tensors' device; the same in every run.

    ``tensors``: contiguous, float32, float16 or bfloat16, all on one device; at least one.
    """
    namespace = backends.namespace_for(tensors[0].device.type, backends.selected())
    return op_of(namespace, "sum_of_squares")(tensors)
