"""lowbit_lora/files.py: a saver that is killed at any of its system calls, or that finds the disk full."""

import ctypes
import errno
import functools
import os
import signal
import sys

import forked
import pytest
import torch
from conftest_models import mlp
from small_disk import small_disk, small_files

from lowbit_lora import LoraConfig, LoraModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TRACEME, SYSCALL, SETOPTIONS = 0, 24, 0x4200
EXITKILL, TRACESYSGOOD = 0x100000, 1


def wrapped(value, rank=4):
    """A model whose adapter of a rank holds one value everywhere."""
    model = LoraModel(mlp(), LoraConfig(rank=rank, target_modules=["first", "head"]))
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.fill_(value)
    return model


def seen(folder):
    """What a reader finds: the value of the adapter, or an error that names the two files."""
    try:
        model = LoraModel.from_pretrained(mlp(), folder)
    except OSError as error:
        assert WEIGHTS in str(error)
        assert CONFIG in str(error)
        assert "do not belong together" in str(error)
        return "error"
    (value,) = {value for tensor in model.adapter_state_dict().values() for value in tensor.unique().tolist()}
    return value


def ptrace():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's ptrace")
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    call.restype = ctypes.c_long
    return call


def killed_at(trace, number, save):
    """Run ``save`` in a child and kill it before its system call of a number; whether it got so far."""

    def traced():
        if trace(TRACEME, 0, None, None) != 0:
            return 77
        os.kill(os.getpid(), signal.SIGSTOP)
        save()
        return 0

    child = forked.start(traced)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 77:
        pytest.skip("ptrace is not permitted here")
    trace(SETOPTIONS, child, None, EXITKILL | TRACESYSGOOD)
    stops = 0
    while stops < 2 * number + 1:  # each call stops the child twice: when it enters it, and when it leaves
        assert trace(SYSCALL, child, None, None) == 0
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, f"the save failed after {stops} stops"
            return False
        assert os.WIFSTOPPED(status)
        stops += os.WSTOPSIG(status) == signal.SIGTRAP | 0x80  # any other is a signal from elsewhere
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


@pytest.mark.parametrize("rank", [4, 8], ids=["same config", "other config"])
def test_a_saver_that_is_killed(tmp_path, rank):
    """A preempted job must not cost the adapter of before, nor leave one that is half of each."""
    trace, threads = ptrace(), torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    old, new = wrapped(1.0), wrapped(2.0, rank)
    old.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    found, number, going = {}, 0, True
    while going:
        for path in tmp_path.iterdir():
            path.unlink()
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        going = killed_at(trace, number, lambda: new.save_pretrained(tmp_path))
        number += 1
        state = tuple((tmp_path / name).read_bytes() for name in (WEIGHTS, CONFIG))  # both are there at any time
        if state not in found:
            found[state] = seen(tmp_path)
            wrapped(3.0).save_pretrained(tmp_path)
            assert seen(tmp_path) == 3.0
    torch.set_num_threads(threads)
    assert number > 20
    # safetensors writes metadata in no fixed order, so that the same adapter may be two states
    assert list(dict.fromkeys(found.values())) == ([1.0, 2.0] if rank == 4 else [1.0, "error", 2.0])


def test_both_adapters_of_a_save_that_was_killed(tmp_path):
    """Whoever lost a save can still have the one of the weights, which know their settings."""
    wrapped(1.0).save_pretrained(tmp_path)
    config = (tmp_path / CONFIG).read_bytes()
    wrapped(2.0, rank=8).save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_bytes(config)
    with pytest.raises(OSError, match="r is 8 there and 4 here.*settings_from"):
        LoraModel.from_pretrained(mlp(), tmp_path)
    assert LoraModel.from_pretrained(mlp(), tmp_path, settings_from="weights").lora_config.rank == 8
    with pytest.raises(ValueError, match=r"\(4, 40\), got torch.float32 \(8, 40\)"):
        LoraModel.from_pretrained(mlp(), tmp_path, settings_from="config")
    with pytest.raises(ValueError, match="settings_from"):
        LoraModel.from_pretrained(mlp(), tmp_path, settings_from="both")


def test_what_killed_savers_leave_is_removed(tmp_path):
    """Jobs that are killed again and again must not fill the disk; another rank's new files are in use."""
    for name, age in ((".adapter_model.safetensors.0.saving", 7200), (".adapter_config.json.1.saving", 60)):
        (tmp_path / name).write_bytes(b"?")
        time = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (time, time))
    wrapped(1.0).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "README.md", ".adapter_config.json.1.saving"}


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_file_that_becomes_too_large(tmp_path, size):
    """A quota in the last save must not cost the one before; 5000 bytes hold a part of the weights."""
    wrapped(1.0).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = wrapped(2.0, rank=32)
    with small_files(size), pytest.raises(OSError, match="too large") as raised:
        new.save_pretrained(tmp_path)
    assert raised.value.errno == errno.EFBIG
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert seen(tmp_path) == 1.0


def test_a_full_disk(tmp_path):
    """The same where there is no space left for a second adapter."""
    with small_disk(tmp_path / "disk", "32k") as folder:
        wrapped(1.0).save_pretrained(folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(OSError, match="No space left") as raised:
            wrapped(2.0, rank=128).save_pretrained(folder)
        assert raised.value.errno == errno.ENOSPC
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert seen(folder) == 1.0


def test_several_processes_save_into_one_folder(tmp_path):
    """Ranks that all save, as people's scripts let them, must not write into each other's files."""
    models = [wrapped(float(value)) for value in range(1, 5)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def save(model):
        for _ in range(10):
            model.save_pretrained(tmp_path)
        return 0

    children = [forked.start(functools.partial(save, model)) for model in models]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    torch.set_num_threads(threads)
    assert seen(tmp_path) in (1.0, 2.0, 3.0, 4.0)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
