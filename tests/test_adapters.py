"""Several adapters on one model: which one computes, trains, is saved, and merges."""

import copy
import math

import pytest
import torch
from conftest_models import IDS, assert_untouched, bert, llama, logits, mlp, randomize, snapshot
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit_lora import LoRABaseLayer, LoraConfig, LoRALinear, LoraModel, QLoRAConfig, QLoRAModel
from lowbit_lora.layers import linear

kinds = pytest.mark.parametrize(("model_type", "config_type"), [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)])


def two(model_type=LoraModel, config_type=LoraConfig, model=None):
    """A model with adapters "default" on the queries and "other" on the values and queries, both random."""
    wrapped = model_type(bert() if model is None else model, config_type(target_modules=["query"], modules_to_save=[]))
    other = LoraConfig(rank=4, target_modules=["query", "value"], lora_alpha=2, modules_to_save=[])
    wrapped.add_adapter("other", other)
    return randomize(wrapped)


def lora_layers(wrapped):
    return [module for module in wrapped.modules() if isinstance(module, LoRABaseLayer)]


@kinds
def test_a_new_adapter_changes_nothing_until_it_is_set(model_type, config_type):
    """A served model would change its answers while an adapter is loaded."""
    wrapped = two(model_type, config_type)
    before = logits(wrapped)
    wrapped.add_adapter("third", LoraConfig(target_modules=["key"]))
    assert torch.equal(logits(wrapped), before)
    wrapped.set_adapter("other")
    other = logits(wrapped)
    assert not torch.equal(other, before)
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), before)


@kinds
def test_each_adapter_is_what_it_is_alone(model_type, config_type):
    """An adapter would compute something else because others are there."""
    wrapped = two(model_type, config_type)
    wrapped.set_adapter("other")
    config = config_type(rank=4, target_modules=["query", "value"], lora_alpha=2, modules_to_save=[])
    alone = model_type(bert(), config)
    with torch.no_grad():
        for name, layer in alone.get_base_model().named_modules():
            if isinstance(layer, LoRALinear):
                for ours, theirs in zip(
                    layer.factors(), wrapped.model.get_submodule(name).factors("other"), strict=True
                ):
                    ours.copy_(theirs)
    assert torch.equal(logits(wrapped), logits(alone))


@kinds
def test_active_adapters_add_up(model_type, config_type):
    """Two active adapters would count twice, or only the last."""
    wrapped = two(model_type, config_type)
    wrapped.set_adapter(["default", "other"])
    expected = copy.deepcopy(wrapped)
    for layer in lora_layers(expected):
        merged = layer.base_weight(torch.float32)
        for name in layer.adapters:
            merged = merged + layer.delta(name)
        layer.set_active(())
        layer.base_layer.weight = nn.Parameter(merged)
    torch.testing.assert_close(logits(wrapped), logits(expected), rtol=1e-5, atol=1e-5)


def test_active_adapters_train_together_with_dropout_of_their_own():
    """With one mask for both, the one without dropout would be trained with the other's."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 8), lora_dropout=0.5)
    layer.add_adapter("other", type(layer.adapter)(rank=4))
    for name in layer.adapters:
        nn.init.normal_(layer.factors(name)[1])
    layer.set_active(["default", "other"])
    x = torch.randn(1000, 64)
    without_default = layer(x) - layer.base_layer(x)
    lora_a, lora_b = layer.factors("other")
    rest = without_default - layer.adapters["other"].scaling * x @ lora_a.T @ lora_b.T
    lora_a, lora_b = layer.factors("default")
    # What is left is the dropped default: for each row, x's elements are 0 or twice themselves.
    dropped = torch.linalg.lstsq((lora_a.T @ lora_b.T * layer.adapters["default"].scaling).T, rest.T).solution.T
    assert (dropped @ lora_a.T - x @ lora_a.T).abs().max() > 0.1
    mean = torch.linalg.norm(rest.mean(0) - (layer.adapters["default"].scaling * x @ lora_a.T @ lora_b.T).mean(0))
    assert mean < 0.2 * torch.linalg.norm(rest.std(0))


def test_only_active_adapters_train():
    """A frozen adapter would be changed by the optimizer, or the new one not trained."""
    wrapped = two()
    names = [name for name, p in wrapped.named_parameters() if p.requires_grad and ".lora_" in name]
    assert names and all(".default." in name for name in names)
    wrapped.set_adapter("other")
    names = [name for name, p in wrapped.named_parameters() if p.requires_grad and ".lora_" in name]
    assert len(names) == 8 and all(".other." in name for name in names)


@kinds
def test_disabled_adapters_leave_the_base(model_type, config_type):
    """A preference method compares with the base's own outputs; afterwards the adapter has to be back."""
    base = bert()
    expected = logits(lowbit.quantize_(copy.deepcopy(base), skip=["classifier"]) if model_type is QLoRAModel else base)
    wrapped = two(model_type, config_type, base)
    adapted = logits(wrapped)
    with wrapped.disable_adapter():
        disabled = logits(wrapped)
    torch.testing.assert_close(disabled, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits(wrapped), adapted) and not torch.equal(adapted, disabled)


