"""lowbit_lora/base_tensors.py: what an adapter's file keeps of the base."""

import copy
import json

import pytest
import torch
from conftest_models import IDS, Mlp, bert, llama, mlp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel

WEIGHTS = "adapter_model.safetensors"
KINDS = [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)]
kinds = pytest.mark.parametrize(("model_type", "config_type"), KINDS, ids=["lora", "qlora"])


def another(warnings):
    return [str(w.message) for w in warnings if "is another" in str(w.message)]


def kept(folder):
    with safe_open(folder / WEIGHTS, "pt") as file:
        return json.loads(file.metadata()["lowbit"])["base"]


@pytest.mark.parametrize("make", [llama, bert, mlp])
@pytest.mark.parametrize("settings", [{}, {"bias": "all"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@kinds
def test_the_same_base_is_not_another(tmp_path, make, settings, dtype, model_type, config_type, recwarn):
    """Nobody reads warnings that come without a reason: other precisions and storage are the same base."""
    wrapped = model_type(make().to(dtype), config_type(**settings))
    with torch.no_grad():
        for parameter in wrapped.trainable_parameters():
            parameter.add_(0.1)
    wrapped.save_pretrained(tmp_path)
    for target in (LoraModel, QLoRAModel):
        for other in (torch.float32, torch.bfloat16):
            loaded = target.from_pretrained(make().to(other), tmp_path)
            loaded.load_adapter(tmp_path, "second") if settings == {} else None
    assert not another(recwarn)


@pytest.mark.parametrize(("make", "part"), [(llama, "model.embed_tokens.weight"), (bert, "embeddings")])
@kinds
def test_another_base_is_named(tmp_path, make, part, model_type, config_type):
    """The shapes of two checkpoints of one model are the same: an adapter of one fits the other, and is wrong there."""
    base = make()
    base.config._name_or_path = "someone/base"
    model_type(base, config_type()).save_pretrained(tmp_path)
    assert kept(tmp_path)["name"] == f"{type(base).__name__} 'someone/base'"
    other = make(seed=1)
    other.config._name_or_path = "someone/tuned"
    with pytest.warns(UserWarning, match=f"someone/base.*someone/tuned.*{part}.* has other values"):
        model_type.from_pretrained(other, tmp_path)
    wrapped = model_type(make(seed=1), config_type())
    with pytest.warns(UserWarning, match=f"someone/base.*{part}.* has other values"):
        wrapped.load_adapter(tmp_path, "second")


def test_a_base_of_another_shape_is_named(tmp_path):
    """What the sizes of the config say comes before the error about the tensors, and explains it."""
    LoraModel(bert(), LoraConfig()).save_pretrained(tmp_path)
    other = bert()
    other.config.vocab_size = 51
    with pytest.warns(UserWarning, match="vocab_size is 50 there and 51 here"):
        LoraModel.from_pretrained(other, tmp_path)


def test_new_rows_with_other_values_are_seen(tmp_path):
    """resize_token_embeddings fills new rows at random: the adapter was trained on the values of its process."""
    bases = [llama(), llama()]
    for seed, base in enumerate(bases):
        torch.manual_seed(seed)
        base.resize_token_embeddings(60, mean_resizing=False)
    LoraModel(bases[0], LoraConfig()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="embed_tokens.weight has other values"):
        LoraModel.from_pretrained(bases[1], tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_lora_takes_out_of_the_base_is_no_difference(tmp_path, init, recwarn):
    """Such a base is changed where LoRA is; the file is for the base as it was."""
    LoraModel(llama(), LoraConfig(init_lora_weights=init)).save_pretrained(tmp_path)
    LoraModel.from_pretrained(llama(), tmp_path)
    assert not another(recwarn)


class Normed(Mlp):
    """With batch norm, a buffer that forward moves, one that it does not, and one that is not saved."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(40)
        self.register_buffer("mean", torch.zeros(40))
        self.register_buffer("fixed", torch.ones(3))
        self.register_buffer("cache", torch.zeros(40), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.mean(0), 0.1)
            self.cache.add_(1)
        return super().forward(x - self.mean)


def moved(model):
    torch.manual_seed(3)
    model.train()
    for _ in range(5):
        model(3 * torch.randn(16, 40) + 1)
    return model.eval()


STATISTICS = {f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")} | {"mean"}


@kinds
@pytest.mark.parametrize("saved", [None, ["norm"]])
def test_statistics_that_training_moves_are_saved(tmp_path, model_type, config_type, saved):
    """Batch norm learns without gradients: an adapter without its statistics belongs to a model that nobody has."""
    torch.manual_seed(0)
    base = Normed()
    fresh = [copy.deepcopy(base) for _ in range(3)]
    wrapped = moved(model_type(base, config_type(target_modules=["first"], modules_to_save=saved)))
    wrapped.save_pretrained(tmp_path)
    assert {key.removeprefix("base_model.model.") for key in load_file(tmp_path / WEIGHTS)} >= STATISTICS
    assert not {key for key in load_file(tmp_path / WEIGHTS) if key.endswith(("fixed", "cache"))}
    x = torch.randn(4, 40)
    again = model_type.from_pretrained(fresh[0], tmp_path)
    assert torch.equal(again(x), wrapped(x))
    again.save_pretrained(tmp_path)  # the second copy has them too
    assert torch.equal(model_type.from_pretrained(fresh[1], tmp_path)(x), wrapped(x))


def test_statistics_in_peft(tmp_path):
    """PEFT has no such keys, and loads them all the same."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Normed()
    fresh = copy.deepcopy(base)
    wrapped = moved(LoraModel(base, LoraConfig(target_modules=["first"])))
    wrapped.save_pretrained(tmp_path)
    x = torch.randn(4, 40)
    theirs = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), wrapped(x), rtol=1e-5, atol=1e-5)


def test_statistics_that_stay_are_not_saved(tmp_path):
    """Where batch norm was in eval mode, or the model was only cast, the file is as without it."""
    wrapped = LoraModel(Normed().eval(), LoraConfig(target_modules=["first"]))
    wrapped(torch.randn(16, 40))
    wrapped.bfloat16().save_pretrained(tmp_path)
    assert all(".lora_" in key for key in load_file(tmp_path / WEIGHTS))


@pytest.fixture
def trained_and_fresh(tmp_path):
    """A base whose statistics training moved, its adapter in ``tmp_path``, and the same base before, wrapped."""
    torch.manual_seed(0)
    base = Normed()
    fresh = copy.deepcopy(base)
    config = LoraConfig(target_modules=["first"])
    moved(LoraModel(base, config)).save_pretrained(tmp_path)
    return base, fresh, LoraModel(fresh, config)


def test_a_further_adapter_does_not_move_statistics(trained_and_fresh, tmp_path):
    """The base has one set of them, which the first adapter needs: that it is another is said."""
    _, fresh, wrapped = trained_and_fresh
    with pytest.warns(UserWarning, match="other values of .*norm.running_mean"):
        wrapped.load_adapter(tmp_path, "second")
    assert torch.equal(fresh.norm.running_mean, torch.zeros(40))


def test_the_first_adapter_brings_its_statistics(trained_and_fresh, tmp_path):
    """Training that is resumed, or the best checkpoint, would go on with the statistics of another moment."""
    base, fresh, wrapped = trained_and_fresh
    wrapped.load_adapter(tmp_path, "default")
    assert torch.equal(fresh.norm.running_mean, base.norm.running_mean)
    assert not torch.equal(fresh.norm.running_mean, torch.zeros(40))


def test_whole_embeddings_of_a_quantized_model(tmp_path):
    """What is stored in 4 bits is saved as it is read."""
    config = QLoRAConfig(target_modules=["q_proj"], quantize_embeddings=True, quantize_head=True)
    wrapped = QLoRAModel(llama(), config)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    saved = load_file(tmp_path / WEIGHTS)
    embedding = wrapped.model.model.embed_tokens.weight.dequantize()
    assert torch.equal(saved["base_model.model.model.embed_tokens.weight"], embedding)
    again = LoraModel.from_pretrained(llama(seed=1), tmp_path)
    assert torch.equal(again.get_input_embeddings()(IDS), wrapped.get_input_embeddings()(IDS))
