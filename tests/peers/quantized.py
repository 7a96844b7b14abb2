"""Quantizes what PEFT's tests load, so that PEFT's own code runs on lowbit's weights.

``install()`` wraps ``from_pretrained`` of transformers' models and of the stand-ins in PEFT's test_custom_models.py;
what a test has saved itself stays dense. Every LoraConfig is registered, as ``lowbit_lora.hf.peft.register`` does.
With ``decode``, the base is decoded before PEFT merges into it, which is what lowbit's refusals say to do.
"""

import functools
import os

import transformers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner
from plugin import touched
from torch import nn
from transformers.pytorch_utils import Conv1D

import lowbit
from lowbit_lora.hf import peft as lowbit_peft


def install(decode: bool) -> None:
    wrap(transformers.PreTrainedModel)
    import tests.test_custom_models as custom

    wrap(custom.MockTransformerWrapper)
    made = LoraConfig.__post_init__

    def registered(self):
        made(self)
        self._register_custom_module({nn.Linear: lowbit_peft._layer, Conv1D: lowbit_peft._layer})

    LoraConfig.__post_init__ = registered
    if decode:
        for name in ("merge_adapter", "_unload_and_optionally_merge"):
            setattr(BaseTuner, name, decoding(getattr(BaseTuner, name)))


def decoding(merge):
    """A method of PEFT's tuners that first decodes the base."""

    @functools.wraps(merge)
    def decoded(self, *args, **kwargs):
        lowbit.dequantize_(self.model)
        return merge(self, *args, **kwargs)

    return decoded


def wrap(cls: type) -> None:
    """Let ``cls.from_pretrained`` quantize the linear weights of a model of the hub."""
    load = cls.from_pretrained.__func__

    @functools.wraps(load)
    def quantizing(own, name, *args, **kwargs):
        model = load(own, name, *args, **kwargs)
        if isinstance(model, nn.Module) and not os.path.isdir(name):
            lowbit.quantize_(model)
            touched.extend(n for n, p in model.named_parameters() if isinstance(p, lowbit.QuantizedTensor))
        return model

    cls.from_pretrained = classmethod(quantizing)
