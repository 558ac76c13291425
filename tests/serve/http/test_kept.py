"""What is kept for a while: until its time is over, and within bytes."""

from __future__ import annotations

import gc
import weakref

from vivace.serve.http.kept import Kept


class Thing:
    pass


def test_the_oldest_go_when_there_is_too_much():
    kept = Kept[str](seconds=60, most_bytes=10)
    names = [kept.add(text, nbytes=4) for text in "abc"]
    assert [kept.get(name) for name in names] == [None, "b", "c"]
    assert kept.nbytes == 8
    # One that is too much alone is kept all the same: its answer has been given.
    large = kept.add("d", nbytes=100)
    assert (kept.get(names[2]), kept.get(large)) == (None, "d")
    assert kept.nbytes == 100


def test_what_is_over_its_time_is_let_go_of_though_nothing_new_comes(monkeypatch):
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr("vivace.serve.http.kept.time.monotonic", lambda: next(clock))
    kept, thing = Kept[Thing](seconds=60, most_bytes=10), Thing()
    name, there = kept.add(thing, nbytes=4), weakref.ref(thing)
    del thing
    assert kept.get(name) is there()
    kept.sweep()
    kept.sweep()
    gc.collect()
    assert there() is None
    assert kept.nbytes == 0
    assert kept.get(name) is None


def test_names_cannot_be_guessed():
    kept = Kept[str](seconds=60, most_bytes=10)
    one, two = kept.add("a", nbytes=1), kept.add("b", nbytes=1)
    assert one != two
    assert len(one) >= 20
    assert kept.get("") is kept.get(one[:-1]) is None
