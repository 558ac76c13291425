"""A whole bench on tiny models: a process a contestant, results that stay, tables and a chart."""

import csv
import json

import pytest
from PIL import Image

from vivace.bench.book import Book
from vivace.bench.contestant import Contestant, contestants_of
from vivace.bench.results import write
from vivace.bench.run import Bench
from vivace.bench.workload import workload_of

MACHINE = {"processor": "a processor", "cores": 2, "versions": {"torch": "2.13.0"}}
WORKLOAD = workload_of("sd3", device="cpu", dtype="float32", tiny=True)


def bench(folder, **options) -> Bench:
    contestants = contestants_of(presets=["exact"], fields=[], peers=["eager"])
    told = {"workloads": [WORKLOAD], "contestants": contestants, "machine": MACHINE, "command": "vivace bench sd3"}
    return Bench(**{**told, "folder": folder, "limit": 200.0, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which ours and eager have run."""
    folder = tmp_path_factory.mktemp("bench")
    assert bench(folder).run() == 0
    write(folder)
    return folder


def test_one_line_a_contestant(finished):
    lines = [json.loads(line) for line in (finished / "bench.jsonl").read_text().splitlines()]
    assert [line["contestant"] for line in lines] == ["vivace exact", "eager"]
    for line in lines:
        assert line["status"] == "done"
        assert line["error"] < 1e-4
        assert line["machine"] == MACHINE
        assert line["workload"] == WORKLOAD.to_dict()
        assert line["reference"] == "ok"


def test_without_a_reference_there_is_no_error_and_no_process_for_it(tmp_path, monkeypatch):
    once = bench(tmp_path, contestants=contestants_of(presets=[], fields=[], peers=["eager"]), reference=False)
    ran, process = [], once._process
    monkeypatch.setattr(once, "_process", lambda *args, **kwargs: ran.append(args[1].label) or process(*args, **kwargs))
    assert once.run() == 0
    (line,) = once.book.contests()
    assert ran == ["eager"]
    assert (line["status"], line["error"], line["reference"]) == ("done", None, "left out")
    write(tmp_path)
    assert "| eager |" in (tmp_path / "bench.md").read_text()


def test_tables_and_a_chart(finished):
    rows = list(csv.DictReader((finished / "bench.csv").open()))
    assert {row["contestant"] for row in rows} == {"vivace exact", "eager"}
    assert float(rows[0]["ms"]) <= float(rows[1]["ms"])
    text = (finished / "bench.md").read_text()
    assert text.count("| vivace exact |") == 1
    assert "`vivace bench sd3`" in text
    assert len(Image.open(finished / "bench.png").getcolors(1 << 20)) > 3


def test_it_continues_where_it_stopped(finished, monkeypatch):
    before = (finished / "bench.jsonl").read_bytes()
    again = bench(finished)
    monkeypatch.setattr(again, "_process", lambda *_, **__: pytest.fail("a settled contestant ran again"))
    assert again.run() == 0
    assert (finished / "bench.jsonl").read_bytes() == before


def test_over_the_limit_is_a_row_that_more_time_replaces(tmp_path):
    eager = [Contestant(name="eager")]
    assert bench(tmp_path, contestants=eager, limit=0.1).run() == 0
    line = Book(tmp_path).contests()[-1]
    assert (line["status"], line["why"]) == ("not finished", "not finished in 0 s")
    write(tmp_path)
    assert line["why"] in (tmp_path / "bench.md").read_text()
    book = Book(tmp_path)
    assert book.settled(WORKLOAD, eager[0], machine=MACHINE, limit=0.1)
    assert book.settled(WORKLOAD, eager[0], machine=MACHINE, limit=100) is None


def test_a_spent_budget_leaves_the_rest_for_the_next_time(tmp_path):
    told = []
    assert bench(tmp_path, budget=1.0, on_line=told.append).run() == 2
    assert told == []
    assert not (tmp_path / "bench.jsonl").exists()


def test_a_crash_is_a_row_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("vivace.bench.run.WORKER", "vivace.bench.no_such_worker")
    assert bench(tmp_path, contestants=[Contestant(name="eager")]).run() == 0
    line = Book(tmp_path).contests()[-1]
    assert line["status"] == "failed"
    assert "no_such_worker" in line["why"]
    assert Book(tmp_path).settled(WORKLOAD, Contestant(name="eager"), machine=MACHINE, limit=200) is None


def test_what_failed_is_told_whole(tmp_path, caplog):
    unknown = Contestant(name="eager", rung=True)  # no rung of a ladder is called so
    assert bench(tmp_path, contestants=[unknown]).run() == 0
    assert "\n" not in Book(tmp_path).contests()[-1]["why"]
    assert "Traceback" in caplog.text
    assert "rungs.py" in caplog.text


def test_a_line_that_was_cut_short_is_forgotten(finished, tmp_path):
    whole = (finished / "bench.jsonl").read_text()
    first, second = whole.splitlines()
    (tmp_path / "bench.jsonl").write_text(whole[:-200])
    assert [line["contestant"] for line in Book(tmp_path).contests()] == ["vivace exact"]
    # What is cut behind an inner brace looks like a whole line.
    (tmp_path / "bench.jsonl").write_text(f"{first}\n{second[: second.index('}') + 1]}")
    book = Book(tmp_path)
    assert [line["contestant"] for line in book.contests()] == ["vivace exact"]
    for line in (first, second):
        book.append(json.loads(line))
    assert [line["contestant"] for line in Book(tmp_path).contests()] == ["vivace exact", "vivace exact", "eager"]
