"""PEFT's LoRA front (get_peft_model, PeftModel, ...) on lowbit_lora, for running PEFT's own tests.

``install()`` replaces names in the imported peft; configs of other methods go to the real thing. Nothing here computes:
each method calls lowbit_lora, or raises FeatureMissing. ``names.py`` gives lowbit's layers PEFT's inner names.
"""

import contextlib
import dataclasses
import os
import re
import types
import weakref

import names
import peft
import peft.helpers
import peft.mapping
import peft.mapping_func
import peft.peft_model
import peft.utils.constants
import peft.utils.hotswap
import torch
import words
from peft import LoraConfig
from plugin import FeatureMissing, touched
from torch import nn

import lowbit_lora

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Tuner(lowbit_lora.LoraModel):
    """lowbit's model, with the names that PEFT's has."""

    prefix = "lora_"

    active_adapters = property(lambda self: list(self._active))
    active_adapter = property(lambda self: self._active[0] if len(self._active) == 1 else list(self._active))
    targeted_module_names = property(lambda self: list(names.lora_layers(self.model)))

    @words.peft_errors
    def set_adapter(self, adapter_name, inference_mode=False):
        super().set_adapter(adapter_name)
        if inference_mode:
            self.set_requires_grad(adapter_name, False)

    @words.peft_errors
    def delete_adapter(self, adapter_name):
        """PEFT makes the next adapter active where the active one is deleted; lowbit wants to be told so."""
        if adapter_name in self._active:
            others = [name for name in self.configs if name != adapter_name]
            super().set_adapter([name for name in self._active if name != adapter_name] or others[:1])
        super().delete_adapter(adapter_name)
        del self.peft_config[adapter_name]

    @words.peft_errors
    def merge_adapter(self, adapter_names=None, safe_merge=False):
        """Of PEFT's layers each merges its own active adapters."""
        own = [name for name in self.configs if any(name in part.active for part in names.parts(self.model))]
        super().merge_adapter(own if adapter_names is None else adapter_names, safe=safe_merge)

    @words.peft_errors
    def merge_and_unload(self, progressbar=False, safe_merge=False, adapter_names=None):
        return super().merge_and_unload(adapter_names, safe=safe_merge)

    def disable_adapter_layers(self):
        self._disabled = self.disable_adapter()
        self._disabled.__enter__()

    def enable_adapter_layers(self):
        self.__dict__.pop("_disabled").__exit__(None, None, None)

    def set_requires_grad(self, adapter_names, requires_grad=True):
        raise FeatureMissing("set_requires_grad of chosen adapters")


#: The tuner of a model that PEFT's inject_adapter_in_model changed.
_injected: "weakref.WeakKeyDictionary[nn.Module, Tuner]" = weakref.WeakKeyDictionary()


def translated(config: LoraConfig, model: nn.Module, autocast: bool = True) -> lowbit_lora.LoraConfig:
    """lowbit_lora's config for PEFT's, or FeatureMissing."""
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = _default_targets(model)
    with _unsupported():
        return lowbit_lora.LoraConfig.from_peft(config, **_dtype(model, autocast))


def _dtype(model, autocast):
    """PEFT's autocast_adapter_dtype: fp32 factors on a 16-bit base, or factors in its dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {} if autocast or dtype not in _DTYPES else {"lora_dtype": _DTYPES[dtype]}


@contextlib.contextmanager
def _unsupported():
    """Context in which the refusal of a setting of PEFT's config is a missing feature."""
    try:
        yield
    except ValueError as error:
        if found := re.search(r"(\w+): not supported by lowbit", str(error)):
            raise FeatureMissing(found[1]) from error
        if found := re.search(r"init_lora_weights: expected one of .*, got ('\w+')", str(error)):
            raise FeatureMissing(f"init_lora_weights={found[1]}") from error
        raise


