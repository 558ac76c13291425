import math

import pytest
import torch

from vivace.errors import InputError
from vivace.evals.interval import bootstrap, newcombe, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe, Stat. Med. 17:857, 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(total - right, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_ends_solve_the_score_equation():
    low, high = wilson(3600, 4000, confidence=0.99)
    for end in (low, high):
        assert abs(0.9 - end) / math.sqrt(end * (1 - end) / 4000) == pytest.approx(2.575829, abs=1e-5)


@pytest.mark.parametrize(("right", "total"), [(0, 0), (5, 4), (-1, 4)])
def test_wilson_refuses_what_is_no_proportion(right, total):
    with pytest.raises(InputError, match=f"{right} of {total}"):
        wilson(right, total)


def test_newcombe_gives_the_published_interval():
    # Newcombe, Stat. Med. 17:2635, 1998, the example of 36, 12, 2 and 0 pairs, method 10.
    assert newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_newcombe_turns_over_with_the_systems_and_stays_wide_without_a_difference():
    low, high = newcombe(70, 12, 5, 13)
    assert newcombe(70, 5, 12, 13) == pytest.approx((-high, -low), abs=1e-12)
    low, high = newcombe(50, 0, 0, 0)
    assert low == pytest.approx(-high)
    assert high > 0.05


def test_newcombe_covers_the_true_difference():
    # 2000 draws of 100 pairs: both right 70 %, only the first 14 %, only the second 6 %.
    torch.manual_seed(0)
    draws = torch.multinomial(torch.tensor([0.70, 0.14, 0.06, 0.10]), 2000 * 100, replacement=True).view(2000, 100)
    hits = 0
    for draw in draws:
        low, high = newcombe(*torch.bincount(draw, minlength=4).tolist())
        hits += low <= 0.08 <= high
    assert 0.93 < hits / 2000 < 0.975


def test_bootstrap_agrees_with_the_normal_interval_of_a_large_sample():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3 + 10
    low, high = bootstrap(values)
    reach = 1.96 * values.std().item() / 20
    assert (low, high) == pytest.approx((values.mean().item() - reach, values.mean().item() + reach), abs=0.05)
    assert bootstrap(values) == (low, high)
    with pytest.raises(InputError, match=r"got \[1\]"):
        bootstrap(values[:1])
