"""What can go wrong while it runs, and what the next request sees of it: nothing."""

import ctypes
import gc
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch

from vivace.families import FAMILIES
from vivace.serve import Engine
from vivace.serve.call import Axes
from vivace.serve.engine import LOST_TO_MEMORY
from vivace.serve.failures import Busy, Cancelled, DeadlineExceeded, Failure, FieldError, OutOfMemory, Unavailable


def memory_error() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.fixture
def same(engine, order):
    """Checks that a plain request gets the bits it got before."""
    before = engine.submit(order(deterministic=True)).result(60).pictures[0].tobytes()

    def check() -> None:
        after = engine.submit(order(deterministic=True)).result(60).pictures[0].tobytes()
        assert after == before
        assert engine.health().ready
        assert engine.running == engine.queued == 0

    return check


def test_out_of_memory_in_the_denoiser(engine, pipe, order, gated, same):
    gate = gated(pipe.transformer)
    gate.fail(memory_error())
    with pytest.raises(OutOfMemory):
        engine.submit(order()).result(60)
    same()


def test_out_of_memory_of_a_batch_is_tried_one_by_one(engine, pipe, order, gated, same):
    gate = gated(pipe.transformer)
    gate.shut()
    jobs = [engine.submit(order(seed=1, steps=5))]
    assert gate.reached.wait(120)
    jobs += [engine.submit(order(seed=seed)) for seed in (2, 3)]
    limit = pipe.transformer.register_forward_pre_hook(_small_batches_only, with_kwargs=True)
    gate.open.set()
    for job in jobs:
        assert job.result(60).calls["requests_per_call"] == 1
    limit.remove()
    same()


def test_a_size_that_ran_out_of_memory_is_not_tried_again_for_a_while(engine, pipe, order, gated, same, monkeypatch):
    gate = gated(pipe.transformer)
    limit = pipe.transformer.register_forward_pre_hook(_small_batches_only, with_kwargs=True)
    tried = []
    for forget in (600.0, 600.0, 0.0):
        monkeypatch.setattr("vivace.serve.worker.FORGET", forget)
        gate.shut()
        gate.sizes.clear()
        jobs = [engine.submit(order(seed=1, steps=2))]
        assert gate.reached.wait(120)
        jobs += [engine.submit(order(seed=seed, steps=2)) for seed in (2, 3)]
        while engine.workers[engine.models["tiny"].device].waiting < 2:
            time.sleep(0.01)
        gate.open.set()
        for job in jobs:
            job.result(60)
        tried.append(max(gate.sizes))
    assert tried[0] > 2  # rows: a request has two, with guidance
    assert tried[1] == 2
    assert tried[2] > 2
    limit.remove()
    same()


def _small_batches_only(module, args, kwargs):
    if kwargs["hidden_states"].shape[0] > 2:
        raise memory_error()


def test_out_of_memory_in_the_vae_is_retried_in_pieces(engine, pipe, order, same, monkeypatch):
    whole, stock = [], pipe.vae._decode

    def decode(z, *args, **kwargs):
        if not pipe.vae.use_tiling:
            whole.append(z.shape)
            raise memory_error()
        return stock(z, *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "_decode", decode)
    result = engine.submit(order()).result(60)
    assert result.pictures[0].size == (64, 64)
    assert whole
    assert not pipe.vae.use_tiling
    monkeypatch.undo()
    same()


def test_running_out_of_memory_again_and_again_is_not_ready(engine, pipe, order, gated, same):
    gate = gated(pipe.transformer)
    gate.fail(memory_error(), times=LOST_TO_MEMORY)
    for _ in range(LOST_TO_MEMORY):
        assert engine.health().ready
        with pytest.raises(OutOfMemory):
            engine.submit(order()).result(60)
    assert engine.health().reason == "requests run out of memory"
    engine.submit(order()).result(60)
    same()


def test_what_ran_out_of_memory_is_ready_again_after_a_rest(engine, pipe, order, gated, same, monkeypatch):
    gate = gated(pipe.transformer)
    monkeypatch.setattr("vivace.serve.engine.REST", 0.5)
    for _ in range(2):
        gate.fail(memory_error(), times=LOST_TO_MEMORY)
        for _ in range(LOST_TO_MEMORY):
            with pytest.raises(OutOfMemory):
                engine.submit(order()).result(60)
        assert not engine.health().ready
        time.sleep(0.6)
        assert engine.health().ready
    same()


def test_one_wrong_request_does_not_fail_its_neighbours(engine, pipe, order, gated, same):
    gate = gated(pipe.transformer)
    gate.shut()
    jobs = [engine.submit(order(seed=1))]
    assert gate.reached.wait(120)
    jobs += [engine.submit(order(seed=seed)) for seed in (2, 3)]
    gate.fail(RuntimeError("once"))
    gate.open.set()
    outcomes = [_outcome(job) for job in jobs]
    assert outcomes.count("failed") <= 1
    assert outcomes.count("done") >= 2
    same()


def test_a_wedged_worker_is_not_ready(pipe, start, order, gated):
    engine = start(pipe, stale=0.3)
    gate = gated(pipe.transformer)
    engine.submit(order()).result(60)  # what is done once does not count
    gate.shut()
    job = engine.submit(order(run_seconds=5))
    assert gate.reached.wait(120)
    deadline = time.monotonic() + 120
    while engine.health().ready and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.health().reason == "the device does not answer"
    with pytest.raises(DeadlineExceeded):  # its waiter is not held up
        job.result(60)
    gate.open.set()
    deadline = time.monotonic() + 120
    while not engine.health().ready and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.health().ready
    engine.submit(order()).result(60)


