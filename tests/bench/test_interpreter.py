"""What Python and its lock cost a server: a thread that hogs the interpreter shows, one that sleeps does not."""

import threading
import time
from collections.abc import Callable

import pytest

from vivace.bench.interpreter import REQUESTS, Interpreter, tabulate
from vivace.families import FAMILIES
from vivace.serve import Engine, Request
from vivace.serve.job import Job


@pytest.fixture(scope="module")
def engine():
    with Engine(models={"tiny": FAMILIES["sd3"].tiny()}, threads=1) as found:
        yield found


def seen(engine, work: Callable[[], None]) -> dict:
    """What is seen while a thread of the requests' name works and the engine counts as running something."""
    worked, counted = threading.Event(), threading.Event()

    def run() -> None:
        work()
        worked.set()
        counted.wait()  # a thread that has ended has no clocks

    thread = threading.Thread(target=run, name=f"{REQUESTS}test")
    engine._running.add(Job(Request(prompt=""), model="tiny", seed=0))
    looking = Interpreter(engine)
    thread.start()
    worked.wait()
    found = looking.stop([], pictures=1)
    counted.set()
    thread.join()
    engine._running.clear()
    return found


def hog() -> None:
    end = time.thread_time() + 0.5
    while time.thread_time() < end:
        sum(range(1000))


def test_python_that_holds_the_interpreter_shows(engine):
    found = seen(engine, hog)
    assert found["python"] > 0.9
    assert found["computing"] == 0
    # CPython hands the lock on every 5 ms, and not before.
    assert found["lock_wait_ms"] > 1
    assert any("hog" in one["at"] for one in found["python_in"])
    assert found["cpu_s_per_image"]["requests"] >= 0.4
    quiet = seen(engine, lambda: time.sleep(0.5))
    assert quiet["lock_wait_ms"] < found["lock_wait_ms"]
    assert quiet["cpu_s_per_image"]["requests"] < 0.2


def test_nothing_to_do_is_no_loss(engine):
    looking = Interpreter(engine)
    time.sleep(0.1)
    found = looking.stop([], pictures=1)
    assert found["empty"] == 1
    assert found["python"] == found["joining"] == 0


def test_the_table_has_a_row_for_each_profile(engine):
    profile = Interpreter(engine).stop([], pictures=1)
    text = tabulate([{"concurrency": 4, **profile}, {"concurrency": 16, **profile}])
    assert [text.count(f"| {clients} |") for clients in (1, 4, 16)] == [0, 1, 1]
    assert tabulate([]) == ""
