"""A comparison drawn by workers: complete, also when one is killed, and nothing that was kept is drawn again."""

import json
import logging
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vivace.errors import InputError
from vivace.evals.contest import Order, contestants
from vivace.evals.spread import Share, draw, worker
from vivace.families import FAMILIES

pytestmark = pytest.mark.timeout(600)  # clusters start slowly on a busy machine


@pytest.fixture
def order(tmp_path):
    FAMILIES["sd3"].tiny().save_pretrained(tmp_path / "tiny")
    return Order(
        model=str(tmp_path / "tiny"),
        contents="these",
        folder=tmp_path / "eval",
        presets=("exact",),
        configs={},
        prompts=("one", "two", "three", "four", "five", "six"),
        **{"steps": 2, "seed": 0, "call": {"width": 64, "height": 64}, "ranks": 2},
    )


def mortal(order):
    """A worker that is killed once, when it has the second share and has kept a drawing."""
    go, mark = worker(order), order.folder.parent / "killed"

    def kill() -> None:
        records = order.folder / "records-1.jsonl"
        while not records.is_file():
            time.sleep(0.001)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def do(task):
        if isinstance(task, Share) and task.rank == 1 and not mark.exists():
            threading.Thread(target=kill, daemon=True).start()
        return go(task)

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
    calm = replace(order, folder=order.folder.parent / "calm")
    for one in (drawn.reference, drawn.others[0]):
        for rank in range(order.ranks):
            worker(calm)(Share(contestant=one, rank=rank))
    assert {path.relative_to(calm.folder) for path in calm.folder.rglob("*.safetensors")} <= {
        path.relative_to(order.folder) for path in order.folder.rglob("*.safetensors")
    }
    for path in calm.folder.rglob("*.safetensors"):
        same, there = load_file(path), load_file(order.folder / path.relative_to(calm.folder))
        for name, apart in (("latents", 1e-3), ("frames", 1)):  # a worker may have other threads than this process
            torch.testing.assert_close(there[name].float(), same[name].float(), rtol=0, atol=apart)
    contest = order.contest(None, prediction="flow", place=drawn.place)
    assert [record.index for record in contest.of(drawn.reference)] == [*range(6)]
    alone = worker(replace(order, ranks=1))  # what a worker does, in this process
    assert {alone(Share(contestant=one, rank=0)) for one in (drawn.reference, *drawn.others)} == {drawn.place}
    assert lines(order.folder) == made


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"prompts": ("one", "new")}, r"another prompt \(1\)"), ({"contents": "others"}, "another contents")],
)
def test_what_was_drawn_of_something_else_is_not_kept(order, caplog, changed, said):
    """Without a cluster: what a worker does with its task."""
    order = replace(order, prompts=("one", "two"), ranks=1)
    share = Share(contestant=contestants(presets=("exact",), configs={}, steps=2)[0], rank=0)
    worker(order)(share)
    before = lines(order.folder)
    with caplog.at_level(logging.WARNING, "vivace"):
        worker(order)(share)
        assert (lines(order.folder), caplog.records) == (before, [])
        worker(replace(order, **changed))(share)
    assert sorted(set(lines(order.folder))) == before
    assert len(lines(order.folder)) > len(before)
    assert re.search(said, caplog.text)


def test_more_workers_than_places_are_refused(cluster, order):
    with pytest.raises(InputError, match="4 workers were asked for, and the cluster has 2 places"):
        draw(replace(order, ranks=4))
