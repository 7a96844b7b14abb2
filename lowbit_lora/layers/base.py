"""What all LoRA layers share: a frozen base layer, adapters by name, which of them are active, and merging."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit import QuantizedTensor
from lowbit.adapted import Adapted, AdaptedWeight, Factors, adapted_row_norms, decoded, plus_biases, square_row_norms
from lowbit.checks import check_choice
from lowbit.functional import without_autocast
from lowbit.lowrank import random_factors
from lowbit.quantizers.quantize import quantize_to
from lowbit.quantizers.requantize import Quantizer, Survival, check_survivals, requantize, search_quantizer

from ..config import QLoRAConfig, check_lora_options, lora_scaling

#: The name of an adapter that was given none, as in PEFT.
DEFAULT = "default"


@dataclass(frozen=True)
class Adapter:
    """The settings of one adapter in one layer; see :class:`~lowbit_lora.LoraConfig`."""

    rank: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    times = 1  # how often PEFT adds such an adapter

    def __post_init__(self):
        check_lora_options(self.rank, self.lora_alpha, self.lora_dropout)

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return self.times * lora_scaling(self.rank, self.lora_alpha, self.use_rslora)


class LoRABaseLayer(Adapted):
    """A layer with adapters: ``base_layer`` and, by PEFT's names, the parameters of each adapter.

    A class for a kind of layer says what it takes, how factors are made (``_new_factors``) and what one adapter adds
    to the base's output (``_added``).

    Args:
        base_layer: the layer to adapt.
        rank: of an adapter "default", which is active; None adds no adapter.
        lora_dtype: of the factors.
        freeze: stop the training of the base's weight and bias.
        options: lora_alpha, lora_dropout, use_rslora, use_dora and lora_bias; see :class:`~lowbit_lora.LoraConfig`.

    Raises:
        TypeError, ValueError: the base is no such layer; an option out of range.
    """

    base_name = "base_layer"
    base_type: type[nn.Module] = nn.Module  # what the class takes
    adapter_type: type[Adapter] = Adapter  # the settings of its adapters
    weight_name = "weight"  # among the base's parameters
    out_dim = 0  # the dimension of the weight that is the output's features
    _feature_shape: tuple[int, ...] = (-1,)  # what a vector over these is viewed as, so that it multiplies the output
    _magnitude_shape: tuple[int, ...] = (-1,)  # as PEFT's

    def __init__(
        self, base_layer: nn.Module, *, rank: int | None = 8, lora_dtype=torch.float32, freeze: bool = True, **options
    ):
        self._check_base(base_layer)
        super().__init__(base_layer)
        #: (A, B) as they were taken out of the weight (PiSSA, OLoRA), by adapter.
        self.initial: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._unmerged: dict[str, nn.Parameter | None] = {}  # the base's own parameters, while adapters are merged
        self.survival: Survival | None = None  # while adapters are merged into a quantized weight
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        #: nn.Dropout, for who looks for these in a model to turn them off (TRL); without an entry nothing is dropped.
        self.lora_dropout = nn.ModuleDict()
        self._setup()
        if rank is not None:
            self.add_adapter(DEFAULT, self.adapter_type(rank, **options), lora_dtype)
            self.set_active([DEFAULT])
        if freeze:
            self.base.requires_grad_(False)

    # ---- what a class for a kind of layer defines

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether a module is such a layer: also a subclass, if it computes what its base class does."""
        return isinstance(module, cls.base_type) and type(module).forward is cls.base_type.forward

    @classmethod
    def _check_base(cls, module: nn.Module) -> None:
        if not isinstance(module, cls.base_type) and not cls.takes(module):
            raise TypeError(f"base_layer: expected a torch.nn.{cls.base_type.__name__}, got a {type(module).__name__}")
        weight = module._parameters.get(cls.weight_name)
        if weight is not None and weight.numel() == 0:
            raise ValueError(f"base_layer: expected at least one weight, got shape {tuple(weight.shape)}")

    def _setup(self) -> None:
        """Read the base's sizes."""

    def config_name(self, name: str) -> str:
        """What rank_pattern and alpha_pattern call this layer, which is ``name`` in the model."""
        return name

    def _new_factors(self, adapter: Adapter, **options) -> dict[str, nn.Module | nn.Parameter]:
        """A and B under the names of their dictionaries ("lora_A", ...), uninitialised; dtype and device as given."""
        raise NotImplementedError

    def _added(self, input: torch.Tensor, name: str) -> torch.Tensor:
        """What an adapter's factors add to the base's output (scaling * B A input), in the factors' dtype."""
        raise NotImplementedError

    def factors(self, name: str | None = None) -> tuple[nn.Parameter, nn.Parameter]:
        """``(A [rank, in, ...], B [out, rank, ...])`` of an adapter; of the only active one if ``name`` is None."""
        name = self._only_active() if name is None else name
        modules = self._modules  # directly: nn.Module's own look-up costs 1 us for each name
        return modules["lora_A"]._modules[name].weight, modules["lora_B"]._modules[name].weight

    def addition(self, name: str) -> Factors:
        """What an adapter adds to the weight as a matrix [out, in]: views of its factors."""
        adapter, (lora_a, lora_b) = self.adapters[name], self.factors(name)
        dropout = self.dropout_probability(name) if self.training else 0.0
        bias = self.lora_B[name].bias if adapter.lora_bias else None
        return Factors(lora_b.flatten(1), lora_a.flatten(1), adapter.scaling, dropout, bias)

    def dropout_probability(self, name: str) -> float:
        """The probability with which an adapter zeroes an input element of A while training."""
        dropout = self._modules["lora_dropout"]._modules.get(name)
        return 0.0 if dropout is None else dropout.p

    def product(self, name: str) -> torch.Tensor:
        """scaling * B A of an adapter in fp32, in the weight's shape; differentiable in A and B."""
        return self._in_shape(self.addition(name).product())

    def _linear_factors(self, sizes: tuple[int, int], rank: int, bias: bool = False, **options) -> dict[str, nn.Module]:
        """Factors of a weight [out, in] of these ``sizes``."""
        down = nn.Linear(sizes[1], rank, bias=False, **options)
        return {"lora_A": down, "lora_B": nn.Linear(rank, sizes[0], bias, **options)}

    def _in_shape(self, matrix: torch.Tensor) -> torch.Tensor:
        return (matrix.T if self.out_dim else matrix).view(self.stored_weight.shape)

    def add_adapter(self, name: str, adapter: Adapter, dtype=torch.float32, init: str = "default") -> None:
        """Add an adapter, not active, as :meth:`reset_lora_parameters` fills it; a ValueError if its name is taken."""
        self._check_new(name)
        for kind, factor in self._new_factors(adapter, dtype=dtype, device=self.stored_weight.device).items():
            getattr(self, kind)[name] = factor.train(self.training) if isinstance(factor, nn.Module) else factor
        self.adapters[name] = adapter
        if adapter.lora_dropout:
            self.lora_dropout[name] = nn.Dropout(adapter.lora_dropout).train(self.training)
        self.reset_lora_parameters(name, init)
        if adapter.use_dora:
            self.lora_magnitude_vector[name] = nn.Parameter(self.row_norms(name).view(self._magnitude_shape))

    @torch.no_grad()
    def reset_magnitude(self, name: str) -> None:
        """Set DoRA's magnitudes to the norms of the weight as it is now."""
        self._buffers.pop("_norms", None)
        magnitude = self.lora_magnitude_vector[name]
        magnitude.copy_(self.row_norms(name).view(magnitude.shape))

    @torch.no_grad()
    def reset_lora_parameters(self, name: str | None = None, method: str = "default") -> None:
        """Fill the factors by one of lowbit.lowrank.RANDOM_METHODS; by default nothing is added yet."""
        name = self._only_active() if name is None else name
        lora_a, lora_b = self.factors(name)
        new_a, new_b = random_factors(len(lora_b), lora_a[0].numel(), len(lora_a), method, lora_a.device)
        lora_a.copy_(new_a.view(lora_a.shape))
        # B of a convolution in groups has fewer columns than A has rows.
        lora_b.copy_(new_b[:, : lora_b[0].numel()].reshape(lora_b.shape))
        if self.adapters[name].lora_bias:
            nn.init.zeros_(self.lora_B[name].bias)

    def _parts(self) -> dict[str, nn.ModuleDict | nn.ParameterDict]:
        return {key: child for key, child in self._modules.items() if key.startswith("lora_")}

    @property
    def adapter(self) -> Adapter:
        """The settings of the only active adapter."""
        return self.adapters[self._only_active()]

    def _only_active(self) -> str:
        if len(self.active) != 1:
            raise ValueError(f"adapter: expected a name where {len(self.active)} are active ({', '.join(self.active)})")
        return self.active[0]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """What the base computes, plus what the adapters add, in the dtype of the base's output."""
        y = self.base_layer.forward(input)  # not the base itself, whose hooks are this layer's
        if self.rows is not None:
            for name, chosen in self.rows.chosen(len(input)):
                if name in self.adapters:
                    y = y.index_add(0, chosen, self._contribution(input[chosen], name, y[chosen]))
        elif not self.merged:
            base = y
            for name in self.active:
                y = y + self._contribution(input, name, base)
        return y

    def _contribution(self, input: torch.Tensor, name: str, base: torch.Tensor) -> torch.Tensor:
        """What an adapter adds to the base's output, in its dtype."""
        with without_autocast(base.device):
            added = self._added(input, name)
            if self.adapters[name].use_dora:
                scale = self._magnitude_scale(name).view(self._feature_shape)
                bias = 0 if self.bias is None else self.bias.view(self._feature_shape)
                added = (scale - 1) * (base - bias) + scale * added
            return added.to(base.dtype)

    def _magnitude_scale(self, name: str) -> torch.Tensor:
        """By what DoRA multiplies each output feature's row of W + scaling * B A."""
        return self.lora_magnitude_vector[name].flatten() / self.row_norms(name)

    @torch.no_grad()
    def row_norms(self, name: str) -> torch.Tensor:
        """The norms [out] of the output features' rows of W + scaling * B A, fp32; no gradient goes through them."""
        weight = self.stored_weight.detach()
        if "_norms" not in self._buffers:
            self.register_buffer("_norms", square_row_norms(weight, self.out_dim), persistent=False)
        return adapted_row_norms(weight, self._norms, self.addition(name), self.out_dim)

    # ---- the weight

    @property
    def stored_weight(self) -> nn.Parameter:
        """The base's weight as it is stored, dense or quantized."""
        return getattr(self.base, self.weight_name)

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias."""
        return getattr(self.base_layer, "bias", None)

    @property
    def weight(self) -> torch.Tensor:
        """W with the active adapters, for code that reads the weight of a layer instead of calling the layer."""
        return self.merged_weight() if torch.compiler.is_compiling() else AdaptedWeight(self)

    def base_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The frozen weight, decoded, in ``dtype`` (default: its own)."""
        return decoded(self.stored_weight.detach(), dtype)

    def delta(self, name: str) -> torch.Tensor:
        """What an adapter adds to the weight, in fp32, in the weight's shape; differentiable in its parameters."""
        product = self.product(name)
        if not self.adapters[name].use_dora:
            return product
        weight = self.base_weight(torch.float32)
        shape = (1, -1) if self.out_dim else (-1, *[1] * (weight.dim() - 1))
        return self._magnitude_scale(name).view(shape) * (weight + product) - weight

    def merged_weight(self, names: Iterable[str] | None = None) -> torch.Tensor:
        """W + the deltas of the adapters, by default of the active ones that are not merged; differentiable in these.

        The sum in fp32 is rounded once, to W's dtype. A ValueError if there is no adapter of a name.
        """
        names = [name for name in self.active if name not in self.merged] if names is None else list(names)
        self._check_names(names)
        weight = self.stored_weight
        with without_autocast(weight.device):
            merged = self.base_weight(torch.float32)
            for name in names:
                merged = merged + self.delta(name)
            return merged.to(weight.dtype)

    @torch.no_grad()
    def merged_tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        names = [name for name in names if name in self.adapters]
        if not names:
            return {}
        merged = {self.weight_name: self.merged_weight(names)}
        if any(self.adapters[name].lora_bias for name in names):
            bias = plus_biases(self.bias, [self.addition(name) for name in names])
            merged["bias"] = bias.to(self.stored_weight.dtype)
        return {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in merged.items()}

    @torch.no_grad()
    def merged_values(self, names: Iterable[str]) -> torch.Tensor:
        """W + the deltas of adapters, in fp32, whatever the dtype of W."""
        return self.base_weight(torch.float32) + self._change(names)

    def _change(self, names: Iterable[str]) -> torch.Tensor:
        return sum(self.delta(name) for name in names if name in self.adapters)

    @torch.no_grad()
    def changes(self, names: Iterable[str]) -> bool:
        """Whether adapters change the weight at all."""
        return any(bool(self.delta(name).any()) for name in names if name in self.adapters)

    @torch.no_grad()
    def requantized(
        self, names: Iterable[str], quantizer: Quantizer | None, label: str
    ) -> tuple[nn.Parameter, Survival]:
        """The quantized weight with adapters merged in, and how much is left of what they change.

        ``quantizer``: by default :meth:`own_quantizer`.
        """
        old, before = self.stored_weight, self.base_weight(torch.float32)
        weight, survival = requantize(label, old, before, self._change(names), quantizer or self.own_quantizer())
        return nn.Parameter(weight, requires_grad=False), survival

    def own_quantizer(self) -> Quantizer:
        """The best quantizer that needs no data: a search of scales."""
        return search_quantizer

    @torch.no_grad()
    def merge(
        self,
        names: Iterable[str] | None = None,
        *,
        safe: bool = False,
        into: str = "dense",
        minimum_cosine: float = 0.5,
        quantizer: Quantizer | None = None,
    ) -> nn.Module:
        """Put the weight with adapters (default: the active ones) merged in into the base layer, and return that.

        The arguments are those of :meth:`lowbit_lora.LoraModel.merge_and_unload`. A ValueError, and nothing has
        changed, if adapters are merged already, or for what is refused. ``survival``: what is left in a quantized one.
        A LoRALinear has a quantizer for inputs of its own: ``layer.calibrated_quantizer(inputs)``.
        """
        check_choice("into", into, ("dense", "quantized"))
        names = self.active if names is None else tuple(names)
        self._check_names(names)
        if self.merged:
            raise ValueError(f"adapters: expected none that is merged, got {', '.join(self.merged)}; call unmerge()")
        merged = self.merged_tensors(names)
        if safe and not all(value.isfinite().all() for value in merged.values()):
            raise ValueError(f"adapters: expected finite merged weights, got NaN or inf from {', '.join(names)}")
        if into == "quantized" and merged and isinstance(self.stored_weight, QuantizedTensor):
            weight, survival = self.requantized(names, quantizer, type(self).__name__)
            check_survivals([survival], minimum_cosine)
            merged[self.weight_name], self.survival = weight, survival
        self._unmerged = {key: self.base._parameters[key] for key in merged}
        self.base._parameters.update(merged)
        self.merged = names
        return self.base_layer

    def unmerge(self) -> None:
        """Put the base's own weight back, the very tensor, if adapters are merged."""
        self.base._parameters.update(self._unmerged)
        self._unmerged, self.merged, self.survival = {}, (), None

    @torch.no_grad()
    def put_back_initial(self) -> None:
        """Add to a dense base the factors that were taken out of it at first."""
        for name, (lora_a, lora_b) in self.initial.items():
            weight = self.base_layer.weight
            total = weight.float() + self._in_shape(Factors(lora_b, lora_a, self.adapters[name].scaling).product())
            self.base_layer.weight = nn.Parameter(total.to(weight.dtype), requires_grad=False)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {adapter}" for name, adapter in self.adapters.items())


def stored(module: nn.Module, options: dict[str, Any]) -> nn.Module:
    """``module``, with its weight quantized as QLoRAConfig's options say, which are taken out of ``options``."""
    names = {"quantization", "double_quant", "block_size", "scale"} & options.keys()
    config = QLoRAConfig(**{name: options.pop(name) for name in names})
    weight = quantize_to(module.weight.detach(), config.spec, config.scale)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module
