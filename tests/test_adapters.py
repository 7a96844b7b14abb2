"""Several adapters on one model: which one computes, trains, is saved, and merges."""

import copy

import pytest
import torch
from conftest_models import IDS, assert_untouched, bert, llama, logits, mlp, randomize, snapshot
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit_lora import LoRABaseLayer, LoraConfig, LoRALinear, LoraModel, QLoRAConfig, QLoRAModel

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


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_leaves_what_trains(tmp_path, is_trainable):
    """What someone froze would train on, or what is served would train."""
    two().save_pretrained(tmp_path)
    wrapped = two()
    lora_layers(wrapped)[0].lora_A["default"].requires_grad_(False)
    before = {name: p.requires_grad for name, p in wrapped.named_parameters()}
    wrapped.load_adapter(tmp_path / "other", "new", is_trainable=is_trainable)
    assert all(p.requires_grad is before.get(name, is_trainable) for name, p in wrapped.named_parameters())
    served = LoraModel.from_pretrained(bert(), tmp_path)
    served.load_adapter(tmp_path / "other", "new", is_trainable=is_trainable)
    served.set_adapter("new")
    trained = {name for name, p in served.named_parameters() if p.requires_grad}
    assert bool(trained) is is_trainable and all(".new." in name for name in trained)


@kinds
def test_values_from_memory(model_type, config_type):
    """Training loops and samplers hand adapters over without a disk between."""
    wrapped = two(model_type, config_type)
    fresh = model_type(bert(), config_type(target_modules=["query"], modules_to_save=[]))
    values = {key: value.clone() for key, value in wrapped.adapter_state_dict("default").items()}
    before, place = snapshot(fresh), fresh.adapter_state_dict()
    key, value = values.popitem()
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        fresh.load_adapter_state_dict(values)
    assert_untouched(fresh, before)
    fresh.load_adapter_state_dict(values | {key: value})
    assert torch.equal(logits(fresh), logits(wrapped))
    assert all(tensor is place[key] for key, tensor in fresh.adapter_state_dict().items())


@pytest.mark.parametrize("load", [LoraModel.from_pretrained, LoraModel.load_adapter])
def test_factors_are_loaded_in_a_dtype(tmp_path, load):
    """A served adapter in 16 bits would take twice the memory."""
    two().save_pretrained(tmp_path)
    if load == LoraModel.load_adapter:
        wrapped = LoraModel(bert(), LoraConfig(target_modules=["query"], modules_to_save=[]))
        wrapped.load_adapter(tmp_path / "other", "other", lora_dtype="bfloat16")
    else:
        wrapped = LoraModel.from_pretrained(bert(), tmp_path / "other", adapter_name="other", lora_dtype="bfloat16")
    factors = [value for key, value in wrapped.adapter_state_dict("other").items() if ".lora_" in key]
    assert {factor.dtype for factor in factors} == {torch.bfloat16} and all(f.any() for f in factors)


def test_the_base_by_its_own_names():
    """What was loaded into the base could not be compared with it, nor saved again."""
    base = llama(tied=True)
    expected = {key: value.clone() for key, value in base.state_dict().items()}
    options = {"target_modules": ["q_proj"], "modules_to_save": ["mlp"], "trainable_token_indices": [1]}
    wrapped = randomize(LoraModel(base, LoraConfig(**options)))
    found = wrapped.base_state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


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


def three(model_type, config_type, **options):
    """A model with three adapters of two ranks, on two kinds of layers."""
    wrapped = model_type(bert(), config_type(rank=3, target_modules=["query"], **options))
    wrapped.add_adapter("b", LoraConfig(rank=5, target_modules=["query", "value"], lora_alpha=2, **options))
    wrapped.add_adapter("c", LoraConfig(rank=3, target_modules=["dense"], exclude_modules=["pooler.dense"], **options))
    return randomize(wrapped)


@kinds
def test_each_row_has_its_adapter(model_type, config_type):
    """Requests for several tasks share a batch: each must be answered as it would be alone."""
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


@kinds
def test_adapters_train_in_one_pass(model_type, config_type):
    """Several adapters are trained over one pass of the base: each gets the gradients of its own rows."""
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


@kinds
@pytest.mark.parametrize("tied", [False, True])
def test_a_beam_has_the_adapter_of_its_row(model_type, config_type, tied):
    """A beam search has several rows for each of the batch: only the first ones would have adapters."""
    options = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    if tied:
        options = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 5]}
    wrapped = model_type(llama(tied=tied), config_type(**options))
    wrapped.add_adapter("b", LoraConfig(**options | {"target_modules": ["v_proj"]}))
    randomize(wrapped)
    ids, rows = torch.tensor([[1, 2, 3], [5, 2, 9], [1, 7, 8], [2, 2, 1]]), ["b", "__base__", "default", "b"]

    def answer(ids):
        search = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        return wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **search)

    with wrapped.adapters_by_row(rows):
        together = answer(ids)
    for row, name in enumerate(rows):
        with wrapped.adapters_by_row([name]):
            assert torch.equal(together[row], answer(ids[row : row + 1])[0])
    assert len({tuple(row[3:]) for row in together.tolist()}) > 1


def test_wrong_names_of_rows_are_told():
    """A typo would be answered by the base, and a name too few by what was in memory."""
    wrapped = three(LoraModel, LoraConfig)
    with pytest.raises(ValueError, match="one of default, b, c, got 'd'"):
        wrapped(input_ids=IDS, adapter_names=["default", "d", "b"])
    for names in (["b"], ["b"] * 2, ["b"] * 4, []):
        with pytest.raises(ValueError, match=f"each of the 3 rows of the batch, got {len(names)}"):
            wrapped(input_ids=IDS, adapter_names=names)
    with (
        pytest.raises(ValueError, match="a name for each row of the batch, got 2 for 21 rows of x"),
        wrapped.adapters_by_row(["b"] * 2),
    ):
        wrapped(input_ids=IDS)
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        wrapped(input_ids=IDS, adapter_names=["b"] * 3)


