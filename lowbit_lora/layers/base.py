"""What all LoRA layers share: a frozen base layer, adapters by name, which of them are active, and merging."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lowbit import QuantizedTensor

from ..config import check_lora_options, lora_scaling
from ..init import RANDOM_METHODS, initial_factors

#: The name of an adapter that was given none, as in PEFT.
DEFAULT = "default"


@dataclass(frozen=True)
class Adapter:
    """The settings of one adapter in one layer; see :class:`~lowbit_lora.LoraConfig`."""

    rank: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self):
        check_lora_options(self.rank, self.lora_alpha, self.lora_dropout)

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return lora_scaling(self.rank, self.lora_alpha, self.use_rslora)


@dataclass(frozen=True)
class RowAdapters:
    """Which adapter each row of a batch has: ``names`` and, for each row, an index into them, int64 [batch]."""

    names: tuple[str, ...]
    index: torch.Tensor


class LoRABaseLayer(nn.Module):
    """A layer with adapters: ``base_layer`` and, by PEFT's names, the factors of each adapter.

    A class for a kind of layer says how factors are made (``_new_factors``), where they are (``_parameters_of``), what
    their product adds to the weight (``delta``), and computes ``forward``. For other code the layer looks like its
    base: ``weight``, ``bias`` and the sizes are there.

    Attributes:
        base_layer: the frozen layer, dense or quantized.
        adapters: name -> settings.
        active: names of the adapters that ``forward`` adds; empty: it computes what the base does.
        merged: names of the adapters that are in the base's weight now.
        rows: where it is set, the adapter of each row of the input instead of the active ones.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.rows: RowAdapters | None = None
        self._unmerged: nn.Parameter | None = None  # the base's own weight, while adapters are merged

    # ---- what a class for a kind of layer defines

    def _new_factors(self, rank: int, **options) -> dict[str, nn.Module | nn.Parameter]:
        """A and B under the names of their dictionaries ("lora_A", ...), uninitialised; dtype and device as given."""
        raise NotImplementedError

    def factors(self, name: str | None = None) -> tuple[nn.Parameter, nn.Parameter]:
        """``(A [rank, in, ...], B [out, rank, ...])`` of an adapter; of the only active one if ``name`` is None."""
        name = self._only_active() if name is None else name
        lora_a, lora_b = self._parameters_of(name).values()
        return lora_a, lora_b

    def delta(self, name: str) -> torch.Tensor:
        """scaling * B A of an adapter in fp32, in the weight's shape; differentiable in A and B."""
        raise NotImplementedError

    # ---- adapters

    def add_adapter(
        self, name: str, adapter: Adapter, dtype: torch.dtype = torch.float32, init: str = "default"
    ) -> None:
        """Add an adapter, which is not active. ``init`` says how its factors begin: by default they add nothing yet.

        Raises:
            ValueError: there is one of that name, or no such beginning.
        """
        if name in self.adapters:
            raise ValueError(f"adapter: expected a new name, got {name!r}, which is there")
        for kind, factor in self._new_factors(adapter.rank, dtype=dtype, device=self.base_layer.weight.device).items():
            getattr(self, kind)[name] = factor.train(self.training) if isinstance(factor, nn.Module) else factor
        self.adapters[name] = adapter
        self.reset_lora_parameters(name, init)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            ValueError: there is none of that name, or it is active or merged.
        """
        self._check_names([name])
        if name in self.active or name in self.merged:
            raise ValueError(f"adapter: expected one that is neither active nor merged, got {name!r}")
        del self.adapters[name]
        for kind in self._kinds():
            del getattr(self, kind)[name]

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name. Its parameters stay the same objects.

        Raises:
            ValueError: there is no ``old``, or there is a ``new``.
        """
        self._check_names([old])
        if new in self.adapters:
            raise ValueError(f"adapter: expected a new name, got {new!r}, which is there")
        self.adapters = {new if name == old else name: adapter for name, adapter in self.adapters.items()}
        for kind in self._kinds():
            factors = getattr(self, kind)
            factors[new] = factors[old]
            del factors[old]
        self.active = tuple(new if name == old else name for name in self.active)
        self.merged = tuple(new if name == old else name for name in self.merged)

    def set_active(self, names: Iterable[str]) -> None:
        """Make these adapters the active ones. Names of adapters that this layer has not are passed over.

        Raises:
            ValueError: adapters are merged.
        """
        names = tuple(name for name in names if name in self.adapters)
        if self.merged and names != self.active:
            raise ValueError(f"adapters: expected none that is merged, got {', '.join(self.merged)}; call unmerge()")
        self.active = names

    def computing(self) -> tuple[str, ...]:
        """The adapters that ``forward`` adds to the base's output.

        Raises:
            ValueError: each row has an adapter of its own, which only linear layers compute.
        """
        if self.rows is not None and any(name in self.adapters for name in self.rows.names):
            kind = type(self.base_layer).__name__
            raise ValueError(f"adapter_names: expected adapters of linear layers, got some with a layer of type {kind}")
        return () if self.merged or self.rows is not None else self.active

    @torch.no_grad()
    def reset_lora_parameters(self, name: str | None = None, method: str = "default") -> None:
        """Fill the factors as ``init_lora_weights=method`` says; by default the layer then computes what its base does.

        Raises:
            ValueError: the method is none that leaves the base's weight alone.
        """
        lora_a, lora_b = self.factors(name)
        shape = (lora_b.shape[0], lora_a[0].numel())
        if method not in RANDOM_METHODS:
            raise ValueError(f"method: expected one of {', '.join(RANDOM_METHODS)}, got {method!r}")
        # Of these methods none reads the weight: one of no bytes says shape and device.
        weight = torch.empty(1, device=lora_a.device).expand(shape)
        new_a, new_b, _ = initial_factors(weight, lora_a.shape[0], 1.0, method)
        lora_a.copy_(new_a.view(lora_a.shape))
        # B of a convolution in groups has fewer columns than A has rows.
        lora_b.copy_(new_b[:, : lora_b[0].numel()].reshape(lora_b.shape))

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter by PEFT's keys below the layer's name, as in its files; empty without it."""
        return self._parameters_of(name) if name in self.adapters else {}

    def _parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        return {
            "lora_A.weight": self._modules["lora_A"]._modules[name].weight,
            "lora_B.weight": self._modules["lora_B"]._modules[name].weight,
        }

    def _kinds(self) -> list[str]:
        return [name for name, _ in self.named_children() if name.startswith("lora_")]

    @property
    def adapter(self) -> Adapter:
        """The settings of the only active adapter."""
        return self.adapters[self._only_active()]

    def _only_active(self) -> str:
        if len(self.active) != 1:
            raise ValueError(f"adapter: expected a name where {len(self.active)} are active ({', '.join(self.active)})")
        return self.active[0]

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.adapters:
                raise ValueError(f"adapter: expected one of {', '.join(self.adapters) or 'none'}, got {name!r}")

    # ---- the weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias."""
        return self.base_layer.bias

    def base_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The frozen weight, decoded, in ``dtype`` (default: its own)."""
        weight = self.base_layer.weight.detach()
        if isinstance(weight, QuantizedTensor):
            return weight.dequantize(dtype)
        return weight if dtype is None else weight.to(dtype)

    def merged_weight(self, names: Iterable[str] | None = None) -> torch.Tensor:
        """W + the deltas of the adapters (default: the active ones that are not merged), summed in fp32.

        Returns:
            the sum, rounded once to W's dtype; differentiable in the factors.

        Raises:
            ValueError: there is no adapter of a name.
        """
        names = [name for name in self.active if name not in self.merged] if names is None else list(names)
        self._check_names(names)
        weight = self.base_layer.weight
        with without_autocast(weight.device):
            merged = self.base_weight(torch.float32)
            for name in names:
                merged = merged + self.delta(name)
            return merged.to(weight.dtype)

    @torch.no_grad()
    def merge(self, names: Iterable[str] | None = None, *, safe: bool = False) -> nn.Module:
        """Put the merged weight, which is dense, into the base layer. ``unmerge`` puts its own weight back.

        Args:
            names: the adapters; by default the active ones.
            safe: refuse a merged weight with NaN or inf.

        Returns:
            the base layer, which now computes what the layer computed.

        Raises:
            ValueError: adapters are merged already; ``safe`` and the merged weight is not finite. Nothing has changed.
        """
        names = self.active if names is None else tuple(names)
        if self.merged:
            raise ValueError(f"adapters: expected none that is merged, got {', '.join(self.merged)}; call unmerge()")
        merged = self.merged_weight(names)
        if safe and not merged.isfinite().all():
            raise ValueError(f"adapters: expected finite merged weights, got NaN or inf from {', '.join(names)}")
        self._unmerged = self.base_layer.weight
        self.base_layer.weight = nn.Parameter(merged, requires_grad=False)
        self.merged = names
        return self.base_layer

    def unmerge(self) -> None:
        """Put the base's own weight back, the very tensor. Does nothing where no adapter is merged."""
        if self._unmerged is not None:
            self.base_layer.weight = self._unmerged
        self._unmerged, self.merged = None, ()

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return ", ".join(f"{name}: {adapter}" for name, adapter in self.adapters.items())


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context without autocast, which torch has not for the meta device."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
