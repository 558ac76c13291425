"""A machine that is lost: its task goes to a living worker, and where none is left the command says so and ends."""

import logging
import os
import re
import time
from functools import partial
from pathlib import Path

import pytest

from vivace.cluster import crew as crews
from vivace.cluster.crew import Crew
from vivace.errors import InputError

pytestmark = pytest.mark.timeout(600)  # clusters start slowly on a busy machine


def holds(folder: str, machine: str):
    """What makes a task's function: on that machine a task never ends, and leaves a mark."""
    import ray

    here = ray.get_runtime_context().get_node_id() == machine

    def do(number: int) -> int:
        if here:
            Path(folder, "held").touch()
            while True:
                time.sleep(1)
        while not Path(folder, "held").exists():
            time.sleep(0.05)
        return number * number

    return do


def test_a_lost_machines_task_goes_to_the_living(machine, tmp_path, caplog):
    make = partial(holds, str(tmp_path), machine.id)
    with Crew(make, workers=3, most=5) as crew, caplog.at_level(logging.WARNING, "vivace"):
        found = {}
        for task, result in crew.do(range(5), called=lambda number: f"number {number}"):
            found[task] = result
            if len(found) == 1:
                machine.lose()
    assert found == {number: number * number for number in range(5)}
    (said,) = [record.getMessage() for record in caplog.records if record.name == crews.__name__]
    assert re.search(r"lost process \d+ on 127.0.0.1 with number \d, ", said)


def squares():
    return lambda number: number * number


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("OutOfMemoryError", ("the machine has no memory left",)),
        ("ObjectLostError", ("00", None, "")),
        ("ObjectReconstructionFailedError", ("00",)),
    ],
)
def test_a_result_that_is_lost_is_made_again_by_another_worker(cluster, name, facts, monkeypatch, caplog):
    """What Ray raises for a worker that its memory monitor ended, and for a machine that ends before it was asked."""
    import ray
    from ray import exceptions

    get, given, lost = ray.get, [], getattr(exceptions, name)(*facts)

    def loses_first(told):
        result = get(told)
        if result == 9:
            given.append(result)
            if len(given) == 1:
                raise lost
        return result

    monkeypatch.setattr(ray, "get", loses_first)
    # It has all processors, so that another one can only come when it is gone.
    with Crew(squares, workers=1, most=1) as crew, caplog.at_level(logging.WARNING, "vivace"):
        first = [worker.actor for worker in crew._coming.values()]
        assert list(crew.do([3], called=lambda number: f"number {number}")) == [(3, 9)]
        assert first[0] not in [worker.actor for worker in crew._idle]
    (said,) = [record.getMessage() for record in caplog.records if record.name == crews.__name__]
    assert said.endswith(f"with number 3, which is done again by another ({name})")


def only_there(machine: str):
    def do(number: int) -> int:
        os._exit(1)

    return do


def test_where_no_worker_can_come_the_command_ends_and_names_what_was_lost(machine, monkeypatch):
    monkeypatch.setattr(crews, "PATIENCE", 1.0)
    with Crew(partial(only_there, machine.id), workers=1, most=1) as crew:
        # As if every machine with that many processors were gone.
        crew._place["num_cpus"] = 64
        with pytest.raises(
            InputError, match=r"no machine is left .*lost: process \d+ on 127.0.0.1.*1 tasks are not done"
        ):
            list(crew.do([1]))


def test_a_task_that_ends_every_worker_is_given_up(cluster):
    with (
        Crew(partial(only_there, ""), workers=1, most=1) as crew,
        pytest.raises(InputError, match=r"number 1 has cost 4 workers, at last process \d+ on 127"),
    ):
        list(crew.do([1], called=lambda number: f"number {number}"))
