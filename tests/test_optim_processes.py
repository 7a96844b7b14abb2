"""Training with paged optimizers in processes that are killed, or that may not have as much memory as their states."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("optim_training.py")
STEPS = 30


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*arguments):
    process = start(*arguments)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What training that nobody kills ends with."""
    folder = tmp_path_factory.mktemp("whole")
    code, _, errors = run("steps", folder, STEPS)
    assert code == 0, errors
    return torch.load(folder / "trained.pt")


def test_killed_and_resumed(trained, tmp_path):
    """A run that is killed would lose a checkpoint that it had announced, or resume to something else."""
    moments = random.Random(0)
    for _ in range(3):
        process = start("steps", tmp_path, STEPS)
        for _ in range(2 + moments.randrange(3)):  # so many steps are announced first
            if not process.stdout.readline():
                break
        time.sleep(moments.random() * 0.05)  # in a step, or while it saves
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), errors
        newest = tmp_path / "newest"
        assert newest.exists()
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} <= {"newest", "newest.saving", "trained.pt"}
    code, _, errors = run("steps", tmp_path, STEPS)
    assert code == 0, errors
    resumed = torch.load(tmp_path / "trained.pt")
    assert resumed.keys() == trained.keys()
    assert all(torch.equal(resumed[name], trained[name]) for name in trained)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="private memory is capped on Linux only")
def test_states_larger_than_memory(tmp_path):
    """States of 64 MB with 40 MB of memory: paged to a file the run ends, in plain memory it cannot."""
    code, out, errors = run("capped", 40, tmp_path)
    assert code == 0, errors
    assert float(out) == pytest.approx(1 - 3 * 0.1, abs=1e-4)
    code, out, errors = run("capped", 40)
    assert code != 0
    assert "MemoryError" in errors
    assert "page them to a folder" in errors
