"""Work that is spread: everything is done, also what a worker had when it was killed."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from vivace.cluster.spread import spread
from vivace.errors import InputError


def squares(folder: str):
    """What makes a task's function: the first to come to task 3 is killed over it."""

    def do(number: int) -> int:
        mark = Path(folder) / "killed"
        if number == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    return do


def refuses():
    def do(number: int) -> int:
        raise InputError(f"{number} is refused; take another")

    return do


def test_what_a_killed_worker_had_is_done_again(cluster, tmp_path):
    found = dict(spread(partial(squares, str(tmp_path)), range(6), workers=2))
    assert (tmp_path / "killed").exists()
    assert found == {number: number * number for number in range(6)}


def test_a_mistake_comes_back_as_it_was_raised(cluster):
    with pytest.raises(InputError, match="7 is refused; take another"):
        list(spread(refuses, [7], workers=1))


def test_nothing_to_do_starts_nothing():
    assert list(spread(refuses, [])) == []