@kinds
def test_merge_and_unmerge(model_type, config_type):
    """Merged weights compute the same; afterwards each stored byte is what it was."""
    wrapped = two(model_type, config_type)
    before = logits(wrapped)
    weights = {name: p for name, p in wrapped.named_parameters() if name.endswith("base_layer.weight")}
    wrapped.merge_adapter(safe=True)
    merged = [layer for layer in lora_layers(wrapped) if "default" in layer.adapters]
    assert not any(isinstance(layer.base_layer.weight, QuantizedTensor) for layer in merged)
    torch.testing.assert_close(logits(wrapped), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="merged, got default"):
        wrapped.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        wrapped.set_adapter("other")
    wrapped.unmerge_adapter()
    assert all(dict(wrapped.named_parameters())[name] is weight for name, weight in weights.items())
    assert torch.equal(logits(wrapped), before)


def test_a_merge_that_is_not_finite_changes_nothing():
    """One layer with NaN would leave a half merged model."""
    wrapped = two()
    before = logits(wrapped)
    last = [layer for layer in lora_layers(wrapped) if "default" in layer.adapters][-1]
    with torch.no_grad():
        last.factors("default")[1][0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        wrapped.merge_adapter(safe=True)
    assert not any(layer.merged for layer in lora_layers(wrapped))
    with torch.no_grad():
        last.factors("default")[1][0, 0] = 0
    assert before.isfinite().all() and logits(wrapped).isfinite().all()


def test_rename_and_delete():
    """A renamed adapter is the same parameters, so that an optimizer goes on; a deleted one frees its memory."""
    wrapped = two()
    factors = lora_layers(wrapped)[0].factors("default")
    before = logits(wrapped)
    wrapped.rename_adapter("default", "first")
    assert wrapped.active_adapters == ("first",) and list(wrapped.configs) == ["first", "other"]
    assert all(a is b for a, b in zip(lora_layers(wrapped)[0].factors("first"), factors, strict=True))
    assert torch.equal(logits(wrapped), before)
    wrapped.delete_adapter("other")
    assert not any(".other" in name for name, _ in wrapped.named_parameters())
    assert torch.equal(logits(wrapped), before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.add_adapter("other", LoraConfig()), ValueError, "new name, got 'other'"),
        (lambda m: m.add_adapter("a.b", LoraConfig()), ValueError, "without dots and slashes"),
        (lambda m: m.add_adapter("x", LoraConfig(target_modules=["quarry"])), ValueError, "quarry"),
        (lambda m: m.add_adapter("x", LoraConfig(bias="all")), ValueError, "bias: expected 'none'"),
        (lambda m: m.add_adapter("x", {"rank": 8}), TypeError, "LoraConfig, got dict"),
        (lambda m: m.add_adapter("x", LoraConfig(rank_pattern={"quarry": 2})), ValueError, "rank_pattern: 'quarry'"),
        (lambda m: m.add_adapter("x", QLoRAConfig()), ValueError, "dense base"),
        (lambda m: m.set_adapter("third"), ValueError, "one of default, other, got 'third'"),
        (lambda m: m.delete_adapter("default"), ValueError, "not active, got 'default'"),
        (lambda m: m.delete_adapter("third"), ValueError, "'third'"),
        (lambda m: m.rename_adapter("default", "other"), ValueError, "new name"),
        (lambda m: m.merge_adapter(["third"]), ValueError, "'third'"),
    ],
)
def test_wrong_calls_change_nothing(call, error, message):
    """Each names what was expected and what came; a half-done change would answer wrongly later."""
    wrapped = two()
    before, expected = snapshot(wrapped), logits(wrapped)
    with pytest.raises(error, match=message):
        call(wrapped)
    assert_untouched(wrapped, before)
    assert torch.equal(logits(wrapped), expected)


