"""Rates: larger calls where they are quicker, small ones where not, and nothing given up for good."""

import pytest

from vivace.serve.rates import TRIALS, Rates


def settled(seconds, *, most=16, calls=200):
    """The sizes that calls have in the end whose duration is `seconds(size)`."""
    rates, sizes = Rates(), []
    for _ in range(calls):
        sizes.append(rates.best("x", most=most))
        rates.ran("x", size=sizes[-1], seconds=seconds(sizes[-1]))
    return sizes


@pytest.mark.parametrize(
    ("seconds", "size"),
    [
        (lambda n: 0.1, 16),  # the device is far from busy
        (lambda n: 0.1 * n, 1),  # it is as busy as can be
        (lambda n: 0.1 * max(n, 4), 4),
        (lambda n: 0.1 * n * (1 + n / 16), 1),  # more than its caches hold
    ],
)
def test_the_size_follows_the_rate(seconds, size):
    sizes = settled(seconds)
    assert sizes.count(size) > 0.7 * len(sizes)
    assert all(one & (one - 1) == 0 for one in sizes)


def test_between_powers_of_two_everyone_who_is_there_goes():
    assert settled(lambda n: 0.1, most=6)[-1] == 6
    assert settled(lambda n: 0.1 * n, most=6)[-1] == 1


def test_one_slow_moment_decides_nothing():
    rates = Rates()
    for number in range(40):
        size = rates.best("x", most=2)
        rates.ran("x", size=size, seconds=10.0 if number == 1 else 0.1)
    assert rates.best("x", most=2) == 2


def test_what_was_slow_is_tried_again():
    rates = Rates()
    for size in (1, 2):
        for _ in range(TRIALS):
            rates.ran("x", size=size, seconds=0.1 * size)
    assert rates.best("x", most=2) == 1
    for _ in range(40):
        rates.ran("x", size=1, seconds=0.1)
    assert rates.best("x", most=2) == 2
    for _ in range(40):
        rates.ran("x", size=rates.best("x", most=2), seconds=0.1)
    assert rates.best("x", most=2) == 2, "it is twice as quick by now"


def test_alone_there_is_nothing_to_choose():
    assert Rates().best("x", most=1) == 1
