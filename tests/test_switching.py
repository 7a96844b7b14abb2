"""The two scripts of docs/switching.md, as they stand there, on a tiny model."""

import re
from difflib import ndiff
from pathlib import Path

import pytest
import torch
from cases import UNIT_ROUNDOFF
from hf_models import SIZES, save_dense
from safetensors.torch import load_file

from lowbit import QuantizedTensor

for _name in ("accelerate", "bitsandbytes", "peft", "transformers"):
    pytest.importorskip(_name)

PAGE = Path(__file__).parents[1] / "docs" / "switching.md"
THEIRS, OURS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[:2]

#: The most terms that a product in the model has.
TERMS = 128


def test_two_lines_differ():
    """The page would promise less work than there is."""
    difference = list(ndiff(THEIRS.splitlines(), OURS.splitlines()))
    assert [sum(line.startswith(mark) for line in difference) for mark in "-+"] == [2, 2]


def run(script: str, path: Path, rows: list, folder: Path, monkeypatch) -> dict:
    """What a script of the page has defined at its end."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    namespace = {"path": str(path), "rows": rows}
    exec(script, namespace)
    losses = [entry["loss"] for entry in namespace["trainer"].state.log_history if "loss" in entry]
    return namespace | {"losses": torch.tensor(losses, dtype=torch.float64)}


def test_both_scripts_train_alike(tmp_path, monkeypatch):
    """A script that switched would not run, store other weights, or train something else.

    Both compute in fp32 on the same bytes, so losses differ by roundings of products: of (terms + 8) each, at most
    (``cases.product_tolerance``). Scales that are stored otherwise are a difference 20 times as large.
    """
    # bitsandbytes decodes rows that are no multiple of 64 wrongly on the CPU.
    path = save_dense(
        tmp_path / "model", dtype=torch.float32, **SIZES | {"intermediate_size": TERMS, "initializer_range": 0.2}
    )
    generator = torch.Generator().manual_seed(2)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (16, 24), generator=generator)]
    other = OURS.replace("LowbitConfig()", "LowbitConfig(double_quant=False)")
    scripts = {"theirs": THEIRS, "ours": OURS, "other": other}
    theirs, ours, other = (run(code, path, rows, tmp_path / name, monkeypatch) for name, code in scripts.items())

    bound = (TERMS + 8) * UNIT_ROUNDOFF[torch.float32] * theirs["losses"]
    assert len(theirs["losses"]) == 6 and ((ours["losses"] - theirs["losses"]).abs() <= bound).all()
    assert ((other["losses"] - theirs["losses"]).abs() > bound).any()
    stored = dict(ours["model"].named_parameters())
    quantized = [name for name, p in stored.items() if isinstance(p, QuantizedTensor)]
    assert len(quantized) == 14
    for name, parameter in theirs["model"].named_parameters():
        if name in quantized:
            assert torch.equal(parameter.data.flatten(), stored[name].packed.flatten()), name
    saved = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert saved[0].keys() == saved[1].keys() and all(value.any() for value in saved[1].values())
    for script in (theirs, ours):
        layers = [m for m in script["model"].modules() if hasattr(m, "gradient_checkpointing")]
        assert layers and all(layer.gradient_checkpointing for layer in layers)
