"""What ``ops.py`` and ``grouped_ops.py`` share: how a schema says a weight, and calls from within autograd."""

import torch

#: A weight in a schema: absmax is fp32 scales, or uint8 codes when group_scales and offset are given (4 bits only). For
#: int8 block_size is the length of a row.
WEIGHT = "Tensor packed, Tensor absmax, Tensor? group_scales, Tensor? offset, str format, int block_size"


def wants_gradient(*operands: torch.Tensor | None) -> bool:
    """Whether autograd would record a product of these."""
    return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in operands)


def below_autograd(op: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet | None, *args):
    """``op(*args)`` without autograd. ``keyset``: what the dispatcher gave to the op's kernel that calls this, or None
    for a call that did not come through it.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args) if keyset is None else op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
