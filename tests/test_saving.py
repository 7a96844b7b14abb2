"""lowbit_lora/files.py: the adapter's files, their exchange with PEFT, and broken files."""

import json
import os
import struct

import pytest
import torch
from conftest_models import assert_untouched, bert, llama, logits, mlp, snapshot, train
from safetensors.torch import load_file, save_file

from lowbit import WeightSpec
from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = [(LoraModel, LoraConfig), (QLoRAModel, QLoRAConfig)]
kinds = pytest.mark.parametrize(("model_type", "config_type"), KINDS, ids=["lora", "qlora"])
SETTINGS = [
    {},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"use_rslora": True, "rank": 4},
    {"target_modules": r".*\.(query|q_proj|dense|up_proj)"},
]


def trained(make=bert, **settings):
    wrapped = QLoRAModel(make(), QLoRAConfig(**settings))
    train(wrapped)
    return wrapped


def dequantized(make, **settings):
    """A dense base that holds our 4-bit weights decoded."""
    return QLoRAModel(make(), QLoRAConfig(**settings)).merge_and_unload()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@kinds
@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_loaded_adapter_predicts_the_same(tmp_path, model_type, config_type, make, settings):
    """A run is lost if its adapter does not come back bit for bit."""
    wrapped = model_type(make(), config_type(**settings))
    train(wrapped)
    wrapped.save_pretrained(tmp_path)
    base = make()
    if hasattr(base, "classifier"):
        torch.nn.init.normal_(base.classifier.weight)  # the head has to come from the file
    again = model_type.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again), logits(wrapped))
    assert not again.trainable_parameters()


@pytest.mark.parametrize("scale", ["absmax", "search"])
def test_saved_storage_settings_come_back(tmp_path, scale):
    """An adapter belongs to the base it was trained on: other blocks or scales are another base."""
    wrapped = trained(quantization="fp4", double_quant=False, block_size=128, scale=scale)
    wrapped.save_pretrained(tmp_path)
    again = QLoRAModel.from_pretrained(bert(), tmp_path)
    config = again.lora_config
    assert (config.spec, config.scale) == (WeightSpec("fp4", 128, False), scale)
    assert torch.equal(logits(again), logits(wrapped))
    other = {"absmax": "search", "search": "absmax"}[scale]
    assert not torch.equal(logits(QLoRAModel.from_pretrained(bert(), tmp_path, scale=other)), logits(wrapped))
    assert QLoRAModel.from_pretrained(bert(), tmp_path, block_size=32).lora_config.block_size == 32
    with pytest.raises(TypeError, match="rnk"):
        QLoRAModel.from_pretrained(bert(), tmp_path, rnk=3)


def test_training_goes_on_after_loading(tmp_path):
    """is_trainable resumes the same training; without it nothing may move."""
    wrapped = trained()
    wrapped.save_pretrained(tmp_path)
    again = QLoRAModel.from_pretrained(bert(), tmp_path, is_trainable=True)
    assert train(again) == train(wrapped)


