"""The ops of the optimizers: a step of all parameters in one call, and the sum of squares of which norms are made.

``lowbit/reference_optim.py`` says what they compute.
"""

import torch

from .. import reference_optim
from .record import Op, op_of


def _fake_step(params, grads, arenas, layout, constants, rule, grad_scale, seed):
    return None


def _fake_sum_of_squares(tensors):
    return tensors[0].new_empty((), dtype=torch.float64)


def _noting_the_changes(namespace: str):
    op = op_of(namespace, "optimizer_step")

    def optimizer_step(keyset, params, grads, arenas, *args):
        # Autograd knows by its version that a tensor saved for a backward has been overwritten.
        torch.autograd.graph.increment_version([*params, *arenas])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, params, grads, arenas, *args)

    return optimizer_step


OPS = (
    Op(
        "optimizer_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] arenas, Tensor layout, Tensor constants, "
        "str rule, Tensor? grad_scale, int? seed) -> ()",
        _fake_step,
        in_place=_noting_the_changes,
        kernel=lambda namespace: reference_optim.optimizer_step,
    ),
    Op(
        "sum_of_squares(Tensor[] tensors) -> Tensor",
        _fake_sum_of_squares,
        kernel=lambda namespace: reference_optim.sum_of_squares,
    ),
)
