"""Single rows of an embedding that train, and layers that share its weight."""

import pytest
import torch
from conftest_models import IDS, assert_untouched, llama, logits, randomize, snapshot, train
from torch import nn

from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel
from lowbit_lora.layers import TrainedTokens

kinds = pytest.mark.parametrize(("model_type", "config_type"), [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)])
TOKENS = sorted({int(token) for token in IDS.flatten()[:3]})


@kinds
@pytest.mark.parametrize("tied", [False, True])
def test_only_the_rows_train(model_type, config_type, tied):
    """Other tokens' vectors would move, or the output layer not know the new ones."""
    config = config_type(target_modules=["q_proj"], trainable_token_indices=TOKENS)
    wrapped = model_type(llama(tied=tied), config)
    embedding = wrapped.get_input_embeddings()
    table = embedding.weight.detach().clone()
    losses = train(wrapped)
    assert losses[-1] < losses[0]
    assert torch.equal(embedding.weight, table)
    rows = wrapped.get_input_embeddings()(torch.arange(len(table)))
    changed = (rows != table).any(1).nonzero().flatten().tolist()
    assert changed == TOKENS
    trained, expected = rows.detach(), logits(wrapped)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged.get_input_embeddings().weight, trained)
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) is tied
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("tied", [False, True])
def test_files_both_ways(tmp_path, model_type, config_type, tied):
    """PEFT's users would lose the new tokens, or we theirs."""
    peft = pytest.importorskip("peft")
    wrapped = randomize(
        model_type(llama(tied=tied), config_type(target_modules=["q_proj"], trainable_token_indices=TOKENS))
    )
    wrapped.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(model_type.from_pretrained(llama(tied=tied), tmp_path / "ours")), logits(wrapped))
    if model_type is LoraModel:
        theirs = peft.PeftModel.from_pretrained(llama(tied=tied), tmp_path / "ours")
        torch.testing.assert_close(logits(theirs), logits(wrapped), rtol=1e-5, atol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = LoraModel.from_pretrained(llama(tied=tied), tmp_path / "theirs")
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_several_adapters_have_rows_of_their_own():
    """A token of one adapter would leak into another, or into the base."""
    base = llama()
    expected = logits(base)
    wrapped = LoraModel(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS[:1]))
    wrapped.add_adapter(
        "other", LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": TOKENS[1:]})
    )
    randomize(wrapped)
    first = logits(wrapped)
    wrapped.set_adapter("other")
    assert not torch.equal(logits(wrapped), first)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), expected)
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), first)
    wrapped.delete_adapter("other")
    assert not any(".other" in name for name, _ in wrapped.named_parameters())


@kinds
def test_a_combination_takes_what_one_adapter_has(model_type, config_type):
    """The head or the tokens of an adapter would be lost, or one of two heads without a word."""
    wrapped = model_type(llama(), config_type(target_modules=["q_proj"], trainable_token_indices=TOKENS))
    wrapped.add_adapter("other", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    randomize(wrapped)
    wrapped.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    wrapped.set_adapter(["default", "other"])
    expected = logits(wrapped)
    wrapped.set_adapter("both")
    torch.testing.assert_close(logits(wrapped), expected, rtol=1e-4, atol=1e-5)
    assert wrapped.configs["both"].modules_to_save == ["lm_head"]
    with pytest.raises(ValueError, match="expected different trainable_token_indices in default, both"):
        wrapped.set_adapter(["default", "both"])


@kinds
def test_a_further_adapter_finds_the_embedding(model_type, config_type):
    """Indices alone would mean the embedding only as long as no adapter is there."""
    wrapped = model_type(llama(), config_type(target_modules=["q_proj"], trainable_token_indices=TOKENS[:1]))
    wrapped.add_adapter("other", LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS[1:]))
    assert wrapped.get_input_embeddings().adapters.keys() == {"default", "other"}


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_encoder_and_a_decoder_share_the_rows(tmp_path, model_type):
    """Each has an embedding of its own on one weight: the decoder would not know the new tokens."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 40, "d_model": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_kv": 8}
    small |= {"d_ff": 24, "encoder_layers": 1, "decoder_layers": 1, "decoder_start_token_id": 0}
    small |= {
        f"{part}_{size}": 2 if "heads" in size else 24
        for part in ("encoder", "decoder")
        for size in ("attention_heads", "ffn_dim")
    }
    kinds = {"t5": ("T5Config", "T5ForConditionalGeneration"), "bart": ("BartConfig", "BartForConditionalGeneration")}
    config, kind = (getattr(transformers, name) for name in kinds[model_type])

    def base():
        torch.manual_seed(0)
        return kind(
            config(**{key: value for key, value in small.items() if key in vars(config()) or model_type == "t5"})
        ).eval()

    ids = torch.tensor([[3, 5, 3, 7]])
    target = "q" if model_type == "t5" else "q_proj"
    wrapped = randomize(LoraModel(base(), LoraConfig(target_modules=[target], trainable_token_indices=[3, 7])))
    expected = wrapped(input_ids=ids, decoder_input_ids=ids).logits
    wrapped.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(theirs(input_ids=ids, decoder_input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids, decoder_input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_token_indices": [10**6]}, r"embed_tokens|1000000"),
        ({"trainable_token_indices": {"quarry": [1]}}, "quarry"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "q_proj"),
        ({"trainable_token_indices": TOKENS, "modules_to_save": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_wrong_tokens_are_told(options, message):
    """Training would go on without them."""
    model = llama()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        LoraModel(model, LoraConfig(target_modules=["v_proj"], **options))
    assert_untouched(model, before)


def test_a_quantized_table_is_not_decoded():
    """A row would cost the memory of the whole table."""
    config = QLoRAConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS, quantize_embeddings=True)
    wrapped = QLoRAModel(llama(), config)
    embedding = wrapped.get_input_embeddings()
    assert isinstance(embedding, TrainedTokens) and isinstance(embedding.original_module, nn.Embedding)
    train(wrapped)
    assert embedding.weight.nbytes < embedding.weight.numel()