@kinds
def test_saved_adapters_come_back(tmp_path, model_type, config_type):
    """The second adapter of a folder is loaded under a name, beside the first."""
    wrapped = two(model_type, config_type)
    wrapped.save_pretrained(tmp_path)
    loaded = model_type.from_pretrained(bert(), tmp_path)
    assert torch.equal(logits(loaded), logits(wrapped))
    loaded.load_adapter(tmp_path / "other", "again")
    assert torch.equal(logits(loaded), logits(wrapped)) and set(loaded.configs) == {"default", "again"}
    loaded.set_adapter("again")
    wrapped.set_adapter("other")
    assert torch.equal(logits(loaded), logits(wrapped))


def test_peft_loads_each_adapter(tmp_path):
    """PEFT finds further adapters in folders of their names."""
    peft = pytest.importorskip("peft")
    wrapped = two()
    wrapped.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path)
    theirs.load_adapter(str(tmp_path / "other"), "other")
    for name in ("default", "other"):
        wrapped.set_adapter(name)
        theirs.set_adapter(name)
        torch.testing.assert_close(logits(wrapped), logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_file_that_does_not_fit_leaves_the_model(tmp_path):
    """A failed load would leave an adapter of random numbers."""
    two().save_pretrained(tmp_path)
    wrapped = LoraModel(llama(), LoraConfig(target_modules=["q_proj"]))
    before = snapshot(wrapped)
    with pytest.raises(ValueError, match="query"):
        wrapped.load_adapter(tmp_path / "other", "other")
    assert_untouched(wrapped, before)


def test_each_adapter_has_its_own_head(tmp_path):
    """An adapter would answer with the head of another, or a disabled one with a trained head."""
    base = bert()
    expected = logits(base)
    wrapped = LoraModel(base, LoraConfig(target_modules=["query"]))
    wrapped.add_adapter("other", LoraConfig(target_modules=["query"]))
    randomize(wrapped)
    with torch.no_grad():
        for number, name in enumerate(wrapped.configs):
            wrapped.model.classifier.modules_to_save[name].bias.fill_(number)
    wrapped.save_pretrained(tmp_path)
    answers = {}
    for name in wrapped.configs:
        wrapped.set_adapter(name)
        answers[name] = logits(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), expected)
    assert not torch.equal(answers["default"], answers["other"])
    loaded = LoraModel.from_pretrained(bert(), tmp_path / "other")
    assert torch.equal(logits(loaded), answers["other"])
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), answers["default"])
    with pytest.raises(ValueError, match="at most one active adapter"):
        loaded.set_adapter(["default", "again"])
    assert torch.equal(logits(loaded), answers["default"])


def test_patterns_and_blocks():
    """Ranks and blocks of a config are those of the layers that its keys name."""
    config = LoraConfig(
        target_modules=["query", "value", "dense"],
        exclude_modules=["attention.output.dense", "pooler.dense"],
        layers_to_transform=[1],
        rank_pattern={"query": 2, r"output\.dense": 3},
        alpha_pattern={"layer.1.attention.self.value": 5},
    )
    wrapped = LoraModel(bert(), config)
    layers = {n: m.adapter for n, m in wrapped.model.named_modules() if isinstance(m, LoRABaseLayer)}
    start = "bert.encoder.layer.1."
    ranks = {name.removeprefix(start): (a.rank, a.lora_alpha) for name, a in layers.items()}
    assert ranks == {
        "attention.self.query": (2, 16),
        "attention.self.value": (8, 5),
        "intermediate.dense": (8, 16),
        "output.dense": (3, 16),
    }