@kinds
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_combination_computes_the_sum(tmp_path, model_type, config_type, method):
    """A merged skill would be weaker or stronger than asked; saved, it has to come back with its ranks."""
    wrapped = three(model_type, config_type, modules_to_save=[])
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
    wrapped = three(LoraModel, LoraConfig, modules_to_save=[])
    before = snapshot(wrapped)
    with pytest.raises(ValueError, match=r"query: factors: expected equal ranks.*\[3, 5\]"):
        wrapped.add_weighted_adapter(["default", "b"], [1, 1], "sum", "linear", saved_from="b")
    with pytest.raises(ValueError, match="expected 2, one for each adapter, got 1"):
        wrapped.add_weighted_adapter(["default", "b"], [1], "sum")
    with pytest.raises(ValueError, match="saved_from: expected one of default, b, got 'c'"):
        wrapped.add_weighted_adapter(["default", "b"], [1, 1], "sum", saved_from="c")
    assert_untouched(wrapped, before)


@kinds
def test_hot_swapping_keeps_the_memory(tmp_path, model_type, config_type):
    """A CUDA graph, or a server's compiled model, computes with the addresses it has seen."""
    wrapped = two(model_type, config_type)
    smaller = randomize(
        model_type(bert(), config_type(rank=3, lora_alpha=5, target_modules=["query"], modules_to_save=[]))
    )
    smaller.save_pretrained(tmp_path)
    pointers = {name: p.data_ptr() for name, p in wrapped.named_parameters() if ".lora_" in name}
    scalings = [layer.adapters["default"] for layer in lora_layers(wrapped) if "default" in layer.adapters]
    wrapped.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(wrapped), logits(smaller), rtol=1e-5, atol=1e-6)
    assert {name: p.data_ptr() for name, p in wrapped.named_parameters() if ".lora_" in name} == pointers
    assert scalings == [layer.adapters["default"] for layer in lora_layers(wrapped) if "default" in layer.adapters]


def test_a_merged_adapter_takes_no_values(tmp_path):
    """The model would go on computing with those that are merged."""
    wrapped = two()
    wrapped.save_pretrained(tmp_path)
    wrapped.merge_adapter()
    for load in (
        lambda: wrapped.load_adapter(tmp_path, "default"),
        lambda: wrapped.load_adapter_state_dict(wrapped.adapter_state_dict()),
    ):
        with pytest.raises(ValueError, match="expected one that is not merged, got 'default'"):
            load()
    wrapped.load_adapter(tmp_path / "other", "other")


def test_hot_swapping_what_does_not_fit_changes_nothing(tmp_path):
    """Half of another adapter would answer."""
    wrapped = two()
    LoraModel(bert(), LoraConfig(rank=16, target_modules=["query"], modules_to_save=[])).save_pretrained(
        tmp_path / "rank"
    )
    LoraModel(bert(), LoraConfig(rank=2, target_modules=["key"], modules_to_save=[])).save_pretrained(tmp_path / "key")
    before = snapshot(wrapped)
    with pytest.raises(ValueError, match=r"query.*at most the shape \(8, 32\).*\(16, 32\)"):
        wrapped.load_adapter(tmp_path / "rank", "default")
    with pytest.raises(ValueError, match="unexpected.*key"):
        wrapped.load_adapter(tmp_path / "key", "default")
    assert_untouched(wrapped, before)


def test_lora_plus_groups():
    """B would train at A's rate, or biases be decayed."""
    wrapped = LoraModel(bert(), LoraConfig(target_modules=["query"], bias="all"))
    groups = wrapped.optimizer_groups(1e-4, weight_decay=0.1, lora_plus_ratio=16)
    names = {p: name for name, p in wrapped.named_parameters()}
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(
        name for name, p in wrapped.named_parameters() if p.requires_grad
    )
    for group in groups:
        for parameter in group["params"]:
            is_b = ".lora_B." in names[parameter]
            assert group["lr"] == pytest.approx(16e-4 if is_b else 1e-4)
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
    torch.optim.AdamW(groups).step()


def test_rows_follow_their_beams():
    """Beam search repeats each row; the copies would be answered by other rows' adapters."""
    wrapped = LoraModel(mlp(), LoraConfig(target_modules=["first", "second"], modules_to_save=["head"]))
    wrapped.add_adapter("other", LoraConfig(target_modules=["first"], modules_to_save=["head"]))
    randomize(wrapped)
    x = torch.randn(2, 40)
    with wrapped.adapters_by_row(["default", "other"]):
        once, beams = wrapped(x), wrapped(x.repeat_interleave(3, 0))
        torch.testing.assert_close(beams, once.repeat_interleave(3, 0))
        with pytest.raises(ValueError, match="a name for each row of the batch, got 2 for 3 rows"):
            wrapped(torch.randn(3, 40))


def test_a_file_may_list_what_the_model_has_not(tmp_path):
    """PEFT lists names for a whole family of models; a user who writes one that matches nothing has made a mistake."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "q_proj"], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(bert(), config)
    theirs.save_pretrained(tmp_path)
    assert torch.equal(logits(LoraModel.from_pretrained(bert(), tmp_path)), logits(theirs.eval()))
    with pytest.raises(ValueError, match="'q_proj' matches nothing"):
        LoraModel(bert(), LoraConfig.from_peft(config))


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
