"""The gathering: calls of one kind meet, nobody waits who has nobody to wait for, and every wait is bounded."""

import threading
import time

import pytest
import torch

from vivace.serve.call import Axes, Call
from vivace.serve.gather import Gather
from vivace.serve.job import Job
from vivace.serve.request import Request
from vivace.serve.worker import Worker

STEPS = 6


def call(job, key="denoise", *, arrived=0.0, module=None):
    return Call(
        job=job, module=module or torch.nn.Identity(), method="forward", compute=lambda: None, kwargs={}, form=Axes(),
        scope=None, key=key, rows=1, arrived=arrived,
    )  # fmt: skip


@pytest.fixture
def jobs():
    return [Job(Request(prompt="a"), model="tiny", seed=seed) for seed in range(4)]


def go(gather, *calls, seconds, now):
    """Calls come, run together, and are answered at `now`."""
    for one in calls:
        gather.arrives(one)
    gather.ran(calls, seconds=seconds, now=now)
    for one in calls:
        one.finish()


def test_those_who_ran_with_it_before_are_waited_for_a_share_of_its_time(jobs):
    gather = Gather(share=0.25, longest=1.0)
    go(gather, call(jobs[0]), call(jobs[1]), seconds=0.4, now=10.0)
    back = call(jobs[0], arrived=10.01)
    gather.arrives(back)
    assert gather.wait("denoise", [back], free=10.0, now=10.01) == pytest.approx(0.1)
    assert gather.wait("denoise", [back], free=10.0, now=10.2) == 0
    assert Gather(share=0.25, longest=0.02).wait("denoise", [back], free=10.0, now=10.01) == 0, "nothing is known yet"


def test_who_came_while_the_device_was_busy_still_waits_for_the_others(jobs):
    gather = Gather(share=0.25, longest=1.0)
    go(gather, call(jobs[0]), call(jobs[1]), seconds=0.4, now=10.0)
    waiting = call(jobs[0], arrived=10.1)
    gather.arrives(waiting)
    go(gather, call(jobs[2]), call(jobs[3]), seconds=0.4, now=10.5)
    assert gather.wait("denoise", [waiting], free=10.5, now=10.5) == pytest.approx(0.1)


def test_alone_nobody_waits(jobs):
    gather = Gather(share=1.0, longest=1.0)
    go(gather, call(jobs[0]), seconds=0.4, now=10.0)
    back = call(jobs[0], arrived=10.01)
    gather.arrives(back)
    assert gather.wait("denoise", [back], free=10.0, now=10.01) == 0


def test_jobs_that_are_over_late_or_bound_elsewhere_are_not_waited_for(jobs):
    gather = Gather(share=10.0, longest=1.0)
    mine = call(jobs[0], arrived=10.5)
    go(gather, call(jobs[1]), call(jobs[2]), seconds=0.4, now=10.0)
    gather.arrives(mine)
    assert gather.wait("denoise", [mine], free=10.0, now=10.5) > 0
    # Away for longer than the longest wait:
    assert gather.wait("denoise", [mine], free=11.0, now=11.1) == 0
    gather.leaves(jobs[1])
    gather.arrives(call(jobs[2], "decode"))
    assert gather.wait("denoise", [mine], free=10.0, now=10.5) == 0


def test_what_comes_after_a_kind_of_call_is_learned(jobs):
    gather = Gather(share=10.0, longest=1.0)
    go(gather, call(jobs[0], "text"), seconds=0.4, now=9.0)
    go(gather, call(jobs[0]), seconds=0.4, now=9.5)
    mine = call(jobs[0], arrived=10.0)
    gather.arrives(mine)
    assert gather.wait("denoise", [mine], free=10.0, now=10.0) == 0
    go(gather, call(jobs[1], "text"), seconds=0.1, now=10.0)
    assert gather.wait("denoise", [mine], free=10.0, now=10.0) > 0


class Doubled(torch.nn.Module):
    """Counts the rows of its calls; the first one waits for `open`."""

    def __init__(self):
        super().__init__()
        self.reached, self.open, self.sizes = threading.Event(), threading.Event(), []

    def forward(self, x):
        self.sizes.append(len(x))
        self.reached.set()
        assert self.open.wait(60)
        return 2 * x


def test_requests_of_one_kind_meet_in_every_call(jobs):
    # Waits as long as it takes, so that the count does not depend on how fast this machine is.
    worker, module, found = Worker(torch.device("cpu"), gather=Gather(share=1e9, longest=60.0)), Doubled(), {}

    def run(job):
        x = torch.full((1, 2), float(job.seed))
        for step in range(STEPS):
            found[job.seed, step] = worker.call(job, module, "forward", {"x": x}, form=Axes(), digest=id).out
        worker.leave(job)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    threads[0].start()
    assert module.reached.wait(60)
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 60
    while worker.waiting < len(jobs) - 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    module.open.set()
    for thread in threads:
        thread.join(120)
    worker.close()
    assert module.sizes == [1, *[len(jobs)] * (STEPS - 1), len(jobs) - 1]
    assert all(torch.equal(out, torch.full((1, 2), 2.0 * seed)) for (seed, _), out in found.items())
    assert len(found) == len(jobs) * STEPS


def test_pictures_of_one_kind_meet_in_one_call(pipe, start, order, gated):
    engine, gate = start(pipe, gather=lambda: Gather(share=1e9, longest=60.0)), gated(pipe.transformer)
    gate.shut()
    first = [engine.submit(order(seed=1, steps=40))]
    assert gate.reached.wait(60)
    first += [engine.submit(order(seed=seed, steps=40)) for seed in (2, 3, 4)]
    gate.open.set()
    results = [job.result(120) for job in first]
    rows = 2  # of one request: both halves of guidance
    assert sum(gate.sizes) == 4 * 40 * rows
    # Until the last one is there they may come in any company; from then on all four are in every call.
    full = [place for place, size in enumerate(gate.sizes) if size == 4 * rows]
    assert len(full) >= 10
    assert full == list(range(full[0], full[0] + len(full)))
    assert min(result.calls["requests_per_call"] for result in results) > 1
