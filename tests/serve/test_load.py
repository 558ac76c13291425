"""A load: the same requests for everyone, a closed loop, and figures made of several rounds."""

import threading
import time
from collections import Counter
from itertools import pairwise

import pytest

from vivace.serve.load import Turns, against, pooled, put, requests, rotated


def test_requests_are_mixed_and_the_same_for_everyone():
    one, two = (requests(20, prompt="a", size=(64, 64), steps=(3, 6), seed=0) for _ in range(2))
    assert one == two
    assert {request.steps for request in one} == {3, 4, 5, 6}
    assert len({request.seed for request in one}) == 20


def test_a_closed_loop_has_as_many_at_a_time_as_it_has_clients():
    now, most, lock = 0, 0, threading.Lock()

    def ask(request):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        if request.seed == 3:
            raise RuntimeError("one fails")

    found = put(ask, requests(12, prompt="a", size=(64, 64), steps=(1, 1), seed=0), concurrency=3, server="x")
    assert most == 3
    assert (len(found.latencies), found.failed) == (11, 1)
    assert 0.02 <= min(found.latencies) <= max(found.latencies) < found.seconds


def test_nobody_is_always_the_first_or_after_the_same_one():
    orders = ["".join(rotated("abc", number=number)) for number in range(7)]
    assert orders == ["abc", "bca", "cab", "cba", "acb", "bac", "abc"]
    after = Counter(pair for order in orders[:6] for pair in pairwise(order))
    assert set(after.values()) == {2}
    assert len(after) == 6


def one_round(latencies, seconds, failed=0):
    return {"server": "x", "concurrency": 2, "latencies": latencies, "seconds": seconds, "failed": failed}


def test_rounds_are_pooled_over_the_time_that_a_server_was_asked():
    found = pooled([one_round([1.0, 2.0], 4.0), one_round([3.0, 4.0, 5.0], 6.0, failed=1)])
    assert (found["pictures"], found["seconds"], found["failed"], found["rounds"]) == (5, 10.0, 1, 2)
    assert found["images_per_second"] == 0.5
    assert (found["p50_s"], found["p95_s"]) == (3.0, 5.0)


def test_a_ratio_is_of_all_rounds_and_its_error_from_how_far_these_are_apart():
    mine, theirs = [one_round([1.0] * 2, 1.0)] * 4, [one_round([1.0] * 2, 2.0)] * 4
    assert against(mine, theirs) == (2.0, 0.0)
    # A machine that is half as quick in one round is so for both: nothing of it is left.
    slow = [*mine[:3], one_round([1.0] * 2, 2.0)], [*theirs[:3], one_round([1.0] * 2, 4.0)]
    assert against(*slow) == (2.0, 0.0)
    ratio, error = against([*mine[:3], one_round([1.0] * 2, 2.0)], theirs)
    assert ratio == pytest.approx(1.6)
    assert error == pytest.approx(0.25)
    assert against(mine[:1], theirs[:1]) == (2.0, None)


def test_behind_a_lock_nobody_is_passed_by_who_came_later():
    """With Python's own lock one client is answered again and again while the others wait for its end."""
    lock, order = Turns(), []

    def ask(request):
        with lock:
            order.append(threading.get_ident())
            time.sleep(0.005)

    put(ask, requests(24, prompt="a", size=(64, 64), steps=(1, 1), seed=0), concurrency=4, server="x")
    # Six each, where none of them is kept from the processor.
    assert sorted(Counter(order).values())[0] >= 4


def test_a_lock_is_free_again_after_a_failure():
    lock = Turns()
    with pytest.raises(RuntimeError), lock:
        raise RuntimeError
    with lock:
        pass
