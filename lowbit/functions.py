"""What torch's functions do with a quantized weight, above autograd: a table from function to function.

A function that is not here runs as torch wrote it, and meets ``aten.py`` below autograd.
"""

import torch
import torch.nn.functional as F

from . import functional
from .aten import refuse_writing
from .tensor import QuantizedTensor


def implements(*functions):
    """Make the decorated function what these torch functions do with a quantized weight."""

    def decorate(function):
        QuantizedTensor.FUNCTIONS.update(dict.fromkeys(functions, function))
        return function

    return decorate


@implements(F.linear)
def _linear(input, weight, bias=None):
    usable = isinstance(weight, QuantizedTensor) and not isinstance(input, QuantizedTensor)
    if usable and not weight.stored.transposed and weight.operands() is not None and weight.stored.dtype is not None:
        return functional.linear(input, weight, bias)
    with torch._C.DisableTorchFunctionSubclass():
        return F.linear(input, weight, bias)


@implements(F.embedding)
def _embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    if max_norm is not None:
        raise RuntimeError(
            f"max_norm: expected None for a quantized embedding, which cannot be renormalised in place, got {max_norm}"
        )
    with torch._C.DisableTorchFunctionSubclass():
        return F.embedding(input, weight, padding_idx)


@implements(torch.Tensor.requires_grad_)
def _requires_grad_(q, requires_grad=True):
    if requires_grad:
        raise RuntimeError(
            "requires_grad_: a quantized weight is frozen and has no gradient. Train LoRA on top of it, or decode it "
            "(lowbit.dequantize_(model)); a parameter of it is nn.Parameter(q, requires_grad=False)"
        )
    return q


@implements(torch.Tensor.requires_grad.__set__)
def _set_requires_grad(q, value):
    _requires_grad_(q, value)


@implements(torch.Tensor.__setitem__)
def _setitem(q, index, value):
    if isinstance(q, QuantizedTensor):
        refuse_writing("__setitem__")
    q[index] = value.dequantize()


@implements(torch.Tensor.share_memory_)
def _share_memory_(q):
    for part in q.parts():
        if part is not None:
            part.share_memory_()
    return q


@implements(torch.Tensor.is_shared)
def _is_shared(q):
    return q.packed.is_shared()


def _decoded(name: str):
    def function(q, *args, **kwargs):
        return getattr(q.dequantize(), name)(*args, **kwargs)

    return function


for _name in ("numpy", "tolist", "__array__", "item"):
    implements(getattr(torch.Tensor, _name))(_decoded(_name))


def _no_memory(q, *args, **kwargs):
    raise RuntimeError(
        "a quantized weight has no memory of its own layout: save it with torch.save(model.state_dict()), or under "
        "bitsandbytes' keys (lowbit.files); its bytes are q.packed and q.absmax"
    )


# untyped_storage() stays: torch.compile asks for it, and its data_ptr() fails by itself.
for _name in ("storage", "_typed_storage", "data_ptr"):
    implements(getattr(torch.Tensor, _name))(_no_memory)
