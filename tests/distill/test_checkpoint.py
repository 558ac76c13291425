"""Checkpoints: whole or not there, whatever happens while one is written."""

import errno
import os
import random
import signal
import time

import pytest
import torch

from vivace.distill import checkpoint
from vivace.errors import InputError


def write(folder, number, *, keep=2, size=64):
    tensors = {"student": {"w": torch.full((size,), float(number))}, "mean": {"w": torch.ones(3)}}
    return checkpoint.save(folder, number, tensors=tensors, state={"done": number}, keep=keep)


def test_what_is_saved_comes_back(tmp_path):
    path = write(tmp_path, 7)
    tensors, state = checkpoint.load(path)
    assert state == {"done": 7}
    assert torch.equal(tensors["student"]["w"], torch.full((64,), 7.0))
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_old_ones_go_after(tmp_path):
    for number in range(5):
        write(tmp_path, number)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_a_later_one_that_is_broken_takes_no_place(tmp_path):
    """Training went back to the one before it: what it then saves must not count as the older."""
    write(tmp_path, 5, keep=1)
    broken = write(tmp_path, 10)
    (broken / checkpoint.MANIFEST).unlink()
    assert write(tmp_path, 7, keep=1) == checkpoint.latest(tmp_path)
    assert write(tmp_path, 10, keep=1) == checkpoint.latest(tmp_path)
    assert checkpoint.checkpoints(tmp_path) == [broken]


@pytest.mark.parametrize("harm", ["cut", "flip", "missing", "no manifest"])
def test_a_broken_one_is_left_aside_and_named(tmp_path, caplog, harm):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    file = bad / "student.safetensors"
    raw = bytearray(file.read_bytes())
    if harm == "cut":
        file.write_bytes(raw[:-9])
    elif harm == "flip":
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif harm == "missing":
        file.unlink()
    else:
        (bad / checkpoint.MANIFEST).unlink()
    assert checkpoint.latest(tmp_path) == good
    assert str(bad) in caplog.text


def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    good = write(tmp_path, 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left.*last good one is .*step-00000001"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path) == good
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_file_system_that_is_really_full(tmp_path):
    """A write that fails in the middle of a file, as a quota makes it."""
    resource = pytest.importorskip("resource")
    good = write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(InputError, match="cannot be written"):
            write(tmp_path, 2, size=1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.latest(tmp_path) == good


def test_a_kill_in_the_middle_of_a_save_twenty_times(tmp_path):
    write(tmp_path, 0)
    rng = random.Random(0)
    number = interrupted = 0
    while interrupted < 20:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # a fork has none of the threads that its parent's pool counts on
            while True:
                number += 1
                write(tmp_path, number, size=200_000)
        # until one is being written
        while not list(tmp_path.glob(".step-*")):
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += bool(list(tmp_path.glob(".step-*")))
        newest = checkpoint.latest(tmp_path)
        assert newest is not None
        tensors, state = checkpoint.load(newest)
        assert state["done"] >= number
        assert torch.all(tensors["student"]["w"] == state["done"])
        number = state["done"]
        checkpoint.sweep(tmp_path)
    assert number > 0
