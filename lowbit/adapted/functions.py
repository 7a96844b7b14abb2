"""What torch's functions do with a ProductWeight: a table from function to function, as lowbit/functions.py's.

A replacement takes the function and its arguments. It returns NotImplemented where that is to get the dense sum.
"""

import types

import torch
import torch.nn.functional as F

from .product import ProductWeight


def implements(*functions):
    """Make the decorated function what these torch functions (or those of these names) do with a ProductWeight."""

    def decorate(function):
        ProductWeight.FUNCTIONS.update(dict.fromkeys(functions, function))
        return function

    return decorate


@implements(torch.Tensor.__getitem__)
def _getitem(func, weight, index):
    if not isinstance(weight, ProductWeight) or weight.ids is not None:
        return NotImplemented
    if weight.count is None:
        return weight.pieces(lambda side: [side[index]])[0] if isinstance(index, slice) else NotImplemented
    if isinstance(index, torch.Tensor) and index.dtype in (torch.int32, torch.int64) and index.dim() < 2:
        return ProductWeight(weight.base, weight.factors, index.long()) if index.dim() else weight.matrix(int(index))
    return weight.matrix(index) if type(index) is int else NotImplemented


@implements(torch.Tensor.split, torch.split, torch.Tensor.chunk, torch.chunk)
def _split(func, weight, sizes, dim=0):
    if weight.count is not None or dim:
        return NotImplemented
    return tuple(weight.pieces(lambda side: func(side, sizes)))


@implements(torch.Tensor.transpose, torch.transpose)
def _transpose(func, weight, first, second):
    dims = 2 if weight.count is None else 3
    return weight.swapped() if {first % dims, second % dims} == {dims - 2, dims - 1} else NotImplemented


@implements(torch.Tensor.t, torch.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__)
def _swapped(func, weight, owner=None):
    return NotImplemented if weight.count is not None and func is torch.Tensor.T.__get__ else weight.swapped()


@implements(torch.Tensor.contiguous)
def _same(func, weight, **_):
    return weight


@implements(F.linear)
def _linear(func, x, weight, bias=None):
    is_factor = isinstance(weight, ProductWeight) and weight.count is None and not isinstance(x, ProductWeight)
    return weight.linear(x, bias) if is_factor else NotImplemented


@implements(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
@implements(torch.bmm, torch.Tensor.bmm)
def _matmul(func, a, b, **options):
    if options or isinstance(a, ProductWeight) and isinstance(b, ProductWeight):
        return NotImplemented
    if isinstance(a, ProductWeight):
        y = _matmul(func, b.mT, a.swapped()) if b.dim() > 1 else NotImplemented
        return y if y is NotImplemented else y.mT
    if b.count is None:
        return b.swapped().linear(a)
    return b.swapped().batched(a) if a.dim() == 3 and len(a) == b.count else NotImplemented


@implements(torch.Tensor.__rmatmul__)
def _rmatmul(func, b, a):
    return _matmul(torch.matmul, a, b)


@implements(torch._grouped_mm, "grouped_mm_fallback")
def _grouped_mm(func, x, weight, offs=None, bias=None, out_dtype=None):
    is_stack = isinstance(weight, ProductWeight) and weight.count is not None and weight.ids is None
    if not is_stack or offs is None or bias is not None or out_dtype is not None or x.dim() != 2:
        return NotImplemented
    return weight.swapped().grouped(x, offs, lambda: func(x, weight.base, offs=offs))


@implements(F.multi_head_attention_forward)
def _multi_head_attention(func, *args, **kwargs):
    """torch's own code, without its first question: whether a weight has a function of its own for all of it."""
    names = {**vars(F), "has_torch_function": lambda tensors: False}
    return types.FunctionType(func.__code__, names, argdefs=func.__defaults__)(*args, **kwargs)
