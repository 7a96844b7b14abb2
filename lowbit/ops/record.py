"""What the library knows of one op, and how that is registered: schema, fake kernel, autograd and autocast together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import reference

#: A weight in a schema: the four parts of :class:`lowbit.QuantizedTensor` and its spec (``WeightSpec.text``).
WEIGHT = "Tensor packed, Tensor absmax, Tensor? group_scales, Tensor? offset, str spec"


@dataclass(frozen=True)
class Op:
    """One op, which every backend's namespace has.

    Its meaning is the function of its name in ``lowbit/reference.py``, unless ``kernel`` makes it of other ops.

    Attributes:
        schema: as torch.library takes it.
        fake: shapes and dtypes of the results, for tensors without data.
        autograd: of a namespace, the kernel of the Autograd key; it takes the dispatcher's keyset first. None: the
            results need no gradient whatever the inputs need.
        kernel: of a namespace, the kernel of every device, where that is not the reference's function of the op's name:
            one made of the namespace's other ops, or another module's.
        autocast: whether the first argument is cast to the autocast dtype.
        in_place: of a namespace, the kernel of the ADInplaceOrView key, for an op that writes into an argument.
    """

    schema: str
    fake: Callable
    autograd: Callable[[str], Callable] | None = None
    autocast: bool = False
    in_place: Callable[[str], Callable] | None = None
    kernel: Callable[[str], Callable] | None = None

    @property
    def name(self) -> str:
        """The op's name in each namespace."""
        return self.schema.partition("(")[0]

    def register(self, library: torch.library.Library) -> None:
        """Define the op in the library's namespace, with a kernel that serves every device."""
        namespace, name = library.ns, self.name
        library.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        kernel = getattr(reference, name) if self.kernel is None else self.kernel(namespace)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", self.fake, lib=library)
        if self.autograd is not None:
            library.impl(name, self.autograd(namespace), "Autograd", with_keyset=True)
        if self.in_place is not None:
            library.impl(name, self.in_place(namespace), "ADInplaceOrView", with_keyset=True)
        if self.autocast:
            for device_type in ("cpu", "cuda", "xpu"):
                library.impl(name, _autocast(op_of(namespace, name), device_type), f"Autocast{device_type.upper()}")


def op_of(namespace: str, name: str) -> torch._ops.OpOverload:
    """The op of that name in that namespace."""
    return getattr(getattr(torch.ops, namespace), name).default


def wants_gradient(*operands: torch.Tensor | None) -> bool:
    """Whether autograd would record a product of these."""
    return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in operands)


def below_autograd(op: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet | None, *args):
    """``op(*args)`` without autograd. ``keyset``: what the dispatcher gave to the op's kernel that calls this, or None
    for a call that did not come through it.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args) if keyset is None else op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def is_traced() -> bool:
    """Whether somebody looks at the ops that are called, so that each has to go through the dispatcher."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None


def without_backward(name: str, operand_positions: tuple[int, ...]) -> Callable[[str], Callable]:
    """The autograd of an op that has no backward: RuntimeError where one would be needed."""

    def of_namespace(namespace: str) -> Callable:
        op = op_of(namespace, name)

        def kernel(keyset, *args):
            if wants_gradient(*(args[position] for position in operand_positions)):
                raise RuntimeError(
                    f"{name}: expected inputs that require no gradient, or torch.no_grad(): it has no backward"
                )
            return below_autograd(op, keyset, *args)

        return kernel

    return of_namespace


def _autocast(op: torch._ops.OpOverload, device_type: str) -> Callable:
    def kernel(x, *args):
        with torch.autocast(device_type, enabled=False):
            return op(x.to(torch.get_autocast_dtype(device_type)), *args)

    return kernel
