"""A weight with LoRA for a module that multiplies by it in its own forward, such as a stack of experts.

What torch's functions do with such a weight is in ``functions.py``, which fills ProductWeight.FUNCTIONS.
"""

from collections.abc import Callable

import torch

from ..functional import without_autocast
from ..grouped import grouped_lora_linear
from ..tensor import QuantizedTensor
from .factors import Factors, adapted_linear, by_matrix, is_operand
from .weight import AdaptedWeight, decoded


class ProductWeight(AdaptedWeight):
    """A weight plus what adapters add to it. Products with it do not form that sum.

    It has views (one matrix ``w[e]`` of a stack, those of chosen experts ``w[ids]``, rows, transposes), and products
    with these: ``F.linear``, ``@``, ``torch.bmm``, ``torch._grouped_mm`` and transformers' own form of it. Such a
    product is the base's, on the packed weight where that is quantized, plus the products with the factors. Any other
    function gets the dense sum, through which the factors are trained too.

    Args:
        base: the weight, dense or quantized, [rows, columns], or [experts, rows, columns]: a stack.
        factors: what the adapters add, at least one; the leading dimensions are those of ``base``.
        ids: int64 [n], where this stands for the n matrices of these experts of the stack.
    """

    #: torch function, or its name -> what replaces it; takes the function and its arguments.
    FUNCTIONS: dict = {}

    @staticmethod
    def __new__(cls, base: torch.Tensor, factors: list[Factors], ids: torch.Tensor | None = None):
        shape = base.shape if ids is None else (*ids.shape, *base.shape[-2:])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=base.dtype, device=base.device)
        self.base, self.factors, self.ids = base, factors, ids
        #: The number of matrices; None where this is one, not a stack.
        self.count = shape[0] if len(shape) == 3 else None
        self._unbound = None
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        replacement = cls.FUNCTIONS.get(func) or cls.FUNCTIONS.get(getattr(func, "__name__", None))
        result = NotImplemented if replacement is None else replacement(func, *args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(
            f"{func}: the model's kernel reads a weight below autograd, where LoRA would not train; choose another "
            "implementation, for experts model.set_experts_implementation('grouped_mm'), 'batched_mm' or 'eager'"
        )

    def merged(self) -> torch.Tensor:
        """The dense sum in the base's dtype, computed in fp32; differentiable in the factors."""
        if self.count is not None:  # a stack in fp32 may not fit into memory
            whole = torch.stack([self.matrix(index).merged() for index in range(len(self.base))])
            return whole if self.ids is None else whole[self.ids]
        with without_autocast(self.base.device):
            total = decoded(self.base, torch.float32)
            for factors in self.factors:
                total = total + factors.product()
            return total.to(self.base.dtype)

    def _is_quantized(self) -> bool:
        return isinstance(self.base, QuantizedTensor)

    # ---- views

    def swapped(self) -> "ProductWeight":
        """This weight with its last two dimensions swapped."""
        return ProductWeight(self.base.transpose(-2, -1), [f.swapped() for f in self.factors], self.ids)

    def matrix(self, index: int) -> "ProductWeight":
        """One matrix of a stack."""
        if self._unbound is None:  # so that autograd puts a factor's gradient together once, not once for each expert
            self._unbound = [(factors.left.unbind(0), factors.right.unbind(0)) for factors in self.factors]
        sides = [(left[index], right[index]) for left, right in self._unbound]
        return ProductWeight(self.base[index], [Factors(*s, *f[2:]) for s, f in zip(sides, self.factors, strict=True)])

    def pieces(self, split: Callable) -> list["ProductWeight"]:
        """The pieces into which ``split``, a function of a tensor, divides the rows of this matrix."""
        lefts = [split(factors.left) for factors in self.factors]
        return [
            ProductWeight(base, [f._replace(left=left[i]) for f, left in zip(self.factors, lefts, strict=True)])
            for i, base in enumerate(split(self.base))
        ]

    # ---- products

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias for one matrix: [..., columns] -> [..., rows] in x's dtype (under autocast, in autocast's)."""
        return adapted_linear(x, self.base, self.factors, bias)

    def grouped(self, x: torch.Tensor, ends: torch.Tensor, dense_product: Callable | None = None) -> torch.Tensor:
        """x W_e^T for x [tokens, columns], sorted by expert e, whose rows end at ``ends[e]`` (int32): [tokens, rows].

        ``dense_product`` is what computes it with a dense base.
        """
        rest = self.factors
        if not self._is_quantized():
            y = dense_product()
        elif is_operand(self.base):
            (left, right, scaling, *_), *rest = self.factors
            y = grouped_lora_linear(x, self.base, ends, right, left, scaling)
        else:
            y = torch._grouped_mm(x, self.base.transpose(1, 2), offs=ends)
        with without_autocast(x.device):
            return sum([factors.grouped(x, ends, y.dtype) for factors in rest], y)

    def batched(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T for x [n, tokens, columns] and n matrices: [n, tokens, rows]."""
        ids = self.ids
        if not self._is_quantized():
            base, chosen = self.base, self.factors
            if ids is not None:
                base, chosen = base[ids], [f._replace(left=f.left[ids], right=f.right[ids]) for f in chosen]
            y = torch.bmm(x, base.transpose(1, 2))
            with without_autocast(x.device):
                return sum([factors.batched(x).to(y.dtype) for factors in chosen], y)
        count, tokens, columns = x.shape
        ids = torch.arange(count, device=x.device) if ids is None else ids
        owner = ids.repeat_interleave(tokens)
        y = by_matrix(x.reshape(count * tokens, columns), owner, len(self.base), self.grouped)
        return y.view(count, tokens, y.shape[1])

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"ProductWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
