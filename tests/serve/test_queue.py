"""What waits, what is cancelled, and what comes too late."""

import gc
import time

import pytest
import torch

from vivace.serve.failures import Busy, Cancelled, DeadlineExceeded

SIDE = 64


def test_cancel_takes_effect_within_a_step(engine, pipe, order, gated):
    gate = gated(pipe.transformer)
    gate.shut()
    job, other = engine.submit(order(steps=50, seed=2)), engine.submit(order(seed=3))
    assert gate.reached.wait(120)
    job.cancel()
    gate.open.set()
    with pytest.raises(Cancelled):
        job.result(30)
    assert job.status == "cancelled"
    assert max((event.step for event in job.events), default=0) <= 1
    assert other.result(30).effective["seed"] == 3
    assert engine.running == 0


def test_cancel_in_the_queue_is_immediate(pipe, start, order, gated):
    engine = start(pipe, threads=1)
    gate = gated(pipe.transformer)
    gate.shut()
    first, second = engine.submit(order()), engine.submit(order())
    assert gate.reached.wait(120)
    second.cancel()
    with pytest.raises(Cancelled):
        second.result(60)
    assert engine.queued == 0
    gate.open.set()
    first.result(30)


def test_a_cancelled_run_leaves_nothing_behind(engine, pipe, order, gated):
    before = engine.submit(order(deterministic=True)).result(60)
    gate = gated(pipe.transformer)
    gate.shut()
    job = engine.submit(order(steps=40, deterministic=True))
    assert gate.reached.wait(120)
    job.cancel()
    gate.open.set()
    with pytest.raises(Cancelled):
        job.result(30)
    after = engine.submit(order(deterministic=True)).result(60)
    assert after.pictures[0].tobytes() == before.pictures[0].tobytes()


def test_memory_of_cancelled_requests_is_freed(engine, pipe, order):
    def tensors() -> int:
        gc.collect()
        return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)

    engine.submit(order()).result(60)
    before = tensors()
    jobs = [engine.submit(order(steps=200, seed=seed)) for seed in range(6)]
    time.sleep(0.2)
    for job in jobs:
        job.cancel()
    for job in jobs:
        with pytest.raises(Cancelled):
            job.result(30)
    deadline = time.monotonic() + 120
    while tensors() > before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert tensors() <= before


def test_the_queue_is_bounded(pipe, start, order, gated):
    engine = start(pipe, threads=1, queue=2)
    gate = gated(pipe.transformer)
    gate.shut()
    jobs = [engine.submit(order())]
    assert gate.reached.wait(120)
    jobs += [engine.submit(order()) for _ in range(2)]
    assert engine.queued == 2
    with pytest.raises(Busy) as error:  # at once: the gate is shut, and nothing can move on
        engine.submit(order())
    assert error.value.retry_after >= 1
    gate.open.set()
    for job in jobs:
        job.result(60)
    assert engine.queued == engine.running == 0
    engine.submit(order()).result(60)


def test_as_many_as_have_a_place_come_at_once_whatever_may_wait(pipe, start, order, gated):
    engine = start(pipe, threads=4, queue=1)
    gate = gated(pipe.transformer)
    deadline = time.monotonic() + 60
    while engine._backlog.idle < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    gate.shut()
    jobs = [engine.submit(order(seed=seed)) for seed in range(4)]
    jobs.append(engine.submit(order(seed=4)))
    with pytest.raises(Busy):
        engine.submit(order())
    gate.open.set()
    assert [job.result(60).effective["seed"] for job in jobs] == [0, 1, 2, 3, 4]


def test_priority_goes_first(pipe, start, order, gated):
    engine = start(pipe, threads=1)
    gate = gated(pipe.transformer)
    gate.shut()
    first = engine.submit(order())
    assert gate.reached.wait(120)
    plain, urgent = engine.submit(order()), engine.submit(order(priority=3))
    gate.open.set()
    for job in (first, plain, urgent):
        job.result(60)
    assert urgent.started < plain.started


def test_deadlines(pipe, start, order, gated):
    engine = start(pipe, threads=1)
    gate = gated(pipe.transformer)
    gate.shut()
    first = engine.submit(order())
    assert gate.reached.wait(120)
    with pytest.raises(DeadlineExceeded, match="waited longer"):
        engine.submit(order(queue_seconds=0.05)).result(60)
    gate.open.set()
    first.result(60)
    gate.shut()
    # Also while the call that it waits for does not end.
    with pytest.raises(DeadlineExceeded, match="ran longer"):
        engine.submit(order(steps=30, run_seconds=0.3)).result(60)
    gate.open.set()
    assert engine.submit(order()).result(60).effective["seed"] == 1