def test_a_cancel_on_the_way_to_a_call_does_not_wait_for_a_device_that_is_wedged(
    engine, pipe, order, gated, monkeypatch
):
    gate, describe, asked = gated(pipe.transformer), Axes.describe, threading.Event()
    gate.shut()
    engine.submit(order())
    assert gate.reached.wait(120)

    def cancelled(*args, **options):
        assert asked.wait(60)
        job.cancel()
        return describe(*args, **options)

    monkeypatch.setattr(Axes, "describe", cancelled)
    job = engine.submit(order())
    asked.set()
    try:
        with pytest.raises(Cancelled):
            job.result(30)
    finally:
        gate.open.set()


def test_a_lost_device_fails_what_waits_and_stays_unready(engine, pipe, order, gated):
    gate = gated(pipe.transformer)
    gate.fail(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(Unavailable):
        engine.submit(order()).result(60)
    assert engine.lost
    assert engine.health().reason == "the device is lost"
    with pytest.raises(Unavailable):
        engine.submit(order()).result(60)


def test_a_device_that_is_lost_outside_of_a_call_is_lost_too(engine, pipe, order, monkeypatch):
    """What a GPU computes is waited for by whoever needs it, and there its errors come out."""

    def lost(self, *args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(type(pipe.scheduler), "step", lost)
    with pytest.raises(Unavailable, match="the device is lost"):
        engine.submit(order()).result(60)
    assert engine.lost
    assert engine.health().reason == "the device is lost"


def _outcome(job) -> str:
    try:
        job.result(120)
    except Cancelled:
        return "cancelled"
    except Failure:
        return "failed"
    return "done"


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.full)])
def test_many_mixed_requests(pipe, start, order, count):
    engine = start(pipe, threads=8, queue=32)
    first = engine.submit(order(deterministic=True)).result(60).pictures[0].tobytes()
    chance = random.Random(0)
    jobs, outcomes = [], []

    def settle(most: int) -> None:
        while len(jobs) > most:
            job, seed = jobs.pop(0)
            outcomes.append(_outcome(job))
            assert job.over
            if outcomes[-1] == "done":
                assert job.result().effective["seed"] == seed

    before = None
    for number in range(count):
        if number == count // 4:  # by then everything is built that stays
            settle(0)
            before = _held()
        if chance.random() < 0.1:
            with pytest.raises(FieldError):
                engine.submit(order(size=(chance.randrange(1, 64) * 2 + 1, 64)))
            continue
        fields = {"steps": chance.randrange(1, 4), "size": chance.choice([(16, 16), (32, 16)]), "seed": number}
        try:
            jobs.append((engine.submit(order(**fields, deterministic=chance.random() < 0.1)), number))
        except Busy:
            settle(8)
            continue
        if chance.random() < 0.2:
            jobs[chance.randrange(len(jobs))][0].cancel()
        settle(24)
    settle(0)
    assert len(outcomes) > 0.7 * count
    assert outcomes.count("done") > 0.5 * count
    assert outcomes.count("cancelled") > 0.05 * count
    assert outcomes.count("failed") == 0
    assert engine.running == engine.queued == 0
    assert before is not None
    threads, handles, tensors, nbytes = (now - then for now, then in zip(_held(), before, strict=True))
    assert threads == 0
    assert handles <= 2
    assert tensors <= 20
    assert nbytes < 4 * 2**20
    after = engine.submit(order(deterministic=True)).result(60).pictures[0].tobytes()
    with Engine(models={"tiny": FAMILIES["sd3"].tiny()}) as fresh:
        assert after == first == fresh.submit(order(deterministic=True)).result(60).pictures[0].tobytes()


def test_memory_that_requests_freed_goes_back_to_the_system(pipe, start, order, monkeypatch):
    monkeypatch.setattr("vivace.serve.engine.TIDY", 1.0)
    engine = start(pipe)
    engine.submit(order()).result(60)
    size = 64 * 1024
    many = [b"x" * size for _ in range(4096)]
    pins = many[::16] + many[-1:]  # the heap cannot shrink at its end
    del many
    before, deadline = _resident(), time.monotonic() + 30
    engine.submit(order()).result(60)
    while before - _resident() < 4096 * size // 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert before - _resident() >= 4096 * size // 2
    assert pins


class _Heap(ctypes.Structure):
    """What glibc's mallinfo2 tells, in its order."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _in_use() -> int:
    """Bytes of the C library's heap in use: resident ones also count what it keeps for later."""
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if tell is None:
        return _resident()
    tell.restype = _Heap
    # MKL keeps a workspace for each thread that ever computed, and which of them do is chance.
    library = ctypes.CDLL(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    let_go = getattr(library, "mkl_serv_free_buffers", None)
    if let_go is not None:
        let_go()
    heap = tell()
    return heap.uordblks + heap.hblkhd


def _held() -> tuple[int, int, int, int]:
    """Threads, open handles, tensors, and bytes in use."""
    gc.collect()
    tensors = sum(1 for thing in gc.get_objects() if isinstance(thing, torch.Tensor))
    return threading.active_count(), len(os.listdir("/proc/self/fd")), tensors, _in_use()
