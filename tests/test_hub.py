"""Uploading an adapter, and which attributes of the base a wrapper shows (lowbit/models.py)."""

import os
from types import SimpleNamespace

import pytest
import torch
from conftest_models import IDS, Mlp, bert, llama, mlp

from lowbit import models
from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(monkeypatch):
    """What would have been uploaded."""
    seen = SimpleNamespace(readme=False, files={}, calls={})

    class Api:
        def __init__(self, **options):
            seen.calls["api"] = options

        def create_repo(self, repo_id, **options):
            seen.calls["create"] = (repo_id, options)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def file_exists(self, repo_id, name):
            return seen.readme

        def upload_folder(self, *, folder_path, **options):
            seen.calls["upload"] = options
            for root, _, names in os.walk(folder_path):
                for name in names:
                    path = os.path.join(root, name)
                    with open(path, "rb") as file:
                        seen.files[os.path.relpath(path, folder_path)] = file.read()
            return "the commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return seen


def test_the_adapter_and_a_card_are_uploaded(hub, tmp_path):
    """The base stays where it is: it is large, and perhaps not one's own."""
    base = bert()
    base.config._name_or_path = "someone/some-bert"
    wrapped = QLoRAModel(base, QLoRAConfig())
    wrapped.add_adapter("second", LoraConfig())
    wrapped.save_pretrained(tmp_path)
    assert wrapped.push_to_hub("mine", private=True, token="t", commit_message="First", create_pr=True) == "the commit"
    card = hub.files.pop("README.md").decode()
    local = {str(path.relative_to(tmp_path)): path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    del local["README.md"]  # the local card knows no repository
    assert {name: len(content) for name, content in hub.files.items()} == local
    assert hub.calls["api"] == {"token": "t"}
    assert hub.calls["create"] == ("mine", {"private": True, "exist_ok": True})
    assert "me/mine" in card
    assert hub.calls["upload"] == {"repo_id": "me/mine", "commit_message": "First", "create_pr": True}
    data = huggingface_hub.ModelCard(card).data
    assert (data.base_model, data.library_name, data.tags) == ("someone/some-bert", "peft", ["lora", "lowbit"])


def test_a_card_that_is_there_stays(hub):
    """People write cards by hand."""
    hub.readme = True
    LoraModel(bert(), LoraConfig()).push_to_hub("mine", adapters_to_save=["default"])
    assert set(hub.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert hub.calls["upload"]["commit_message"] == "Upload adapter"


@pytest.mark.parametrize("name", [None, "/models/bert", "../bert", "a/b/c", "."])
def test_a_base_that_is_not_on_the_hub_is_not_named_as_if(hub, name):
    """The hub refuses a card whose base_model is a path."""
    base = bert()
    base.config._name_or_path = name or ""
    LoraModel(base, LoraConfig()).push_to_hub("mine")
    assert huggingface_hub.ModelCard(hub.files["README.md"].decode()).data.base_model is None


class Own(Mlp):
    """A model with methods of its own."""

    kind = "own"

    def encode(self, x):
        return self.first(x)

    @property
    def width(self):
        return 40

    def save_checkpoint(self, path):
        raise AssertionError("saved the base")

    save = push_to_somewhere = save_checkpoint


def test_attributes_of_a_plain_model():
    """Code for a model goes on with the wrapped one; what saves the base does not pass for the adapter."""
    torch.manual_seed(0)
    model = Own()
    model.note = "mine"
    wrapped = LoraModel(model, LoraConfig(target_modules=["first"]))
    assert (wrapped.kind, wrapped.note, wrapped.width) == ("own", "mine", 40)
    assert wrapped.first is model.first
    x = torch.randn(2, 40)
    assert torch.equal(wrapped.encode(x), model.first(x))
    for name in ("save_checkpoint", "save", "push_to_somewhere"):
        assert not hasattr(wrapped, name)
        with pytest.raises(AttributeError, match=rf"LoraModel has no attribute '{name}'.*get_base_model\(\)\.{name}"):
            getattr(wrapped, name)
    with pytest.raises(AttributeError, match="nowhere"):
        wrapped.nowhere  # noqa: B018


PASSED = "config generation_config device dtype name_or_path main_input_name generate get_input_embeddings can_generate"
PASSED += (
    " gradient_checkpointing_enable is_gradient_checkpointing enable_input_require_grads num_parameters model lm_head"
)
PASSED += " prepare_inputs_for_generation supports_gradient_checkpointing loss_function base_model"
KEPT_BACK = "resize_token_embeddings set_input_embeddings tie_weights dequantize enable_adapters disable_adapters"
KEPT_BACK += " get_adapter_state_dict register_for_auto_class init_weights save_checkpoint _init_weights"


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_attributes_of_a_transformers_model(wrap):
    """Trainer and generate need many; those of transformers' own adapters would see none, and report so."""
    wrapped = LoraModel(wrap(llama()), LoraConfig())
    assert [name for name in PASSED.split() if not hasattr(wrapped, name)] == []
    assert [name for name in KEPT_BACK.split() if hasattr(wrapped, name)] == []
    assert type(wrapped).save_pretrained is LoraModel.save_pretrained
    wrapped.generate(IDS, max_new_tokens=1)


def test_what_passes_on_exists():
    """A name of the list that transformers no longer has is one to look for under its new name."""
    transformers = pytest.importorskip("transformers")
    assert [name for name in models._PASSED_ON if not hasattr(transformers.PreTrainedModel, name)] == []


@pytest.mark.parametrize("storage", [{}, {"quantization": "int8"}, {"quantize_head": True}])
def test_num_parameters_counts_weights(storage):
    """Two weights share a byte; a count of bytes makes a 4-bit model half as large as it is."""
    base = llama()
    count = base.num_parameters()
    wrapped = QLoRAModel(base, QLoRAConfig(rank=4, target_modules=["q_proj"], **storage))
    assert wrapped.num_parameters() == count + 2 * 4 * (32 + 32)
    assert wrapped.num_parameters(only_trainable=True) == 2 * 4 * (32 + 32)


def test_a_wrapper_of_a_plain_model_has_no_hub_methods_of_the_base():
    """hasattr is how Trainer asks what a model is."""
    wrapped = LoraModel(mlp(), LoraConfig())
    for name in ("config", "generate", "gradient_checkpointing_enable"):
        assert not hasattr(wrapped, name)
