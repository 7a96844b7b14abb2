"""tools/gpu_slot.sh without a GPU: minutes on one are too dear to find its mistakes there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.backends import native

ROOT = Path(__file__).parent.parent
STEPS = ["versions", "extension", "selftest", "test_gpu", "products", "train_8192", "train_512", "rest"]
STEPS += ["test_gpu_triton", "more_rows", "ncu"]


def run(out, python, **environment):
    environment = os.environ | {"OUT": str(out), "PYTHON": str(python)} | environment
    done = subprocess.run(
        [ROOT / "tools" / "gpu_slot.sh", "--dry-run"], env=environment, capture_output=True, text=True, timeout=1500
    )
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return done, lines


@pytest.mark.skipif(native.missing_reason() is not None, reason="no compiled extension")
def test_dry_run(tmp_path):
    """A step that fails here would fail on the GPU, after the machine was paid for."""
    done, lines = run(tmp_path, sys.executable)
    assert done.returncode == 0, done.stdout[-4000:]
    steps = {line["step"]: line for line in lines if "step" in line}
    assert list(steps) == STEPS and all(step["status"] == 0 for step in steps.values())
    rows = [line for line in lines if "step" not in line]
    assert not any(row.get("wrong") for row in rows)
    linear = {row["name"] for row in rows if row.get("operation") == "linear"}
    assert {"lowbit", "lowbit native", "lowbit triton", "lowbit dequantize, then torch", "dense bf16"} <= linear
    assert {"quantize", "quantize, search", "dequantize into out", "backward dX"} <= {
        row["operation"] for row in rows if row.get("name") == "lowbit" and "median_ms" in row and "operation" in row
    }
    assert any(row["name"] == "lowbit" and "step_ms" in row for row in rows)


def test_a_failed_step_does_not_end_the_rest(tmp_path):
    """What comes after it would not be measured."""
    done, lines = run(tmp_path, "false")
    assert done.returncode == 1
    assert [line["step"] for line in lines] == STEPS
    assert sum(line["status"] != 0 for line in lines) >= 8


def test_no_step_begins_after_the_time_is_over(tmp_path):
    """The machine is taken away then, with what the step had printed."""
    _, lines = run(tmp_path, "false", SLOT_SECONDS="2")
    assert [line["step"] for line in lines] == STEPS and all("skipped" in line for line in lines)