def test_only_the_adapter_is_written(tmp_path):
    """A few MB for a model of many GB, under PEFT's names, with the base's name in the config."""
    wrapped = QLoRAModel(bert(), QLoRAConfig(rank=4, target_modules=["query"]))
    wrapped.get_base_model().config._name_or_path = "someone/some-bert"
    wrapped.save_pretrained(tmp_path)
    assert set(files(tmp_path)) == {WEIGHTS, CONFIG, "README.md"}
    stem = "base_model.model.bert.encoder.layer.{}.attention.self.query.lora_{}.weight"
    lora = {stem.format(i, part) for i in (0, 1) for part in "AB"}
    head = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert set(load_file(tmp_path / WEIGHTS)) == lora | head
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 4
    assert config["modules_to_save"] == ["classifier"]
    assert config["task_type"] == "SEQ_CLS"
    assert config["base_model_name_or_path"] == "someone/some-bert"
    raw = (tmp_path / WEIGHTS).read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["__metadata__"]["format"] == "pt"


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_loads_ours(tmp_path, make, settings, recwarn):
    """PEFT on the dequantized base gives the same outputs in fp32: the file means what PEFT reads in it."""
    peft = pytest.importorskip("peft")
    wrapped = trained(make, **settings)
    wrapped.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(dequantized(make), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs), logits(wrapped), rtol=1e-4, atol=1e-5)
    said = [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
    assert not [text for text in said if "adapter" in text.lower() or "keyword" in text.lower()]


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("settings", [{}, {"bias": "all"}, {"bias": "lora_only"}, {"use_rslora": True}])
@pytest.mark.parametrize("named_task", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_we_load_pefts(tmp_path, make, settings, named_task):
    """Adapters that exist already have to work, with and without PEFT's knowledge of the task."""
    peft = pytest.importorskip("peft")
    task = ("SEQ_CLS" if make is bert else "CAUSAL_LM") if named_task else None
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type=task, **settings)
    theirs = peft.get_peft_model(dequantized(make), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.eval()
    theirs.save_pretrained(str(tmp_path))
    ours = QLoRAModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("failing", ["weights", "config", "first rename", "second rename"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_save_leaves_the_previous_one(tmp_path, monkeypatch, failing, existing):
    """A full disk in the last save must not cost the one before, nor pair new weights with an old config."""
    if existing:
        trained(rank=4).save_pretrained(tmp_path)
    before = files(tmp_path)
    wrapped = trained(rank=8)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    if failing in ("weights", "config"):
        calls = [fail] if failing == "weights" else [lambda file: None, fail]
        monkeypatch.setattr(os, "fsync", lambda file: calls.pop(0)(file))
    else:
        real, name = os.replace, WEIGHTS if failing == "first rename" else CONFIG

        def replace(source, target):
            if target == str(tmp_path / name):
                fail()
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no space"):
        wrapped.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert files(tmp_path) == before
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(logits(QLoRAModel.from_pretrained(bert(), tmp_path)), logits(wrapped))


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def edit_config(folder, **values):
    """An edited config, beside weights that do not know theirs, as PEFT's do not."""
    edit(folder, lambda tensors: None)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


A_KEY = "base_model.model.bert.pooler.dense.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "error", "names"),
    [
        (lambda f: os.remove(f / WEIGHTS), FileNotFoundError, (WEIGHTS,)),
        (lambda f: os.remove(f / CONFIG), FileNotFoundError, (CONFIG,)),
        (lambda f: truncate(f / WEIGHTS, 0.9), OSError, (WEIGHTS, "truncated")),
        (lambda f: truncate(f / WEIGHTS, 0.01), OSError, (WEIGHTS, "truncated")),
        (lambda f: truncate(f / WEIGHTS, 0), OSError, (WEIGHTS, "truncated")),
        (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 500), OSError, (WEIGHTS, "corrupt")),
        (lambda f: truncate(f / CONFIG, 0.5), OSError, (CONFIG, "truncated")),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), OSError, (CONFIG, "corrupt")),
        (lambda f: (f / CONFIG).write_text("[1]"), OSError, (CONFIG, "list")),
        (lambda f: edit_config(f, r=0), ValueError, (CONFIG, "rank", "0")),
        (lambda f: edit_config(f, r="eight"), TypeError, (CONFIG, "rank", "eight")),
        (lambda f: edit_config(f, r=3), ValueError, ("lora_A", "(3, ", "(8, ")),
        (lambda f: edit_config(f, use_dora=True), ValueError, (WEIGHTS, "missing", "lora_magnitude_vector")),
        (lambda f: edit_config(f, use_qalora=True), ValueError, (CONFIG, "use_qalora")),
        (lambda f: edit_config(f, target_modules=["nowhere"]), ValueError, ("nowhere",)),
        (lambda f: edit_config(f, target_modules=["query"]), ValueError, ("unexpected", "lora_A")),
        (lambda f: edit_config(f, bias="all"), ValueError, ("missing", "bias")),
        (lambda f: edit(f, lambda t: t.pop(A_KEY)), ValueError, ("missing", A_KEY)),
        (lambda f: edit(f, lambda t: t.update(more=torch.zeros(1))), ValueError, ("unexpected", "more")),
        (
            lambda f: edit(f, lambda t: t.update({A_KEY: torch.zeros(8, 31)})),
            ValueError,
            (A_KEY, "(8, 32)", "(8, 31)"),
        ),
        (
            lambda f: edit(f, lambda t: t.update({A_KEY: torch.zeros(8, 32, dtype=torch.int8)})),
            ValueError,
            ("int8",),
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(tmp_path, spoil, error, names):
    """Whatever is wrong with an adapter, the base that took minutes to load is still good."""
    trained().save_pretrained(tmp_path)
    spoil(tmp_path)
    base = bert()
    before = snapshot(base)
    with pytest.raises(error) as raised:
        QLoRAModel.from_pretrained(base, tmp_path)
    for name in names:
        assert name in str(raised.value)
    assert_untouched(base, before)


def test_an_edited_config(tmp_path):
    """A config of another adapter, or of another save, would scale or place the tensors in another way, unsaid."""
    wrapped = trained(lora_alpha=16)
    wrapped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 32, "r": 4}))
    with pytest.raises(OSError) as raised:
        QLoRAModel.from_pretrained(bert(), tmp_path)
    for name in (WEIGHTS, CONFIG, "lora_alpha is 16 there and 32 here", "r is 8 there and 4 here", "settings_from"):
        assert name in str(raised.value)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 32}))
    doubled = QLoRAModel.from_pretrained(bert(), tmp_path, settings_from="config")
    assert doubled.lora_config.scaling == 2 * wrapped.lora_config.scaling
    same = QLoRAModel.from_pretrained(bert(), tmp_path, settings_from="weights")
    assert torch.equal(logits(same), logits(wrapped))
    # What PEFT's tools rewrite, or people on purpose, changes no meaning.
    harmless = {"base_model_name_or_path": "there", "lora_dropout": 0.1, "task_type": None, "peft_version": "0.21.2"}
    harmless |= {
        "modules_to_save": ["classifier"],
        "target_modules": config["target_modules"][::-1],
        "layers_pattern": [],
    }
    (tmp_path / CONFIG).write_text(json.dumps(config | harmless))
    assert torch.equal(logits(QLoRAModel.from_pretrained(bert(), tmp_path)), logits(wrapped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flipped_bit(tmp_path, dtype):
    """Disks and copies fail: a value that changed has no other sign than the checksum."""
    wrapped = trained().to(dtype)
    wrapped.save_pretrained(tmp_path)
    raw = bytearray((tmp_path / WEIGHTS).read_bytes())
    for place in (-1, -2000, raw.index(b"lora_A")):
        spoiled = bytearray(raw)
        spoiled[place] ^= 4
        (tmp_path / WEIGHTS).write_bytes(spoiled)
        with pytest.raises(OSError, match=f"{WEIGHTS}.*corrupt.*checksum"):
            QLoRAModel.from_pretrained(bert(), tmp_path)
    (tmp_path / WEIGHTS).write_bytes(raw)
    QLoRAModel.from_pretrained(bert(), tmp_path)


class Opened(Exception):
    pass


class Bomb:
    def __reduce__(self):
        return exec, ("raise __import__('test_saving').Opened()",)


def test_a_pickle_is_not_opened(tmp_path):
    """A pickle runs what its author wants; people who trust theirs are told how to convert it."""
    trained().save_pretrained(tmp_path)
    os.remove(tmp_path / WEIGHTS)
    torch.save({"key": Bomb()}, tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS}.*adapter_model.bin is a pickle.*save_file"):
        QLoRAModel.from_pretrained(bert(), tmp_path)


def test_keys_that_do_not_fit_on_purpose(tmp_path):
    """strict=False says what is missing and unexpected, and takes the rest; shapes have to fit."""
    trained().save_pretrained(tmp_path)
    edit(tmp_path, lambda t: (t.pop(A_KEY), t.update(more=torch.zeros(1))))
    for load in (
        lambda **how: QLoRAModel.from_pretrained(bert(), tmp_path, **how),
        lambda **how: QLoRAModel(bert(), QLoRAConfig()).load_adapter(tmp_path, "second", **how),
    ):
        with pytest.raises(ValueError, match=f"missing: {A_KEY}; unexpected: more"):
            load()
        with pytest.warns(UserWarning, match=f"missing: {A_KEY}; unexpected: more"):
            load(strict=False)
    edit(tmp_path, lambda t: t.update({A_KEY: torch.zeros(8, 31)}))
    with pytest.raises(ValueError, match="another shape"):
        QLoRAModel.from_pretrained(bert(), tmp_path, strict=False)


def test_other_ranks_write_nothing(tmp_path):
    """Trainer's scripts call save_pretrained on every rank."""
    trained().save_pretrained(tmp_path / "there", is_main_process=False, state_dict=None, safe_serialization=True)
    assert not (tmp_path / "there").exists()


def test_the_files_are_as_open_as_others(tmp_path):
    """Who may read a folder may read the adapter in it: temporary files are often closed to others."""
    (tmp_path / "plain").touch()
    trained().save_pretrained(tmp_path / "adapter")
    modes = {path.stat().st_mode for path in [tmp_path / "plain", *(tmp_path / "adapter").iterdir()]}
    assert len(modes) == 1


def compiled_layers(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")


def checkpointed_layers(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = FullyShardedDataParallel(layer, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)


def inner_ddp(model):
    model.model.layers[0] = torch.nn.parallel.DistributedDataParallel(model.model.layers[0])


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [compiled_layers, checkpointed_layers, inner_ddp, fsdp1, fsdp2])
@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_keys_of_wrappers_do_not_reach_the_file(tmp_path, one_process, wrap, after):
    """An adapter whose keys say how it was trained loads nowhere else."""
    config, base = LoraConfig(target_modules=["q_proj", "lm_head"]), llama()
    if not after:
        if wrap in (inner_ddp, fsdp1, fsdp2):
            pytest.skip("adapters come before what shards or synchronizes parameters")
        wrap(base)
    wrapped = LoraModel(base, config)
    with torch.no_grad():
        for parameter in wrapped.trainable_parameters():
            parameter.add_(0.1)
    expected = {key: value.detach().clone() for key, value in wrapped.adapter_state_dict().items()}
    if after:
        wrap(base)
    for model in (wrapped, torch.compile(wrapped, backend="eager")):
        model.save_pretrained(tmp_path / "adapter")
        saved = load_file(tmp_path / "adapter" / WEIGHTS)
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], expected[key]) for key in saved)
        again = LoraModel.from_pretrained(llama(), tmp_path / "adapter")
        assert again.adapter_state_dict().keys() == expected.keys()


