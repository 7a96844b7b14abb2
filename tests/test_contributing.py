"""The kind of layer that CONTRIBUTING.md shows works as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from conftest_models import randomize
from torch import nn

from lowbit_lora import LoraConfig, LoraModel, layers

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture
def registered(monkeypatch):
    """The page's class, registered as a new kind of layer would be."""
    (code,) = re.findall(r"```python\n(.*?class LoRAConvTranspose1d.*?)```", PAGE.read_text(), re.DOTALL)
    namespace = {}
    exec(code, namespace)
    monkeypatch.setattr(layers, "LAYERS", (*layers.LAYERS, namespace["LoRAConvTranspose1d"]))
    return namespace["LoRAConvTranspose1d"]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv1d(6, 2, 1))


def test_the_example_of_a_new_layer_works(registered, tmp_path):
    """Somebody who copies it would get a layer that cannot be trained, saved, merged or combined."""
    base, x = model(), torch.randn(3, 4, 7)
    expected = base(x)
    wrapped = LoraModel(base, LoraConfig(rank=2, target_modules=["0"]))
    assert isinstance(wrapped.model[0], registered)
    torch.testing.assert_close(wrapped(x), expected)
    wrapped.add_adapter("other", LoraConfig(rank=3, target_modules=["0", "2"]))
    randomize(wrapped)
    wrapped(x).sum().backward()
    assert all(factor.grad is not None for factor in wrapped.model[0].adapter_parameters("default"))
    wrapped.save_pretrained(tmp_path)
    y = wrapped(x)
    torch.testing.assert_close(LoraModel.from_pretrained(model(), tmp_path)(x), y)
    rows = wrapped(x, adapter_names=["default", "other", "__base__"])
    torch.testing.assert_close(rows[0], y[0])
    torch.testing.assert_close(rows[2], expected[2])
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(x), y, rtol=1e-5, atol=1e-5)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(wrapped.merge_and_unload()(x), y, rtol=1e-5, atol=1e-5)
