"""Cohorts: what stays the same is joined once, and nothing outlives its job."""

import dataclasses

import torch

from vivace.accelerate import acceleration_of
from vivace.serve.cohort import Cohort, Cohorts
from vivace.serve.gather import Gather
from vivace.serve.job import Job


def test_the_same_parts_are_the_same_tensor():
    cohort, parts = Cohort(), [torch.zeros(1, 2), torch.ones(1, 2)]
    whole = cohort.cat("x", list(parts))
    assert torch.equal(whole, torch.cat(parts))
    assert cohort.cat("x", list(parts)) is whole
    assert cohort.cat("y", list(parts)) is not whole


def test_parts_that_changed_are_joined_anew():
    cohort, parts = Cohort(), [torch.zeros(1, 2), torch.ones(1, 2)]
    cohort.cat("x", list(parts))
    parts[0].add_(5)
    assert cohort.cat("x", list(parts))[0, 0] == 5
    other = [torch.full((1, 2), 7.0), parts[1]]
    assert cohort.cat("x", other)[0, 0] == 7
    with torch.inference_mode():
        frozen = [torch.zeros(1, 2)]
        whole = cohort.cat("z", list(frozen))
        frozen[0].add_(5)
    assert cohort.cat("z", list(frozen)) is not whole


def test_cohorts_end_with_their_jobs(engine, pipe, order):
    jobs = [engine.submit(order(seed=seed, steps=6)) for seed in range(3)]
    assert all(isinstance(job, Job) for job in jobs)
    for job in jobs:
        job.result(60)
    (worker,) = engine.workers.values()
    worker.leave(jobs[-1])
    assert isinstance(worker._cohorts, Cohorts)
    assert not worker._cohorts._known


def test_what_a_prompt_needs_once_is_computed_once_for_the_cohort(start, pipe, order, gated):
    # Waits for who is on his way, so that who meets does not depend on how fast this machine is.
    engine = start(pipe, gather=lambda: Gather(share=1e9, longest=60.0))
    engine.submit(order()).result(60)
    lane = acceleration_of(pipe).target.lanes["transformer"]
    assert lane.split is not None
    assert lane.split.once is not None
    calls, stock = [], lane.split.once
    lane.split = dataclasses.replace(lane.split, once=lambda **kwargs: calls.append(1) or stock(**kwargs))
    gate = gated(pipe.transformer)
    gate.shut()
    jobs = [engine.submit(order(seed=1, steps=12))]
    assert gate.reached.wait(120)
    jobs += [engine.submit(order(seed=seed, steps=12)) for seed in (2, 3)]
    gate.open.set()
    results = [job.result(60) for job in jobs]
    assert max(result.calls["requests_per_call"] for result in results) > 1.5
    assert len(calls) < 12