def _default_targets(model):
    """PEFT's table of target modules by architecture; lowbit_lora means every linear layer where none are given."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if kind not in table:
        raise FeatureMissing("default target_modules by architecture")
    return set(table[kind])


class PeftModel(nn.Module):
    """PEFT's front; ``base_model`` is a lowbit_lora.LoraModel."""

    prefix = "lora_"
    peft_type = peft.PeftType.LORA

    @words.peft_errors
    def __init__(self, model, peft_config, adapter_name="default", autocast_adapter_dtype=True, **_):
        super().__init__()
        touched.append("LoraModel")
        self._adopt(Tuner(model, translated(peft_config, model, autocast_adapter_dtype), adapter_name), peft_config)
        if peft_config.inference_mode:
            self.base_model.requires_grad_(False)

    def _adopt(self, base, config):
        self.base_model = base
        base.peft_config = {base.active_adapter: config}

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    peft_config = property(lambda self: self.base_model.peft_config)
    active_adapter = property(lambda self: self.base_model.active_adapter)
    active_adapters = property(lambda self: self.base_model.active_adapters)
    active_peft_config = property(lambda self: self.peft_config[self.active_adapter])
    has_active_enabled_adapter = property(lambda self: any(part.active for part in names.parts(self.base_model)))

    @property
    def modules_to_save(self):
        listed = {name for config in self.base_model.configs.values() for name in config.modules_to_save or ()}
        return listed or None

    @words.peft_errors
    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    @words.peft_errors
    def generate(self, *args, adapter_names=None, **kwargs):
        if adapter_names is None:
            return self.base_model.generate(*args, **kwargs)
        with self.base_model.adapters_by_row(adapter_names):
            return self.base_model.generate(*args, **kwargs)

    def prepare_model_for_gradient_checkpointing(self, model):
        self.base_model.enable_input_require_grads()

    def get_nb_trainable_parameters(self):
        return self.base_model.count_parameters()

    # ---- adapters

    @words.peft_errors
    def add_adapter(self, adapter_name, peft_config, low_cpu_mem_usage=False, autocast_adapter_dtype=True):
        self.base_model.add_adapter(adapter_name, translated(peft_config, self.base_model, autocast_adapter_dtype))
        self.peft_config[adapter_name] = peft_config

    @contextlib.contextmanager
    def disable_adapter(self):
        """PEFT unmerges what is merged."""
        self.base_model.unmerge_adapter()
        with self.base_model.disable_adapter():
            yield

    @words.peft_errors
    def add_weighted_adapter(
        self,
        adapters,
        weights,
        adapter_name,
        combination_type="svd",
        svd_rank=None,
        density=None,
        majority_sign_method="total",
        **_,
    ):
        method = "linear" if len(adapters) == 1 else combination_type
        options = {"rank": svd_rank, "density": density, "majority_sign": majority_sign_method}
        self.base_model.add_weighted_adapter(adapters, weights, adapter_name, method, **options)
        made = self.base_model.configs[adapter_name]
        self.peft_config[adapter_name] = dataclasses.replace(
            self.peft_config[adapters[0]], r=made.rank, lora_alpha=made.lora_alpha
        )

    @words.peft_errors
    def load_adapter(
        self, model_id, adapter_name, is_trainable=False, subfolder=None, autocast_adapter_dtype=True, **kwargs
    ):
        _check_loading(kwargs)
        folder = os.path.join(model_id, subfolder) if subfolder else model_id
        options = _dtype(self.base_model, autocast_adapter_dtype)
        with _unsupported():
            self.base_model.load_adapter(folder, adapter_name, is_trainable=is_trainable, **options)
        if adapter_name not in self.peft_config:
            config = LoraConfig.from_pretrained(os.fspath(folder))
            config.inference_mode = not is_trainable
            self.peft_config[adapter_name] = config
        return types.SimpleNamespace(missing_keys=[], unexpected_keys=[])  # of which lowbit raises an error

    # ---- files

    @words.peft_errors
    def save_pretrained(
        self,
        save_directory,
        safe_serialization=True,
        selected_adapters=None,
        save_embedding_layers="auto",
        is_main_process=True,
        **kwargs,
    ):
        if not safe_serialization:
            raise FeatureMissing("adapters in pickles (safe_serialization=False)")
        self.base_model.save_pretrained(
            save_directory,
            adapters_to_save=selected_adapters,
            save_embedding_layers=save_embedding_layers is True,
            is_main_process=is_main_process,
        )

    @classmethod
    @words.peft_errors
    def from_pretrained(
        cls,
        model,
        model_id,
        adapter_name="default",
        is_trainable=False,
        config=None,
        autocast_adapter_dtype=True,
        subfolder=None,
        **kwargs,
    ):
        _check_loading(kwargs)
        folder = os.path.join(model_id, subfolder) if subfolder else model_id
        options = {"adapter_name": adapter_name, "is_trainable": is_trainable} | _dtype(model, autocast_adapter_dtype)
        config = LoraConfig.from_pretrained(os.fspath(folder)) if config is None else config
        config.inference_mode = not is_trainable
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        touched.append("LoraModel")
        with _unsupported():
            self._adopt(Tuner.from_pretrained(model, folder, **options), config)
        return self


def _check_loading(kwargs):
    if kwargs.get("key_mapping"):
        raise FeatureMissing("loading with key_mapping")
    if kwargs.get("ignore_mismatched_sizes"):
        raise FeatureMissing("loading with ignore_mismatched_sizes")


def _tuner(model) -> Tuner | None:
    """The lowbit model in a PEFT model, or of a model that an adapter was injected in; None for any other."""
    while inner := model._modules.get("_orig_mod", model._modules.get("_fsdp_wrapped_module")):  # compile, FSDP
        model = inner
    if isinstance(model, PeftModel):
        return model.base_model
    return _injected.get(model)


_real = {}


