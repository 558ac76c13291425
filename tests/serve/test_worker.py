"""Who computes: a lone request's own thread on a CPU, the worker's as soon as there are two."""

import threading
import time

import pytest

from vivace.serve.failures import Cancelled, DeadlineExceeded


@pytest.fixture
def threads(pipe):
    """The names of the threads that the denoiser was called in, in order."""
    names = []
    pipe.transformer.register_forward_pre_hook(lambda *call: names.append(threading.current_thread().name))
    return names


def test_a_request_that_is_alone_computes_in_its_own_thread(engine, order, threads):
    alone = engine.submit(order()).result(60)
    assert alone.calls["requests_per_call"] == 1
    assert {name.rpartition("-")[0] for name in threads} == {"vivace-request"}


def test_two_share_the_workers_calls_from_the_next_step_on(engine, pipe, order, gated, threads):
    gate = gated(pipe.transformer)
    gate.shut()
    jobs = [engine.submit(order(seed=1, steps=4))]
    assert gate.reached.wait(120)
    jobs.append(engine.submit(order(seed=2, steps=3)))
    worker = engine.workers[engine.models["tiny"].device]
    deadline = time.monotonic() + 60
    while not worker.waiting:  # the second one's text encoder
        assert time.monotonic() < deadline
        time.sleep(0.01)
    gate.open.set()
    shared = [job.result(60).calls["requests_per_call"] for job in jobs]
    assert max(shared) > 1
    assert threads[0].startswith("vivace-request")
    assert "vivace-cpu" in threads
    # Once the other is over, what is left of the longer one is its own again.
    engine.submit(order(steps=1)).result(60)
    assert threads[-1].startswith("vivace-request")


def wedged(engine, pipe, gated, wanted):
    """A job whose own thread is in a call that does not return, and what lets it."""
    gate = gated(pipe.transformer)
    gate.shut()
    job = engine.submit(wanted)
    assert gate.reached.wait(120)
    return job, gate


def test_a_call_of_its_own_that_does_not_return_holds_up_no_cancel(engine, pipe, order, gated):
    job, gate = wedged(engine, pipe, gated, order())
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(10)
    assert engine.running == 0
    gate.open.set()
    engine.submit(order()).result(60)
    assert engine.running == 0


def test_nor_a_deadline_nor_the_heartbeat(pipe, start, order, gated):
    engine = start(pipe, stale=0.2)
    engine.submit(order()).result(60)
    job, gate = wedged(engine, pipe, gated, order(run_seconds=1))
    with pytest.raises(DeadlineExceeded, match="longer than 1 s"):
        job.result(30)
    assert engine.health().reason == "the device does not answer"
    gate.open.set()
    engine.submit(order()).result(60)
    assert engine.health().ready


def test_the_model_stays_as_it_is_while_it_computes_for_who_was_cancelled(engine, pipe, order, gated):
    """Another preset's request would take the layers apart under the call's hands."""
    job, gate = wedged(engine, pipe, gated, order())
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(10)
    other = engine.submit(order(quality="balanced"))
    time.sleep(0.3)
    assert other.status == "queued"
    gate.open.set()
    assert other.result(60).effective["preset"] == "balanced"


def test_the_same_where_it_shares_the_call(engine, pipe, order, gated):
    gate = gated(pipe.transformer)
    gate.shut()
    jobs = [engine.submit(order(seed=1, steps=4))]
    assert gate.reached.wait(120)
    jobs.append(engine.submit(order(seed=2, steps=4)))
    worker = engine.workers[engine.models["tiny"].device]
    deadline = time.monotonic() + 60
    while not worker.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    gate.open.set()
    while sum(gate.sizes[-1:]) <= 2 and time.monotonic() < deadline:  # rows: a request has two, with guidance
        time.sleep(0.001)
    gate.shut()
    assert gate.reached.wait(60)
    for job in jobs:
        job.cancel()
        with pytest.raises(Cancelled):
            job.result(10)
    other = engine.submit(order(quality="balanced"))
    time.sleep(0.3)
    assert other.status == "queued"
    gate.open.set()
    assert other.result(60).effective["preset"] == "balanced"
