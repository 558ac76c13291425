"""Memory that was freed leaves the process."""

import os
import sys

import pytest

from vivace.memory import heap

SIZE = 64 * 1024  # small enough for the heap


def resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux") or heap._trim() is None, reason="glibc only")
def test_what_is_free_between_small_things_goes_back():
    many = [b"x" * SIZE for _ in range(4096)]
    pins = [many[i] for i in range(0, len(many), 16)] + many[-1:]  # the last one: nothing shrinks at its end
    del many
    before = resident()
    heap.give_back()
    assert before - resident() > 4096 * SIZE // 2
    assert len(pins) == 257
