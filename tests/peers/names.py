"""PEFT's inner names on lowbit's layers, which PEFT's tests read: each says what lowbit has under another name."""

from collections.abc import Mapping

from peft.tuners.lora import layer as peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lowbit.adapted import Adapted, adapted_modules
from lowbit_lora import LoRABaseLayer, LoRAConv1d, LoRAConv2d, LoRAConv3d, LoRAEmbedding, LoRALinear
from lowbit_lora.layers import LoRAMultiheadAttention, SavedModule, TrainedTokens

#: Classes of PEFT that tests ask isinstance for.
CLASSES = {
    "ModulesToSaveWrapper": SavedModule,
    "TrainableTokensWrapper": TrainedTokens,
    "AuxiliaryTrainingWrapper": (SavedModule, TrainedTokens),
}


def parts(model: nn.Module) -> list[Adapted]:
    """All that holds adapters."""
    return list(adapted_modules(model).values())


def lora_layers(model: nn.Module) -> dict[str, LoRABaseLayer]:
    """The layers with LoRA, by name."""
    return {name: part for name, part in adapted_modules(model).items() if isinstance(part, LoRABaseLayer)}


class View(Mapping):
    """One setting of each adapter of a layer, as the layer has it now."""

    def __init__(self, layer, read):
        self.layer, self.read = layer, read

    def __getitem__(self, name):
        return self.read(self.layer.adapters[name])

    def __iter__(self):
        return iter(self.layer.adapters)

    def __len__(self):
        return len(self.layer.adapters)


def _view(field):
    return property(lambda layer: View(layer, lambda adapter: getattr(adapter, field)))


def _merge(layer, names=None, *, safe=False, adapter_names=None, safe_merge=False, **options):
    return _lowbits_merge(layer, adapter_names if names is None else names, safe=safe or safe_merge, **options)


_lowbits_merge = LoRABaseLayer.merge


def _with_original(init):
    """TrainedTokens.__init__, after which PEFT's name of the table's own rows says which adapters there are."""

    def wrapped(part, *args, **kwargs):
        init(part, *args, **kwargs)
        part.token_adapter.__dict__["trainable_tokens_original"] = View(part, lambda index: index)

    return wrapped


def install() -> None:
    """Give lowbit's classes the names."""
    for cls, own in (
        (peft_layers.LoraLayer, LoRABaseLayer),
        (BaseTunerLayer, LoRABaseLayer),
        (peft_layers.Linear, LoRALinear),
        (peft_layers.Embedding, LoRAEmbedding),
        (peft_layers.Conv1d, LoRAConv1d),
        (peft_layers.Conv2d, LoRAConv2d),
        (peft_layers.Conv3d, LoRAConv3d),
    ):
        cls.register(own)
    Adapted._adapters = property(lambda part: set(part.adapters))
    Adapted.merged_adapters = property(lambda part: list(part.merged))
    Adapted.active_adapters = property(lambda part: list((getattr(part, "tied_to", None) or part).active))
    Adapted.active_adapter = property(lambda part: part.active[0] if len(part.active) == 1 else list(part.active))
    Adapted.disable_adapters = property(lambda part: bool(part.adapters) and not part.active)
    Adapted.get_base_layer = lambda part: part.base
    Adapted._all_available_adapter_names = lambda part: list(part.adapters)
    Adapted.set_adapter = lambda part, names: part.set_active([names] if isinstance(names, str) else names)
    for conv in (LoRAConv1d, LoRAConv2d, LoRAConv3d):
        conv.in_features = property(lambda layer: layer.in_channels)
        conv.out_features = property(lambda layer: layer.out_channels)
    LoRAMultiheadAttention.in_features = property(lambda layer: layer.base.embed_dim)
    LoRAMultiheadAttention.out_features = property(lambda layer: 3 * layer.base.embed_dim)
    LoRAEmbedding.in_features = property(lambda layer: layer.num_embeddings)
    LoRAEmbedding.out_features = property(lambda layer: layer.embedding_dim)
    TrainedTokens.__init__ = _with_original(TrainedTokens.__init__)
    SavedModule.adapter_layer_names = ["modules_to_save"]
    layer = LoRABaseLayer
    layer.adapter_layer_names = property(lambda layer: [key for key in layer._modules if key.startswith("lora_")])
    layer.other_param_names = ["r", "lora_alpha", "scaling", "lora_dropout"]
    layer.r = _view("rank")
    for name in ("lora_alpha", "lora_dropout", "scaling", "use_rslora", "use_dora"):
        setattr(layer, name, _view(name))
    layer.get_delta_weight = layer.delta
    layer.merge = _merge