def test_peft_agrees_on_patterns_and_blocks(tmp_path):
    """PEFT would put the adapter on other layers, or read other ranks, from the same file."""
    peft = pytest.importorskip("peft")
    config = LoraConfig(
        target_modules=["query", "value"],
        exclude_modules=["layer.0.attention.self.value"],
        layers_to_transform=[0, 1],
        rank_pattern={"query": 2},
        alpha_pattern={"value": 5},
    )
    wrapped = randomize(LoraModel(bert(), config))
    wrapped.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path)
    torch.testing.assert_close(logits(wrapped), logits(theirs), rtol=1e-5, atol=1e-5)


def test_adapters_survive_a_plain_model():
    """Models that are not Hugging Face's have adapters too, and shared layers one of each."""
    wrapped = LoraModel(mlp(), LoraConfig(target_modules=["first"]))
    wrapped.add_adapter("other", LoraConfig(target_modules=["first", "second"]))
    wrapped.set_adapter("other")
    assert wrapped.model.shared is wrapped.model.first
    assert wrapped(torch.randn(2, 40)).shape == (2, 3) and IDS.dim() == 2


def three(model_type, config_type):
    """A model with three adapters of two ranks, on two kinds of layers."""
    wrapped = model_type(bert(), config_type(rank=3, target_modules=["query"]))
    wrapped.add_adapter("b", LoraConfig(rank=5, target_modules=["query", "value"], lora_alpha=2))
    wrapped.add_adapter("c", LoraConfig(rank=3, target_modules=["dense"], exclude_modules=["pooler.dense"]))
    return randomize(wrapped)


