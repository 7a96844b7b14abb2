"""lowbit's grouped product as an implementation of transformers' experts, ``experts_implementation="lowbit"``.

transformers calls every mixture of experts that it fuses through one registry (``integrations/moe.py``). How a class
stores its experts is said by attributes of the module: ``has_gate``, ``has_bias``, ``is_transposed``, and, since a
later release than 5.5, ``has_post_expert_norm``. Where gate and up lie in their product (``is_concatenated``), and what
is computed with them, is the class's own ``_apply_gate``.
"""

import warnings

import torch
from torch import nn

from lowbit import QuantizedTensor, grouped_linear
from lowbit.adapted import ProductWeight
from lowbit.adapted.factors import is_operand
from lowbit.functional import outside_autocast

#: The name among transformers' implementations.
NAME = "lowbit"
#: Implementations that transformers chooses by itself.
_AUTOMATIC = (None, "grouped_mm")
#: Implementations whose kernels read dense weights from memory.
_READ_MEMORY = ("deepgemm", "deepgemm_megamoe", "sonicmoe")


def register() -> None:
    """Make :func:`experts_forward` one of transformers' implementations. Imports transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def use(model: nn.Module) -> nn.Module:
    """Let the mixtures of ``model`` whose experts are quantized multiply by lowbit's product; returns ``model``.

    This is where transformers' own choice was left alone ("grouped_mm"). What the user asked for stays ("eager",
    "batched_mm"), but for implementations that cannot compute with a quantized weight, of which a warning tells. A
    config that several mixtures share chooses for all of them. Where none of these is quantized any more, it is
    "grouped_mm" again.
    """
    mixtures = [module for module in model.modules() if _is_mixture(module)]
    quantized = {id(module.config) for module in mixtures if _is_quantized(module)}
    for config in {id(module.config): module.config for module in mixtures}.values():
        chosen = config._experts_implementation
        if id(config) not in quantized:
            _set(config, "grouped_mm" if chosen == NAME else chosen)
        elif chosen in _AUTOMATIC:
            _set(config, NAME)
        elif chosen in _READ_MEMORY:
            warnings.warn(
                f"experts_implementation: {chosen!r} reads dense weights from memory, and these experts are quantized; "
                f"the model takes {NAME!r} instead",
                stacklevel=2,
            )
            _set(config, NAME)
    return model


def _is_mixture(module: nn.Module) -> bool:
    """Whether transformers calls a module's experts through its registry."""
    return "is_transposed" in vars(module) and hasattr(getattr(module, "config", None), "_experts_implementation")


def _is_quantized(module: nn.Module) -> bool:
    return any(isinstance(weight, QuantizedTensor) for weight in module._parameters.values())


def _set(config, implementation: str | None) -> None:
    if implementation == NAME:
        register()
    config._experts_implementation_internal = implementation  # the property would set it in the configs inside too


def experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers' "grouped_mm" returns for these experts, on their packed weights; nothing here waits for a GPU.

    Where experts are dense, or an adapter of another library makes them so, it is "grouped_mm" that computes.

    Args:
        self: a module of transformers with the weights of experts, quantized, with LoRA or without.
        hidden_states: [tokens, hidden].
        top_k_index: int [tokens, k]: the experts of each token. Numbers from the count of experts on are of none (as
            where other processes have the rest of the experts): they add nothing.
        top_k_weights: [tokens, k]: by what each of their outputs is multiplied.

    Returns:
        [tokens, hidden] in the dtype of ``hidden_states``.
    """
    name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down = _packed(self, name), _packed(self, "down_proj")
    if up is None or down is None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    (tokens, k), experts = top_k_index.shape, up.shape[0]
    is_none = top_k_index >= experts
    expert_of_row, order = top_k_index.clamp(max=experts - 1).flatten().sort(stable=True)
    every = torch.arange(experts, device=order.device, dtype=expert_of_row.dtype)
    ends = torch.searchsorted(expert_of_row, every, right=True, out_int32=True)

    def product(x: torch.Tensor, stack: torch.Tensor, bias_name: str) -> torch.Tensor:
        stack = stack.mT if self.is_transposed else stack
        bias = getattr(self, bias_name) if self.has_bias else None
        return outside_autocast(_product, x, stack, ends, bias, expert_of_row)

    x = product(hidden_states[order // k], up, f"{name}_bias")
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = product(x, down, "down_proj_bias")
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    y = torch.empty_like(x).index_copy(0, order, x).view(tokens, k, x.shape[-1])
    return (y * top_k_weights.masked_fill(is_none, 0)[..., None]).sum(1).to(hidden_states.dtype)


def _packed(module: nn.Module, name: str) -> torch.Tensor | None:
    """The stack of experts of this name where it is quantized, maybe with LoRA that stands in for it; or None.

    Not by getattr: where PEFT adapts a parameter, each read of it decodes the stack and adds.
    """
    stack = module.__dict__.get(name, module._parameters.get(name))
    weight = stack.base if isinstance(stack, ProductWeight) else stack
    return stack if isinstance(weight, QuantizedTensor) else None


def _product(x, stack, ends, bias, expert_of_row) -> torch.Tensor:
    """x W_e^T + bias_e for x [rows, in], sorted by expert, and a stack [experts, out, in] that may be transposed."""
    if isinstance(stack, ProductWeight):
        y = stack.grouped(x, ends)
    elif is_operand(stack):
        return grouped_linear(x, stack, ends, bias)
    else:
        y = torch._grouped_mm(x, stack.mT, offs=ends)  # stored [experts, in, out]; or a slice, which is decoded
    return y if bias is None else (y + bias[expert_of_row]).to(y.dtype)
