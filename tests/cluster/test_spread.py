"""Work that is spread: everything is done, also what a worker had when it was killed."""

import pytest

from vivace.cluster.spread import spread
from vivace.errors import InputError


def squares():
    return lambda number: number * number


def refuses():
    def do(number: int) -> int:
        raise InputError(f"{number} is refused; take another")

    return do


def test_what_a_killed_worker_had_is_done_again(cluster, mortal):
    found = dict(spread(mortal(squares, chosen=lambda number: number == 3), range(6), workers=2))
    assert mortal.killed()
    assert found == {number: number * number for number in range(6)}


def test_a_mistake_comes_back_as_it_was_raised(cluster):
    with pytest.raises(InputError, match="7 is refused; take another"):
        list(spread(refuses, [7], workers=1))


def test_nothing_to_do_starts_nothing():
    assert list(spread(refuses, [])) == []