def test_a_part_of_a_parameter_is_not_saved(tmp_path):
    """Under ZeRO-3 and FSDP1 a rank has parts: a file of these looks whole and is not."""
    wrapped = LoraModel(llama(), LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path)
    before = files(tmp_path)
    for part in (torch.empty(0), torch.ones(5)):
        wrapped.model.model.layers[1].self_attn.q_proj.lora_A["default"].weight.data = part
        with pytest.raises(ValueError, match=r"layers\.1.*lora_A.*summon_full_params"):
            wrapped.save_pretrained(tmp_path)
    assert files(tmp_path) == before


def test_a_model_card_is_written_where_there_is_none(tmp_path):
    """The hub would not know an uploaded folder as an adapter; what someone wrote there would be lost."""
    wrapped = LoraModel(bert(), LoraConfig(target_modules=["query"]))
    wrapped.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: peft\n") and "- lora\n" in card
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"


def test_no_such_folder(tmp_path):
    """A typo in a path is an OSError that shows the path, and never a call to the network."""
    with pytest.raises(FileNotFoundError, match="not_there"):
        QLoRAModel.from_pretrained(mlp(), tmp_path / "not_there")


def test_a_base_that_is_none(tmp_path):
    """A name where a model is expected, or a model that has adapters, are told as such."""
    trained().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        QLoRAModel.from_pretrained("some/bert", tmp_path)
    with pytest.raises(ValueError, match="without adapters"):
        QLoRAModel.from_pretrained(trained(), tmp_path)


