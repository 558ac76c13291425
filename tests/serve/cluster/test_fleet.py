"""A request's time at the door: one limit for all of its tries. The replicas here do nothing but say they begin."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError

from vivace.serve import Request
from vivace.serve.cluster import fleet as fleets
from vivace.serve.cluster.fleet import Fleet
from vivace.serve.cluster.replica import Taken
from vivace.serve.failures import DeadlineExceeded, Unavailable
from vivace.serve.model import Spec


class Told:
    """What a replica tells of a request: that it has it, and after `seconds` Ray says that it is lost."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def cancel(self) -> None:
        pass

    async def __aiter__(self):
        yield Taken(1)
        await asyncio.sleep(self.seconds)
        raise ActorDiedError


class Replicas:
    """Stands for Ray's handle: notes what it is asked, and loses it."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked = seconds, []

    def options(self, **options):
        return self

    def remote(self, request):
        self.asked.append(request)
        return Told(self.seconds)


def drawn(replicas: Replicas, request: Request):
    async def draw():
        fleet = Fleet(replicas, {"builtin": Spec()}, queue=4, places=4, replicas=1, alive=lambda: 1)
        return await fleet.submit(request)

    return asyncio.run(draw())


def test_a_replica_that_never_answers_costs_the_limit_once(monkeypatch):
    monkeypatch.setattr(fleets, "MARGIN", 0.0)
    replicas = Replicas(3600.0)
    with pytest.raises(DeadlineExceeded, match="its time was over"):
        drawn(replicas, Request(prompt="a", queue_seconds=0.5, run_seconds=0.5))
    assert len(replicas.asked) == 1


def test_what_is_sent_again_has_only_the_time_that_is_left():
    replicas = Replicas(0.3)
    with pytest.raises(Unavailable):
        drawn(replicas, Request(prompt="a", run_seconds=1000.0))
    limits = [request.run_seconds for request in replicas.asked]
    assert len(limits) == fleets.TRIES
    assert limits == sorted(limits, reverse=True)
    assert limits[0] - limits[-1] >= 0.5
    assert len({request.seed for request in replicas.asked}) == 1


def test_a_video_has_no_limit_and_keeps_none():
    replicas = Replicas(0.0)
    with pytest.raises(Unavailable):
        drawn(replicas, Request(prompt="a"))
    assert {(one.queue_seconds, one.run_seconds) for one in replicas.asked} == {(None, None)}
