"""Who waits for a place, and who gets one."""

import threading
import time

import pytest

from vivace.families import FAMILIES
from vivace.serve import Engine, Request
from vivace.serve.failures import Busy

SIDE = 64


def test_videos_leave_pictures_a_place_and_room_to_wait(order, gated):
    wan = FAMILIES["wan"].tiny()
    with Engine(models={"tiny": FAMILIES["sd3"].tiny(), "clip": wan}, threads=2, queue=4) as engine:
        gate = gated(wan.transformer)
        gate.shut()
        clip = Request(model="clip", prompt="a red circle", size=(SIDE, SIDE), frames=5, steps=2)
        videos = [engine.submit(clip)]
        assert gate.reached.wait(120)
        videos += [engine.submit(clip) for _ in range(3)]
        with pytest.raises(Busy, match="requests are waiting"):
            engine.submit(clip)
        picture = engine.submit(order(model="tiny"))
        deadline = time.monotonic() + 60
        while picture.status == "queued":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert [video.status for video in videos] == ["running", "queued", "queued", "queued"]
        gate.open.set()
        picture.result(60)
        for video in videos:
            assert len(video.result(60).pictures) == 5


def test_where_there_are_videos_alone_they_have_every_place(start, gated):
    wan = FAMILIES["wan"].tiny()
    engine = start(wan, threads=2)
    gate = gated(wan.transformer)
    gate.shut()
    videos = [engine.submit(Request(prompt="a", size=(SIDE, SIDE), frames=5, steps=1)) for _ in range(2)]
    deadline = time.monotonic() + 60
    while engine.running < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    gate.open.set()
    for video in videos:
        video.result(60)


def test_who_asks_one_thing_after_another_is_served_by_one_thread(pipe, start, order):
    """By each in turn, every thread would keep memory of its own, and a team for its maths."""
    engine, threads = start(pipe, threads=4), set()
    pipe.transformer.register_forward_pre_hook(lambda *call: threads.add(threading.get_ident()))
    for _ in range(6):
        job = engine.submit(order(steps=1))
        job.result(60)
        while engine.running or engine._backlog.idle < 4:
            time.sleep(0.001)
    assert len(threads) == 1


@pytest.mark.parametrize(("places", "ahead"), [(4, 2), (2, 1)])
def test_those_of_one_mode_go_together_as_many_as_there_are_places(pipe, start, order, gated, places, ahead):
    """In turns with those of another each would go alone; with no end to them the others would never go."""
    engine, gate = start(pipe, threads=places), gated(pipe.transformer)
    gate.shut()
    jobs = [engine.submit(order())]
    assert gate.reached.wait(120)
    jobs += [engine.submit(order(quality=name)) for name in ("balanced", "fast", "balanced", "balanced", "fast")]
    gate.open.set()
    for job in jobs:
        job.result(60)
    _, first, other, *more, last = jobs
    assert first.started < other.started
    assert sum(job.started < other.started for job in more) == ahead
    assert last.started > other.started


def test_nobody_goes_along_past_what_is_more_urgent(pipe, start, order, gated):
    engine, gate = start(pipe), gated(pipe.transformer)
    gate.shut()
    jobs = [engine.submit(order())]
    assert gate.reached.wait(120)
    asked = [("balanced", 2), ("fast", 1), ("balanced", 0), ("balanced", 0)]
    jobs += [engine.submit(order(quality=name, priority=priority)) for name, priority in asked]
    gate.open.set()
    for job in jobs:
        job.result(60)
    started = [job.started for job in jobs]
    assert started == sorted(started)


@pytest.mark.parametrize("why", ["cancelled", "late"])
def test_who_does_not_wait_any_more_holds_nobody_back(pipe, start, order, gated, why):
    engine, gate = start(pipe), gated(pipe.transformer)
    gate.shut()
    running = engine.submit(order())
    assert gate.reached.wait(120)
    other = engine.submit(order(quality="balanced", queue_seconds=1 if why == "late" else None))
    same = engine.submit(order())
    deadline = time.monotonic() + 60
    while engine._backlog.idle < 15:  # all have looked, and found nothing
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if why == "cancelled":
        other.cancel()
    while same.status == "queued":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert running.status == "running"
    gate.open.set()
    same.result(60)
