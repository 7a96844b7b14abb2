"""The torch ops, once for every backend.

Each op exists in one torch.library namespace per backend (``backends.NAMESPACES``): ``torch.ops.lowbit.linear`` is
the compiled one, ``torch.ops.lowbit_reference.linear`` the oracle. The backward of a call stays in the call's
namespace. In the ``lowbit`` namespace the reference also stands in, at a lower dispatch priority, for what the
extension does not implement.

One file holds a family of ops: each op's schema, fake kernel, autograd and autocast stand together in one record
(``record.py``). :data:`OPS` is the list of all; the namespaces, the self-test and the tests derive from it. The ops
take plain tensors; ``lowbit/functional.py`` has the public functions and their checks.
"""

import torch

from ..backends import NAMESPACES, triton
from . import grouped, linear, lora, optim, quantize, shared_input

#: Every op by name.
OPS = {op.name: op for family in (quantize, linear, lora, grouped, optim) for op in family.OPS}
# Which instruction set the CPU kernels use; no tensors, so no backend but the extension has them.
_NATIVE_SCHEMAS = ("cpu_isa() -> str", "cpu_isas() -> str[]", "set_cpu_isa(str isa) -> ()")


def _register(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for op in OPS.values():
        op.register(library)
    return library


# The Library objects own the registrations: they live as long as the process.
LIBRARIES = {namespace: _register(namespace) for namespace in NAMESPACES.values()}
for _schema in _NATIVE_SCHEMAS:
    LIBRARIES["lowbit"].define(_schema)
LIBRARIES["lowbit"].define(shared_input.CAPTURE_ID)
for _name, _kernel in grouped.by_expert("lowbit").items():
    LIBRARIES["lowbit"].impl(_name, _kernel, "CUDA")
triton.register(LIBRARIES[NAMESPACES["triton"]])