def get_peft_model(model, peft_config, adapter_name="default", mixed=False, **kwargs):
    if type(peft_config) is not LoraConfig:
        return _real["get_peft_model"](model, peft_config, adapter_name, mixed, **kwargs)
    if mixed:
        raise FeatureMissing("PeftMixedModel")
    return PeftModel(model, peft_config, adapter_name, **kwargs)


@words.peft_errors
def inject_adapter_in_model(peft_config, model, adapter_name="default", low_cpu_mem_usage=False, state_dict=None):
    if type(peft_config) is not LoraConfig:
        return _real["inject_adapter_in_model"](peft_config, model, adapter_name, low_cpu_mem_usage, state_dict)
    if low_cpu_mem_usage:
        raise FeatureMissing("adapter on the meta device (low_cpu_mem_usage)")
    if state_dict is not None:
        raise FeatureMissing("inject_adapter_in_model(state_dict=...)")
    touched.append("LoraModel")
    if model in _injected:
        _injected[model].add_adapter(adapter_name, translated(peft_config, model))
    else:
        _injected[model] = Tuner(model, translated(peft_config, model), adapter_name)
        _injected[model].peft_config = {}
    _injected[model].peft_config[adapter_name] = peft_config
    return model


def get_peft_model_state_dict(model, state_dict=None, adapter_name="default", **kwargs):
    tuner = _tuner(model)
    if tuner is None:
        return _real["get_peft_model_state_dict"](model, state_dict, adapter_name, **kwargs)
    if state_dict is not None:
        raise FeatureMissing("get_peft_model_state_dict of a given state dict")
    tensors = tuner.adapter_state_dict(adapter_name)
    return _renamed(tensors, "base_model.model.", "") if model in _injected else tensors


def set_peft_model_state_dict(model, peft_model_state_dict, adapter_name="default", **kwargs):
    tuner = _tuner(model)
    if tuner is None:
        return _real["set_peft_model_state_dict"](model, peft_model_state_dict, adapter_name, **kwargs)
    touched.append("LoraModel")
    tuner.load_adapter_state_dict(peft_model_state_dict, adapter_name)
    return types.SimpleNamespace(missing_keys=[], unexpected_keys=[])  # of which lowbit raises an error


def get_base_model_state_dict(model):
    return _tuner(model).base_state_dict()


@torch.no_grad()
def set_base_model_state_dict(model, state_dict, strict=True):
    own = get_base_model_state_dict(model)
    for key in own.keys() & state_dict.keys():
        own[key].copy_(state_dict[key])
    keys = own.keys(), state_dict.keys()
    return types.SimpleNamespace(missing_keys=keys[0] - keys[1], unexpected_keys=keys[1] - keys[0])


def hotswap_adapter(model, model_name_or_path, adapter_name, **_):
    touched.append("LoraModel")
    _tuner(model).load_adapter(model_name_or_path, adapter_name)


def _renamed(tensors, old, new):
    return {new + key.removeprefix(old): value for key, value in tensors.items()}


def _absent(feature):
    """What stands for one of PEFT's functions or classes that lowbit has nothing for."""

    def function(*args, **kwargs):
        raise FeatureMissing(feature)

    function.from_pretrained = function
    return function


def install():
    """Replace names in peft, before any test module is imported."""
    for name in ("get_peft_model", "get_peft_model_state_dict", "set_peft_model_state_dict", "inject_adapter_in_model"):
        _real[name] = getattr(peft, name)
    new = {
        "get_peft_model": get_peft_model,
        "PeftModel": PeftModel,
        "get_peft_model_state_dict": get_peft_model_state_dict,
        "set_peft_model_state_dict": set_peft_model_state_dict,
        "inject_adapter_in_model": inject_adapter_in_model,
        "get_base_model_state_dict": get_base_model_state_dict,
        "set_base_model_state_dict": set_base_model_state_dict,
        "get_layer_status": _absent("layer and model status"),
        "get_model_status": _absent("layer and model status"),
        "convert_to_lora": _absent("convert_to_lora"),
        "save_as_lora": _absent("convert_to_lora"),
        "initialize_lora_eva_weights": _absent("EVA"),
        "get_eva_state_dict": _absent("EVA"),
        "PeftMixedModel": _absent("PeftMixedModel"),
    }
    peft.utils.hotswap.hotswap_adapter = hotswap_adapter
    peft.utils.hotswap.prepare_model_for_compiled_hotswap = _absent("hot-swapping of larger ranks")
    for name in dir(peft):
        if name.startswith("AutoPeftModel"):
            new[name] = _absent("AutoPeftModel")
        elif name.startswith("PeftModelFor"):
            new[name] = PeftModel
    new |= names.CLASSES
    for module in (peft, peft.mapping, peft.mapping_func, peft.peft_model, peft.utils, peft.utils.other, peft.helpers):
        for name, value in new.items():
            if hasattr(module, name):
                setattr(module, name, value)
    names.install()
    # PEFT's own LoRA model must not be reached behind the shim's back.
    peft.tuners.lora.LoraModel.__init__ = _absent("peft.tuners.lora.LoraModel itself")
