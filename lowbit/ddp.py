"""DistributedDataParallel never sends a quantized weight: every process has the same frozen bytes.

DDP broadcasts each parameter at the start unless its name is in ``parameters_to_ignore``. A name depends on which
module DDP wraps (a user's container, PEFT's model), which is only known at the moment of wrapping. torch calls the hook
below whenever a module gets a submodule, and so when DDP takes the module that it wraps, before it sends anything.
"""

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from .tensor import QuantizedTensor


def _ignore_quantized(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if isinstance(module, DistributedDataParallel) and name == "module":
        module.parameters_to_ignore |= {n for n, p in submodule.named_parameters() if isinstance(p, QuantizedTensor)}


register_module_module_registration_hook(_ignore_quantized)
