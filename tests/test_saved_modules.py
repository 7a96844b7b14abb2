"""Modules that train whole: a copy for each adapter, heads found by themselves, ties."""

import copy
import pickle

import pytest
import torch
import transformers
from conftest_models import assert_untouched, bert, llama, logits, mlp, randomize, snapshot, train
from torch import nn

import lowbit
from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel
from lowbit_lora.layers import SavedModule

kinds = pytest.mark.parametrize(("model_type", "config_type"), [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)])
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
DISTILBERT = {"vocab_size": 64, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 40}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
VIT = {key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
VIT |= {"image_size": 16, "patch_size": 8}
WAV = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40, "conv_dim": (8, 8)}
WAV |= {
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


@pytest.mark.parametrize(
    ("name", "config", "settings", "heads"),
    [
        ("BertForSequenceClassification", "BertConfig", SMALL, ["classifier"]),
        ("BertForTokenClassification", "BertConfig", SMALL, ["classifier"]),
        ("BertForQuestionAnswering", "BertConfig", SMALL, ["qa_outputs"]),
        ("BertForMultipleChoice", "BertConfig", SMALL, ["classifier"]),
        ("DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT, ["pre_classifier", "classifier"]),
        ("RobertaForSequenceClassification", "RobertaConfig", SMALL, ["classifier"]),
        ("LlamaForSequenceClassification", "LlamaConfig", SMALL, ["score"]),
        ("BartForSequenceClassification", "BartConfig", BART, ["classification_head"]),
        ("XLNetForSequenceClassification", "XLNetConfig", {"vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 2,
            "d_inner": 40}, ["sequence_summary", "logits_proj"]),
        ("ViTForImageClassification", "ViTConfig", VIT, ["classifier"]),
        ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", WAV, ["projector", "classifier"]),
        ("LlamaForCausalLM", "LlamaConfig", SMALL, []),
        ("BertForMaskedLM", "BertConfig", SMALL, []),
        ("BertModel", "BertConfig", SMALL, []),
    ],
)  # fmt: skip
def test_a_fresh_head_trains_and_is_saved(tmp_path, name, config, settings, heads):
    """A head of random values that is frozen, or not in the file, leaves the model at chance."""
    made = getattr(transformers, name)(getattr(transformers, config)(**settings))
    wrapped = QLoRAModel(made, QLoRAConfig(rank=2))
    assert (wrapped.lora_config.modules_to_save or []) == heads
    for head in heads:
        part = wrapped.model.get_submodule(head)
        assert isinstance(part, SavedModule)
        assert not any(isinstance(p, lowbit.QuantizedTensor) for p in part.parameters())
        assert all(p.requires_grad for p in part.current().parameters())
    keys = {key.removeprefix("base_model.model.") for key in wrapped.adapter_state_dict() if ".lora_" not in key}
    assert {key.split(".")[0] for key in keys} == set(heads)


@kinds
def test_hooks_of_a_saved_module_go_on(model_type, config_type):
    """A probe or a capture would fall silent, or stay on a module that no longer computes."""
    base, seen = mlp(), []
    handle = base.head.register_forward_hook(lambda *_: seen.append(1))
    wrapped, x = model_type(base, config_type(target_modules=["first"], modules_to_save=["head"])), torch.randn(2, 40)
    wrapped(x)
    assert seen == [1]
    merged = wrapped.merge_and_unload()
    merged(x)
    assert seen == [1, 1] and merged.head is base.head
    handle.remove()
    merged(x)
    assert seen == [1, 1]


@kinds
@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_modules_are_what_peft_computes(tmp_path, model_type, config_type, ensure, saved):
    """One library would train one copy of a tied weight, the other two: the adapter would mean something else."""
    peft = pytest.importorskip("peft")
    config = config_type(target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=ensure)
    wrapped = randomize(model_type(llama(tied=True), config))
    copies = {wrapped.model.lm_head.weight, wrapped.get_input_embeddings().weight}
    assert len(copies) == (1 if ensure else 2)
    wrapped.save_pretrained(tmp_path)
    again = model_type.from_pretrained(llama(tied=True), tmp_path)
    assert torch.equal(logits(again), logits(wrapped))
    if model_type is LoraModel:
        theirs = peft.PeftModel.from_pretrained(llama(tied=True), tmp_path)
        torch.testing.assert_close(logits(theirs), logits(wrapped), rtol=1e-5, atol=1e-5)


def test_a_tie_that_training_breaks_is_told():
    """The user would not know that the output layer keeps the old vectors."""
    with pytest.warns(UserWarning, match=r"embed_tokens is tied to lm_head.*ensure_weight_tying"):
        LoraModel(llama(tied=True), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))


@kinds
def test_copies_and_pickles(model_type, config_type):
    """A saved module would lose its copy, or recurse for ever, on its way to another process."""
    wrapped = randomize(model_type(bert(), config_type(target_modules=["query"])))
    for again in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(logits(again), logits(wrapped))


def test_each_row_has_the_head_of_its_adapter():
    """Requests for several tasks share a batch: each needs its own head."""
    wrapped = LoraModel(bert(), LoraConfig(target_modules=["query"]))
    wrapped.add_adapter("other", LoraConfig(target_modules=["query"]))
    randomize(wrapped)
    ids = torch.arange(21).view(3, 7)
    together = wrapped(input_ids=ids, adapter_names=["other", "default", "__base__"]).logits
    for row, name in enumerate(("other", "default")):
        wrapped.set_adapter(name)
        torch.testing.assert_close(together[row], wrapped(input_ids=ids[row : row + 1]).logits[0])
    with wrapped.disable_adapter():
        torch.testing.assert_close(together[2], wrapped(input_ids=ids[2:]).logits[0])


@pytest.mark.parametrize(
    ("make", "saved", "error"),
    [
        (lambda: nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4)]), "b": nn.Linear(4, 4)}), "a", TypeError),
        (lambda: lowbit.quantize_(nn.ModuleDict({"a": nn.Linear(64, 4), "b": nn.Linear(4, 4)})), "a", ValueError),
    ],
)
def test_what_cannot_train_whole_is_told(make, saved, error):
    """The module would be trained in part, or not at all."""
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match="modules_to_save"):
        LoraModel(model, LoraConfig(target_modules=["b"], modules_to_save=[saved]))
    assert_untouched(model, before)


def test_training_leaves_the_original():
    """Disabling the adapter has to give the base's own head back."""
    base = bert()
    before = {name: p.clone() for name, p in base.classifier.named_parameters()}
    wrapped = LoraModel(base, LoraConfig(target_modules=["query"]))
    train(wrapped)
    original = dict(wrapped.model.classifier.original_module.named_parameters())
    assert all(torch.equal(original[name], p) for name, p in before.items())
    assert wrapped.unload().classifier.weight is original["weight"]
