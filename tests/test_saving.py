"""Adapters on disk: round trips with ourselves and PEFT, failed saves, broken files."""

import json
import os

import pytest
import torch
from models import bert, llama, logits, train
from safetensors.torch import load_file

from lowbit_lora import LoraConfig, LoraModel, QLoRAConfig, QLoRAModel, saving

OPTIONS = [
    {},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"rank": 3, "use_rslora": True},
    {"target_modules": r".*(query|q_proj)"},
    {"block_size": 128, "double_quant": False, "quantization": "fp4"},
]


def trained(make, **options):
    model = QLoRAModel(make(), QLoRAConfig(**options))
    train(model)
    return model


def files(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("options", OPTIONS)
def test_round_trip(make, options, tmp_path):
    """A loaded adapter on a fresh base must predict bit for bit what the trained model did."""
    model = trained(make, **options)
    model.save_pretrained(tmp_path)
    loaded = QLoRAModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lora_config.scaling == model.lora_config.scaling


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_peft_reads_ours_and_we_read_theirs(make, options, tmp_path):
    """Files travel both ways: PEFT on a dense base with our dequantized weights gives our outputs in fp32."""
    peft = pytest.importorskip("peft")
    base = QLoRAModel(make(), QLoRAConfig(**options)).merge_and_unload()
    model = trained(make, **options)
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)

    theirs.save_pretrained(tmp_path / "theirs")
    settings = tmp_path / "ours" / saving.SETTINGS  # PEFT has no field for how the base was stored
    (tmp_path / "theirs" / saving.SETTINGS).write_bytes(settings.read_bytes())
    ours, written = (load_file(tmp_path / side / saving.WEIGHTS) for side in ("ours", "theirs"))
    assert set(ours) <= set(written)
    back = QLoRAModel.from_pretrained(make(), tmp_path / "theirs").eval()
    assert torch.equal(logits(back), logits(model))


def test_dense_lora_round_trip(tmp_path):
    """LoraModel saves and loads the same files."""
    model = LoraModel(bert(), LoraConfig(target_modules=["query"]))
    train(model)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [saving.CONFIG, saving.WEIGHTS]
    assert torch.equal(logits(LoraModel.from_pretrained(bert(), tmp_path).eval()), logits(model))


def test_only_the_adapter_is_saved(tmp_path):
    """Adapters are shared because they are small: no base weight may slip in."""
    trained(bert, rank=2, target_modules=["query"]).save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / saving.WEIGHTS))
    query = "base_model.model.bert.encoder.layer.{}.attention.self.query.lora_{}.weight"
    assert keys == {query.format(i, ab) for i in (0, 1) for ab in "AB"} | {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }


@pytest.mark.parametrize("failing", ["save_file", "_write_json"])
def test_failed_save_leaves_the_old_files(failing, tmp_path, monkeypatch):
    """A full disk must not cost the adapter of the last epoch."""
    model = trained(bert)
    model.save_pretrained(tmp_path)
    before = files(tmp_path)
    train(model)

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(saving, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert files(tmp_path) == before


def damage(folder, how):
    weights, config = folder / saving.WEIGHTS, folder / saving.CONFIG
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "corrupted":
        weights.write_bytes(b"\xff" * 2000)
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "broken json":
        config.write_text(config.read_text()[:50])
    elif how == "other rank":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5}))
    elif how == "other bias":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"bias": "all"}))
    elif how == "fewer targets":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["query"]}))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("truncated", OSError, saving.WEIGHTS),
        ("corrupted", OSError, saving.WEIGHTS),
        ("empty", OSError, saving.WEIGHTS),
        ("no weights", FileNotFoundError, saving.WEIGHTS),
        ("no config", FileNotFoundError, saving.CONFIG),
        ("broken json", OSError, f"{saving.CONFIG}: not valid JSON"),
        ("other rank", ValueError, r"lora_[AB].weight: expected shape .*5.*got"),
        ("other bias", ValueError, "missing .*bias"),
        ("fewer targets", ValueError, "has no place in this model"),
    ],
)
def test_broken_adapters_leave_the_base(how, error, message, tmp_path):
    """A damaged or foreign adapter is refused by name, and the base is as it was."""
    trained(bert).save_pretrained(tmp_path)
    damage(tmp_path, how)
    base = bert()
    modules, expected = dict(base.named_modules()), logits(base)
    with pytest.raises(error, match=message):
        QLoRAModel.from_pretrained(base, tmp_path)
    assert dict(base.named_modules()) == modules
    assert torch.equal(logits(base), expected)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_another_shape_and_a_missing_folder(tmp_path):
    """An adapter of another model, or a mistyped path, is named."""
    trained(llama).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="target_modules"):
        QLoRAModel.from_pretrained(bert(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        QLoRAModel.from_pretrained(bert(), tmp_path / "nope")
