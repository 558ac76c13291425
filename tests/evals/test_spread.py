"""A comparison drawn by workers: complete, also when one is killed, and nothing that was kept is drawn again."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vivace.errors import InputError
from vivace.evals.contest import Contest
from vivace.evals.spread import Drawn, Order, draw, share
from vivace.evals.store import Store
from vivace.families import FAMILIES

pytestmark = pytest.mark.timeout(600)  # clusters start slowly on a busy machine


@pytest.fixture
def order(tmp_path):
    FAMILIES["sd3"].tiny().save_pretrained(tmp_path / "tiny")
    return Order(
        model=str(tmp_path / "tiny"),
        folder=tmp_path / "eval",
        presets=("exact",),
        configs={},
        prompts=("one", "two", "three", "four", "five", "six"),
        **{"steps": 2, "seed": 0, "call": {"width": 64, "height": 64}, "ranks": 2},
    )


def mortal(order):
    """A worker of which rank 1 is killed once, when it has kept a drawing."""
    go, mark = share(order), order.folder.parent / "killed"

    def kill() -> None:
        records = order.folder / "records-1.jsonl"
        while not records.is_file():
            time.sleep(0.001)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def do(rank: int) -> Drawn:
        if rank == 1 and not mark.exists():
            threading.Thread(target=kill, daemon=True).start()
        return go(rank)

    return do


def lines(folder: Path) -> list[tuple[str, int]]:
    found = [line for path in folder.glob("records-*.jsonl") for line in path.read_text().splitlines() if line]
    return [(record["contestant"], record["index"]) for record in map(json.loads, found)]


def test_a_killed_worker_goes_on_where_its_records_end(cluster, order):
    drawn = draw(order, make=mortal)
    assert (order.folder.parent / "killed").exists()
    made = lines(order.folder)
    names = ("exact", "floor: stock, in pairs")
    assert {key for key in made if key[0] in names} == {(name, index) for name in names for index in range(6)}
    kept = [key for key in made if key[0] == "exact"]
    assert len(kept) == len(set(kept)), "something was drawn twice"
    contest = Contest(
        pipe=None, model=order.model, prediction="flow", prompts=order.prompts, store=Store(order.folder),
        steps=2, seed=0, call=order.call, place=drawn.place,
    )  # fmt: skip
    assert [record.index for record in contest.of(drawn.reference)] == [*range(6)]
    assert draw(replace(order, ranks=1)).place == drawn.place
    assert lines(order.folder) == made


def test_more_workers_than_places_are_refused(cluster, order):
    with pytest.raises(InputError, match="4 workers were asked for, and the cluster has 2 places"):
        draw(replace(order, ranks=4))
