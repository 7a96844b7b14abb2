"""Adapters between PEFT and lowbit: of each kind, a file of one computes in the other what it computed in its own."""

import pytest
import torch
from conftest_models import IDS, bert, llama
from safetensors.torch import load_file
from torch import nn

from lowbit_lora import LoraConfig, LoraModel

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore:.*tied to")]
WEIGHTS = "adapter_model.safetensors"


class Vision(nn.Module):
    """Convolutions, one of them in groups, batch norm and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.grouped(torch.relu(self.conv(x)))).mean((2, 3)))


def vision():
    torch.manual_seed(0)
    return Vision().eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    ).eval()


def t5():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, vocab_size=50)
    return transformers.T5ForConditionalGeneration(config).eval()


def tied_llama():
    return llama(tied=True)


def outputs(model):
    base = getattr(model, "get_base_model", lambda: model)()
    with torch.no_grad():
        if isinstance(base, Vision):
            return model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
        more = {"decoder_input_ids": IDS} if hasattr(base, "decoder") else {}
        return model(input_ids=IDS, **more).logits


def trained(model):
    """The model with every parameter that trains moved, as if it had been trained."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def theirs(make, settings):
    return trained(peft.get_peft_model(make(), peft.LoraConfig(r=4, init_lora_weights=False, **settings)))


def ours(make, settings):
    return trained(LoraModel(make(), LoraConfig(rank=4, init_lora_weights="random", **settings)))


KINDS = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "all linear": (bert, {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "regex": (llama, {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "one block": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "excluded": (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"}),
    "lora bias": (llama, {"target_modules": ["q_proj"], "lora_bias": True}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D DoRA": (gpt2, {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens"]}),
    "embedding of several": (gpt2, {"target_modules": ["wte", "wpe"]}),
    "embedding DoRA": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied embedding": (tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "tied head": (tied_llama, {"target_modules": ["lm_head"]}),
    "Conv2d": (vision, {"target_modules": ["conv", "grouped"]}),
    "Conv2d DoRA": (vision, {"target_modules": ["conv"], "use_dora": True, "modules_to_save": ["head"]}),
    "batch norm saved": (vision, {"target_modules": ["conv"], "modules_to_save": ["norm"]}),
    "DoRA": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "modules to save": (bert, {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}),
    "whole embedding": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "whole tied embedding": (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "whole tied head": (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "both ends": (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied on purpose": (
        tied_llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "token indices": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 20]}),
    "token indices of an embedding": (
        gpt2,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "trainable_token_indices": {"wte": [3, 4]}},
    ),
    "token indices, tied": (tied_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 20]}),
    "biases of LoRA": (bert, {"target_modules": ["query"], "bias": "lora_only", "modules_to_save": ["classifier"]}),
    "all biases": (bert, {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    "biases of an encoder and decoder": (t5, {"target_modules": ["q"], "bias": "all"}),
}
kinds = pytest.mark.parametrize(("make", "settings"), KINDS.values(), ids=KINDS)


@kinds
def test_peft_reads_ours(tmp_path, make, settings, recwarn):
    """An adapter that only lowbit can read is locked in."""
    model = ours(make, settings)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs(again), outputs(make()), atol=1e-3)
    assert not [w.message for w in recwarn if "adapter keys" in str(w.message) or "keyword" in str(w.message)]


@kinds
def test_we_read_pefts(tmp_path, make, settings):
    """Adapters that exist already have to work; saved again by lowbit they still are PEFT's."""
    model = theirs(make, settings)
    model.save_pretrained(str(tmp_path / "theirs"))
    again = LoraModel.from_pretrained(make(), tmp_path / "theirs")
    assert not again.training
    torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-5, atol=1e-5)
    again.save_pretrained(tmp_path / "ours")
    third = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(outputs(third), outputs(model), rtol=1e-5, atol=1e-5)


@kinds
def test_the_keys_are_pefts(tmp_path, make, settings):
    """PEFT ignores keys that it does not know: equal outputs alone would not show one that is named otherwise."""
    theirs(make, settings).save_pretrained(str(tmp_path / "theirs"))
    ours(make, settings).save_pretrained(tmp_path / "ours")
    peft_keys, keys = (set(load_file(tmp_path / who / WEIGHTS)) for who in ("theirs", "ours"))
    # PEFT adds the table of an embedding with LoRA, which has not changed, and writes some biases several times.
    copies = {key for key in peft_keys if ".base_layer.weight" in key or ".original_module." in key}
    copies |= {key for key in peft_keys if ".modules_to_save." in key}
    assert keys == peft_keys - copies


def test_an_adapter_without_its_head(tmp_path):
    """Where no task is named PEFT does not save the head; saved again by lowbit it still has to do without."""
    model = theirs(bert, {"target_modules": ["query"]})
    model.save_pretrained(str(tmp_path / "theirs"))
    again = LoraModel.from_pretrained(bert(), tmp_path / "theirs")
    again.save_pretrained(tmp_path / "ours")
    third = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "ours")).eval()
    for other in (again, third):
        torch.testing.assert_close(outputs(other), outputs(model), rtol=1e-5, atol=1e-5)


def test_several_adapters(tmp_path):
    """Each adapter is found in its own folder, as PEFT's are."""
    first, second = (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["v_proj", "q_proj"], "use_dora": True},
    )
    model = ours(llama, first)
    model.add_adapter("second", LoraConfig(rank=2, init_lora_weights="random", **second))
    model.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval()
    again.load_adapter(str(tmp_path / "ours" / "second"), "second")
    other = theirs(llama, first)
    other.add_adapter("second", peft.LoraConfig(r=2, init_lora_weights=False, **second))
    other.save_pretrained(str(tmp_path / "theirs"))
    loaded = LoraModel.from_pretrained(llama(), tmp_path / "theirs")
    loaded.load_adapter(tmp_path / "theirs" / "second", "second")
    for name in ("default", "second"):
        for one in (model, again, other, loaded):
            one.set_adapter(name)
        torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs(loaded), outputs(other), rtol=1e-5, atol=1e-5)


def resized(seed, make=llama):
    """A base whose new rows are random, as where a tokenizer got new tokens."""
    model = make()
    torch.manual_seed(seed)
    model.resize_token_embeddings(60, mean_resizing=False)
    return model


@pytest.mark.parametrize("make", [llama, tied_llama])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize(("who", "by"), [("ours", "ours"), ("ours", "theirs"), ("theirs", "ours")])
def test_resized_embeddings(tmp_path, make, targets, who, by, recwarn):
    """New rows are random in each process: without them in the file the adapter is one for another base."""
    if who == "theirs" and make is llama and targets == ["q_proj", "embed_tokens"]:
        pytest.skip("PEFT's file lacks the output layer, also for PEFT")
    model = (ours if who == "ours" else theirs)(lambda: resized(1, make), {"target_modules": targets})
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    load = LoraModel.from_pretrained if by == "ours" else peft.PeftModel.from_pretrained
    again = load(resized(2, make), str(tmp_path)).eval()
    torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-5, atol=1e-5)
    assert not [w.message for w in recwarn if "is another" in str(w.message)]
