"""The examination by workers: the answers of one process, kept batch by batch."""

import logging
from dataclasses import replace

import pytest
import torch

from vivace.builtin.reader import load_reader
from vivace.evals import builtin, spread_exam
from vivace.evals.spread_exam import Order, take
from vivace.load import load

pytestmark = pytest.mark.timeout(600)  # clusters start slowly on a busy machine


def test_answers_are_those_of_one_process_and_are_kept(cluster, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(builtin, "BATCH", 4)
    order = Order(
        captions=7, contents="these", steps=1, seed=3, call={"height": 64, "width": 64}, device="cpu", batch=4
    )
    told = []
    answers, place = take(order, tmp_path, workers=1, on_pictures=told.append)
    assert place == {"device": "cpu", "dtype": "float32"}
    assert sorted(told) == told
    assert told[-1] == 7
    pipe, reader = load("builtin", device="cpu"), load_reader()
    pipe.set_progress_bar_config(disable=True)
    alone = builtin.take(builtin.draw_exam(7, seed=3), pipe, reader, steps=1, seed=3, height=64, width=64)
    assert answers.verdicts == alone.verdicts
    assert torch.allclose(answers.features, alone.features, atol=1e-4)
    (home,) = tmp_path.iterdir()
    first, second = sorted(home.glob("*.safetensors"))
    kept = first.stat().st_mtime_ns
    second.unlink()
    again, _ = take(order, tmp_path, workers=1)
    assert again.verdicts == answers.verdicts
    assert first.stat().st_mtime_ns == kept
    with caplog.at_level(logging.WARNING, "vivace"):
        other = spread_exam._home(replace(order, captions=4, contents="others"), tmp_path)
    assert "another captions (7, now 4), contents (these, now others)" in caplog.text
    assert [path.name for path in other.iterdir()] == [spread_exam.ORDER], "answers of another exam are taken"


def test_a_killed_worker_changes_no_answer(cluster, tmp_path, monkeypatch, mortal, caplog):
    order = Order(
        captions=10, contents="these", steps=1, seed=3, call={"height": 64, "width": 64}, device="cpu", batch=4
    )
    alone = spread_exam.examiner(order)  # what a worker does, in this process
    calm = builtin.join([alone(first)[0] for first in (0, 4, 8)])
    monkeypatch.setattr(spread_exam, "examiner", mortal(spread_exam.examiner, chosen=lambda first: first == 4))
    told = []
    with caplog.at_level(logging.WARNING, "vivace"):
        answers, where = take(order, tmp_path / "disturbed", workers=2, on_pictures=told.append)
    assert mortal.killed()
    assert "with the captions from 4 on, which is done again by another" in caplog.text
    assert (answers.verdicts, where) == (calm.verdicts, {"device": "cpu", "dtype": "float32"})
    assert torch.allclose(answers.features, calm.features, atol=1e-4)  # a worker may have other threads than this
    assert told[-1] == len(answers.verdicts) == 10
    assert sorted(told) == told, "captions were counted twice"
