"""PEFT's own LoRA on quantized weights, with lowbit's product of a weight and LoRA inside.

A quantized weight is a tensor, so that PEFT works on it as it is: its layers call the base and add what they add. What
:func:`register` adds is a layer whose product with the weight and with the factors is one.
"""

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbit import QuantizedTensor
from lowbit.adapted import Factors, RowAdapters, adapted_linear, plus_products_by_row

from ..layers import LoRALinear

#: What init_lora_weights may begin with that puts another weight into the base.
_REPLACING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def register(config: LoraConfig) -> LoraConfig:
    """Let PEFT put LoRA on quantized linear layers by :class:`QuantizedLinear`; other layers are PEFT's own.

    Only ``config`` knows of it, not its file, so that it is called again where an adapter is loaded::

        model = get_peft_model(base, register(LoraConfig(r=8, target_modules="all-linear")))
        model = PeftModel.from_pretrained(base, folder, config=register(LoraConfig.from_pretrained(folder)))

    Without it PEFT does the same in more steps, and refuses to merge into a quantized weight. Merging leaves layers
    without an adapter quantized. A quantized module in ``modules_to_save`` trains as a dense copy, also without it.

    Args:
        config: PEFT's; changed in place.

    Returns:
        ``config``.

    Raises:
        TypeError: no LoraConfig, or one of a method that is built on it (AdaLoRA). PEFT's other methods work on
            quantized weights as they are.
        ValueError: it would put another weight into the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, KaSA).
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise TypeError(
            f"config: expected a peft.LoraConfig, got {type(config).__name__}; other methods of PEFT need no register()"
        )
    _check_keeps_base(config)
    config._register_custom_module({nn.Linear: _layer, Conv1D: _layer})
    return config


def _check_keeps_base(config: LoraConfig) -> None:
    """ValueError if a new adapter of this config would change the base's weight."""
    init, what = config.init_lora_weights, None
    if isinstance(init, str) and init.lower().startswith(_REPLACING):
        what = f"init_lora_weights={init!r}"
    elif getattr(config, "kasa_config", None) is not None:
        what = "kasa_config"
    if what:
        raise ValueError(
            f"{what}: expected a start that leaves the base as it is, since its weights are quantized. "
            "lowbit_lora.QLoRAModel takes the factors of 'pissa', 'olora' and 'loftq' out before it quantizes; or call "
            "lowbit.dequantize_(model) first"
        )


def _layer(
    target: nn.Module, adapter_name: str, config: LoraConfig, parameter_name: str | None = None, **options: Any
) -> nn.Module | None:
    """What PEFT puts in the place of ``target``; None leaves the choice to PEFT."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if parameter_name is not None or not isinstance(base.weight, QuantizedTensor) or not LoRALinear.takes(base):
        return None
    config.fan_in_fan_out = isinstance(base, Conv1D)  # PEFT sets it so too, and warns
    options |= {"parameter_name": None, "is_target_conv_1d_layer": config.fan_in_fan_out}
    return QuantizedLinear(target, adapter_name, config=config, **options)


class QuantizedLinear(Linear):
    """PEFT's LoRA layer on an nn.Linear, or transformers' Conv1D, whose weight is quantized.

    The products with W and with the factors are one: several active adapters have their ranks side by side, and a batch
    with an adapter for each row has one grouped product. Variants of LoRA (DoRA, aLoRA, ...), and bases or factors that
    have hooks of their own, are computed by PEFT's code.

    Merging puts a dense weight into the base, W + scaling * B A in fp32, rounded once to W's dtype, as ``into="dense"``
    of :meth:`lowbit_lora.LoraModel.merge_and_unload` does; unmerging puts the very quantized tensor back.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any):
        super().__init__(base_layer, adapter_name, config, **options)
        self._stored: dict[str, nn.Parameter] = {}  # the base's own parameters, while adapters are merged
        self._is_merging = False

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:
        _check_keeps_base(config)
        super().update_layer(adapter_name, r, lora_alpha, config, **options)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._check_forward_args(x, *args, **kwargs)
        by_row = kwargs.get("adapter_names")
        names = self.active_adapters if by_row is None else sorted(set(by_row))
        names = [name for name in names if name in self.lora_A]
        is_plain = not args and not kwargs.keys() - {"adapter_names"} and _is_plain(self.base_layer)
        if self.disable_adapters or self.merged or not is_plain or not all(map(self._is_lora, names)):
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        if by_row is None:
            weight = base.weight.T if self.fan_in_fan_out else base.weight
            return adapted_linear(x, weight, [self._factors(name) for name in names], base.bias)
        rows = _rows(tuple(by_row), x.device)
        factors = [self._factors(name) if name in names else None for name in rows.names]
        return plus_products_by_row(base(x), x, factors, rows)

    def _is_lora(self, name: str) -> bool:
        """Whether an adapter adds scaling * B A and no more, by modules that are as PEFT made them."""
        modules, dropout = (self.lora_A[name], self.lora_B[name]), self.lora_dropout[name]
        known = name not in self.lora_variant and isinstance(self.scaling[name], (int, float))
        return known and type(dropout) in (nn.Dropout, nn.Identity) and all(map(_is_plain, modules))

    def _factors(self, name: str) -> Factors:
        up, dropout = self.lora_B[name], self.lora_dropout[name]
        chance = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return Factors(up.weight, self.lora_A[name].weight, self.scaling[name], chance, up.bias)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the weight with adapters (default: the active ones) merged in into the base, dense.

        The arguments are PEFT's. On an error (NaN with ``safe_merge``, a bias of B for a base without one) the base is
        as it was.
        """
        base, before = self.get_base_layer(), [*self.merged_adapters]
        if self._is_merging:  # PEFT takes merged adapters out and puts them back while it merges another
            return super().merge(safe_merge, adapter_names)
        has_bias = any(self.lora_bias.values()) and base.bias is not None
        own = {name: base._parameters[name] for name in ("weight", "bias")[: 1 + has_bias]}
        try:
            with self._merging():
                for name, parameter in own.items():
                    setattr(base, name, nn.Parameter(_in_fp32(parameter), requires_grad=False))
                super().merge(safe_merge, adapter_names)
                for name, parameter in own.items():
                    base._parameters[name].data = base._parameters[name].data.to(parameter.dtype)
            if safe_merge and not base.weight.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights, or what overflows in {base.weight.dtype}")
        except BaseException:
            base._parameters.update(own)
            self.merged_adapters[:] = before
            raise
        if self.merged_adapters == before:
            base._parameters.update(own)
        else:
            self._stored = own | self._stored

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged adapters out: the base has its own quantized weight again, the very tensor."""
        super().unmerge()
        if not self._is_merging:
            self.get_base_layer()._parameters.update(self._stored)
            self._stored = {}

    @contextlib.contextmanager
    def _merging(self) -> Iterator[None]:
        self._is_merging = True
        try:
            yield
        finally:
            self._is_merging = False


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of a linear layer is its class's forward and nothing else."""
    return LoRALinear.takes(module) and "forward" not in vars(module) and not any(getattr(module, h) for h in _HOOKS)


def _in_fp32(parameter: torch.Tensor) -> torch.Tensor:
    """A dense copy of a parameter."""
    if isinstance(parameter, QuantizedTensor):
        return parameter.dequantize(torch.float32)
    return parameter.detach().to(torch.float32, copy=True)


@lru_cache(maxsize=1)  # every layer of a model asks for the same
def _rows(names: tuple[str, ...], device: torch.device) -> RowAdapters:
    with torch.inference_mode(False):  # they outlive the call
        return RowAdapters.of(list(names), device)
