"""What torch's functions do with a quantized weight, above autograd: a table from function to function.

A function that is not here runs as torch wrote it, and meets ``aten.py`` below autograd.
"""

import sys

import torch
import torch.nn.functional as F

from . import functional
from .aten import matmul, refuse_writing
from .tensor import QuantizedTensor


def implements(*functions):
    """Make the decorated function what these torch functions do with a quantized weight."""

    def decorate(function):
        QuantizedTensor.FUNCTIONS.update(dict.fromkeys(functions, function))
        return function

    return decorate


@implements(F.linear)
def _linear(input, weight, bias=None):
    if isinstance(weight, QuantizedTensor) and not isinstance(input, QuantizedTensor):
        y = functional.linear_or_none(input, weight, bias)
        if y is not None:
            return y
    with torch._C.DisableTorchFunctionSubclass():
        return F.linear(input, weight, bias)


@implements(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def _matmul(a, b, *, out=None):
    """Here, since torch makes batched products of a matrix and activations of three dimensions, copying the matrix."""
    y = NotImplemented
    if out is None and isinstance(b, QuantizedTensor):
        y = functional.outside_autocast(matmul, a, b)
    elif out is None:
        y = functional.outside_autocast(lambda x, q: matmul(q, x), b, a)
    if y is not NotImplemented:
        return y
    with torch._C.DisableTorchFunctionSubclass():
        return torch.matmul(a, b, out=out)


@implements(torch.Tensor.__rmatmul__)
def _rmatmul(b, a):
    return _matmul(a, b)


@implements(F.multi_head_attention_forward)
def _multi_head_attention(query, key, value, *args, **kwargs):
    """On contiguous activations, whose products torch folds to two dimensions; see :func:`_matmul`."""
    same_key, same_value = key is query, value is key  # torch asks for identity
    query = query.contiguous()
    key = query if same_key else key.contiguous()
    value = key if same_value else value.contiguous()
    with torch._C.DisableTorchFunctionSubclass():
        return F.multi_head_attention_forward(query, key, value, *args, **kwargs)


@implements(F.embedding)
def _embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
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


@implements(torch.Tensor.data.__set__)
def _set_data(q, value):
    if not isinstance(value, QuantizedTensor):
        raise RuntimeError(
            "data: expected a lowbit.QuantizedTensor of float32, float16 or bfloat16, got a dense tensor of "
            f"{value.dtype}; for dense weights, in float64 for example, decode them first: lowbit.dequantize_(model)"
        )
    with torch._C.DisableTorchFunctionSubclass():
        q.data = value
    q._hold(value.parts(), value.stored)


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


def _refused(name: str):
    return lambda q, *args, **kwargs: refuse_writing(name)


for _name in ("apply_", "map_", "map2_"):  # they write through a pointer, past every op
    implements(getattr(torch.Tensor, _name))(_refused(_name))


def _decoded(name: str):
    def function(q, *args, **kwargs):
        return getattr(q.dequantize(), name)(*args, **kwargs)

    return function


for _name in ("numpy", "tolist", "__array__", "item", "__dlpack__"):
    implements(getattr(torch.Tensor, _name))(_decoded(_name))


def _asked_by_accelerate() -> bool:
    """Whether who calls a function of torch is accelerate, which takes pointers for names of weights, and reads none.

    It finds shared weights by them, and under FSDP2 the parameters of an optimizer.
    """
    caller = sys._getframe(3)  # past the table's entry, and __torch_function__
    return str(caller.f_globals.get("__name__")).partition(".")[0] == "accelerate"


def _no_memory(error: type[Exception]):
    def function(q, *args, **kwargs):
        if _asked_by_accelerate():
            return q.packed.data_ptr()
        raise error(
            "a quantized weight has no memory of its own layout: save it with torch.save(model.state_dict()), or under "
            "bitsandbytes' keys (lowbit.files); its bytes are q.packed and q.absmax. For accelerate's save_state call "
            "lowbit_lora.hf.trainer.save_adapters_only(accelerator) first; Trainer saves adapters where PEFT is "
            "installed. A mixture of transformers that asks for it computes in another way: "
            "model.set_experts_implementation('eager')"
        )

    return function


# untyped_storage() stays: torch.compile asks for it, and its data_ptr() fails by itself.
for _name in ("storage", "_typed_storage"):
    implements(getattr(torch.Tensor, _name))(_no_memory(RuntimeError))
# A RuntimeError too. It is what torch raises here, and PEFT, which compares the memory of tied weights, expects it.
implements(torch.Tensor.data_ptr)(_no_memory(NotImplementedError))
