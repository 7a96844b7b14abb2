"""Training with paged optimizers in processes that are killed, or that may not have as much memory as their states."""

import random
import signal
import sys
import time

import forked
import optim_training
import pytest
import torch

STEPS = 30


class Started:
    """A process that runs a function of optim_training.py."""

    def __init__(self, function, *arguments):
        context = forked.clean_processes()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=optim_training.run, args=(theirs, function, *arguments))
        self.process.start()
        theirs.close()

    def message(self):
        """What it sends next; None once it has ended."""
        assert self.pipe.poll(300)
        try:
            return self.pipe.recv()
        except EOFError:
            return None

    def end(self) -> tuple:
        """(exit status, the function's result, a traceback), once it has ended."""
        last, message = (None, ""), self.message()
        while message is not None:
            last, message = message, self.message()
        self.process.join()
        return self.process.exitcode, *(last if isinstance(last, tuple) else (None, ""))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What training that nobody kills ends with."""
    folder = tmp_path_factory.mktemp("whole")
    code, _, errors = Started(optim_training.train, folder, STEPS).end()
    assert code == 0, errors
    return torch.load(folder / "trained.pt")


def test_killed_and_resumed(trained, tmp_path):
    """A run that is killed would lose a checkpoint that it had announced, or resume to something else."""
    moments = random.Random(0)
    for _ in range(3):
        started = Started(optim_training.train, tmp_path, STEPS)
        for _ in range(2 + moments.randrange(3)):  # so many steps are announced first
            if started.message() is None:
                break
        time.sleep(moments.random() * 0.05)  # in a step, or while it saves
        started.process.kill()
        code, _, errors = started.end()
        assert code in (-signal.SIGKILL, 0), errors
        newest = tmp_path / "newest"
        assert newest.exists()
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} <= {"newest", "newest.saving", "trained.pt"}
    code, _, errors = Started(optim_training.train, tmp_path, STEPS).end()
    assert code == 0, errors
    resumed = torch.load(tmp_path / "trained.pt")
    assert resumed.keys() == trained.keys()
    assert all(torch.equal(resumed[name], trained[name]) for name in trained)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="private memory is capped on Linux only")
def test_states_larger_than_memory(tmp_path):
    """States of 64 MB with 40 MB of memory: paged to a file the run ends, in plain memory it cannot."""
    code, mean, errors = Started(optim_training.train_capped, 40, tmp_path).end()
    assert code == 0, errors
    assert mean == pytest.approx(1 - 3 * 0.1, abs=1e-4)
    code, _, errors = Started(optim_training.train_capped, 40).end()
    assert code != 0
    assert "MemoryError" in errors
    assert "page them to a folder" in errors