@kinds
@pytest.mark.parametrize("few_ranks", [0, 128])
def test_each_row_has_its_adapter(model_type, config_type, few_ranks, monkeypatch):
    """Requests for several tasks share a batch: each must be answered as it would be alone."""
    monkeypatch.setattr(linear, "_FEW_RANKS", few_ranks)
    wrapped = three(model_type, config_type)
    rows = ["c", "default", "__base__", "b", "default", "c"]
    ids = torch.randint(50, (6, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = wrapped(input_ids=ids, adapter_names=rows).logits
        for row, name in enumerate(rows):
            if name == "__base__":
                with wrapped.disable_adapter():
                    alone = wrapped(input_ids=ids[row : row + 1]).logits
            else:
                wrapped.set_adapter(name)
                alone = wrapped(input_ids=ids[row : row + 1]).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("few_ranks", [0, 128])
def test_a_broken_adapter_stays_in_its_rows(few_ranks, monkeypatch):
    """One adapter with NaN would spoil the answers of all others in the batch."""
    monkeypatch.setattr(linear, "_FEW_RANKS", few_ranks)
    wrapped = three(LoraModel, LoraConfig)
    with torch.no_grad():
        for layer in lora_layers(wrapped):
            if "b" in layer.adapters:
                layer.factors("b")[0].fill_(math.nan)
    answers = wrapped(input_ids=IDS, adapter_names=["default", "b", "c"]).logits.isfinite().all(1)
    assert answers.tolist() == [True, False, True]


@kinds
@pytest.mark.parametrize("few_ranks", [0, 128])
def test_adapters_train_in_one_pass(model_type, config_type, few_ranks, monkeypatch):
    """Several adapters are trained over one pass of the base: each gets the gradients of its own rows."""
    monkeypatch.setattr(linear, "_FEW_RANKS", few_ranks)
    wrapped = three(model_type, config_type)
    rows, ids = ["c", "default", "b", "default"], torch.arange(28).reshape(4, 7) % 50
    for name, p in wrapped.named_parameters():
        p.requires_grad_(".lora_" in name)
    wrapped(input_ids=ids, adapter_names=rows).logits.square().sum().backward()
    together = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.zero_grad()
    for name in wrapped.configs:
        wrapped.set_adapter(name)
        own = [row for row, of in enumerate(rows) if of == name]
        wrapped(input_ids=ids[own]).logits.square().sum().backward()
        for key, parameter in wrapped.named_parameters():
            if f".{name}." in key and ".lora_" in key:
                torch.testing.assert_close(together[key], parameter.grad, rtol=1e-4, atol=1e-5)


def test_wrong_names_of_rows_are_told():
    """A typo would be answered by the base, and a name too few by what was in memory."""
    wrapped = three(LoraModel, LoraConfig)
    with pytest.raises(ValueError, match="one of default, b, c, got 'd'"):
        wrapped(input_ids=IDS, adapter_names=["default", "d", "b"])
    for names in (["b"], ["b"] * 2, ["b"] * 4, []):
        with pytest.raises(ValueError, match=f"each of the 3 rows of the batch, got {len(names)}"):
            wrapped(input_ids=IDS, adapter_names=names)
    with pytest.raises(ValueError, match="got 2 for an input of 21 rows"), wrapped.adapters_by_row(["b"] * 2):
        wrapped(input_ids=IDS)
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        wrapped(input_ids=IDS, adapter_names=["b"] * 3)


@kinds
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_combination_computes_the_sum(tmp_path, model_type, config_type, method):
    """A merged skill would be weaker or stronger than asked; saved, it has to come back with its ranks."""
    wrapped = three(model_type, config_type)
    with torch.no_grad():
        for layer in lora_layers(wrapped):
            for name in layer.adapters:
                layer.factors(name)[1].mul_(1 + len(name))
    rank = 8 if method == "svd" else None
    wrapped.add_weighted_adapter(["default", "b"], [0.5, -2.0], "sum", method, saved_from="b", rank=rank)
    wrapped.set_adapter("sum")
    for layer in lora_layers(wrapped):
        if "sum" not in layer.adapters:
            assert not {"default", "b"} & layer.adapters.keys()
            continue
        parts = [
            weight * layer.delta(name) for name, weight in (("default", 0.5), ("b", -2.0)) if name in layer.adapters
        ]
        torch.testing.assert_close(layer.delta("sum"), sum(parts), rtol=1e-4, atol=1e-5)
    wrapped.save_pretrained(tmp_path)
    loaded = model_type.from_pretrained(bert(), tmp_path / "sum")
    assert torch.equal(logits(loaded), logits(wrapped))


def test_a_wrong_combination_changes_nothing():
    """The layer and the ranks are named."""
    wrapped = three(LoraModel, LoraConfig)
    before = snapshot(wrapped)
    with pytest.raises(ValueError, match=r"query: factors: expected equal ranks.*\[3, 5\]"):
        wrapped.add_weighted_adapter(["default", "b"], [1, 1], "sum", "linear", saved_from="b")
    with pytest.raises(ValueError, match="expected 2, one for each adapter, got 1"):
        wrapped.add_weighted_adapter(["default", "b"], [1], "sum")
    with pytest.raises(ValueError, match="saved_from: expected one of default, b: each has its own classifier"):
        wrapped.add_weighted_adapter(["default", "b"], [1, 1], "sum")
    with pytest.raises(ValueError, match="saved_from: expected one of default, b, got 'c'"):
        wrapped.add_weighted_adapter(["default", "b"], [1, 1], "sum", saved_from="c")
    assert_untouched(wrapped, before)


@kinds
def test_a_combination_has_the_head_and_rows_of_one(tmp_path, model_type, config_type):
    """It would answer with the base's untrained head, or read the base's rows for its own tokens."""
    wrapped = model_type(bert(), config_type(rank=2, target_modules=["query"], trainable_token_indices=[3, 7]))
    wrapped.add_adapter("b", LoraConfig(rank=2, target_modules=["query"], modules_to_save=[]))
    randomize(wrapped)
    with torch.no_grad():
        for key, tensor in wrapped.adapter_state_dict("default").items():
            if ".lora_" not in key:
                tensor.normal_()
    wrapped.add_weighted_adapter(["default", "b"], [1.0, 0.0], "new")
    expected, own = logits(wrapped), wrapped.adapter_state_dict("default")
    new = wrapped.adapter_state_dict("new")
    for key in (key for key in new if ".lora_" not in key):
        assert torch.equal(new[key], own[key]) and new[key] is not own[key] and not new[key].requires_grad
    wrapped.set_adapter("new")
    torch.testing.assert_close(logits(wrapped), expected)
    wrapped.save_pretrained(tmp_path)
    loaded = model_type.from_pretrained(bert(), tmp_path / "new")
    assert torch.equal(logits(loaded), logits(wrapped))