def test_an_adapter_of_another_model(tmp_path):
    """Loading onto the wrong base fails before anything is changed."""
    trained().save_pretrained(tmp_path)
    base = llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match="matches nothing"):
        QLoRAModel.from_pretrained(base, tmp_path)
    assert_untouched(base, before)


def test_shared_layers_and_plain_models(tmp_path):
    """A layer with two names is written once and comes back for both."""
    wrapped = QLoRAModel(mlp(), QLoRAConfig(modules_to_save=["head"]))
    with torch.no_grad():
        for parameter in wrapped.trainable_parameters():
            parameter.normal_()
    wrapped.save_pretrained(tmp_path)
    assert sum(".lora_A." in key for key in load_file(tmp_path / WEIGHTS)) == 2
    again = QLoRAModel.from_pretrained(mlp(), tmp_path)
    x = torch.randn(2, 40)
    assert torch.equal(again(x), wrapped(x))

    def rename(tensors):  # PEFT writes the layer under each of its names
        tensors |= {k.replace(".first.", ".shared."): v.clone() for k, v in tensors.items() if ".first." in k}

    edit(tmp_path, rename)
    assert torch.equal(QLoRAModel.from_pretrained(mlp(), tmp_path)(x), wrapped(x))


def test_the_saved_head_of_a_16_bit_model_keeps_its_precision(tmp_path):
    """The head trained in fp32; rounding it in the file would lose what it learned."""
    wrapped = QLoRAModel(bert().bfloat16(), QLoRAConfig())
    train(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["base_model.model.classifier.weight"].dtype == torch.float32
    assert torch.equal(logits(QLoRAModel.from_pretrained(bert().bfloat16(), tmp_path)), logits(wrapped))


def test_saving_after_the_merge_is_an_error(tmp_path):
    """There is no adapter any more; an empty file would overwrite a good one."""
    wrapped = trained()
    wrapped.merge_and_unload()
    with pytest.raises(ValueError, match="merged"):
        wrapped.save_pretrained(tmp_path)
    assert not files(tmp_path)
