"""Confidence intervals: of a proportion, of a difference of paired proportions, of a mean."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch

from vivace.errors import InputError

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """Both ends, in the unit of what is estimated."""

    low: float
    high: float


def wilson(right: int, total: int, *, confidence: float = CONFIDENCE) -> Interval:
    """The score interval of a proportion `right / total` (Wilson, JASA 22, 1927).

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n): it keeps inside [0, 1] and says something also when all, or
    none, are right. Raises InputError unless 0 <= right <= total and total > 0.
    """
    if not 0 <= right <= total or total == 0:
        raise InputError(f"a proportion needs 0 <= right <= total and at least one case, got {right} of {total}")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = right / total
    centre = share + z2 / (2 * total)
    reach = math.sqrt(z2 * share * (1 - share) / total + (z2 / (2 * total)) ** 2)
    low = 0.0 if right == 0 else (centre - reach) / (1 + z2 / total)
    high = 1.0 if right == total else (centre + reach) / (1 + z2 / total)
    return Interval(low, high)


def newcombe(both: int, first: int, second: int, neither: int, *, confidence: float = CONFIDENCE) -> Interval:
    """The interval of a difference of proportions on the same cases (Newcombe, Stat. Med. 17, 1998, method 10).

    Of all cases `both` systems are right on so many, only the `first`, only the `second`, `neither`. The difference is
    first's share minus second's. The distances of the two Wilson intervals are added as correlated errors are, with
    the continuity-corrected phi of the four counts; it does not collapse to a point where the systems never differ.
    Raises InputError where there are no cases.
    """
    total = both + first + second + neither
    p, q = (both + first) / max(total, 1), (both + second) / max(total, 1)
    of_p, of_q = (wilson(both + n, total, confidence=confidence) for n in (first, second))
    product = both * neither - first * second
    if product > 0:
        product = max(product - total / 2, 0.0)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = product / math.sqrt(margins) if margins else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    return Interval(p - q - reach(p - of_p.low, of_q.high - q), p - q + reach(of_p.high - p, q - of_q.low))


def bootstrap(
    values: torch.Tensor, *, confidence: float = CONFIDENCE, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The percentile bootstrap interval of the mean of `values` [N] (Efron, Ann. Stat. 7, 1979).

    For two systems on the same captions pass their differences, caption by caption. The same seed gives the same ends.
    Raises InputError for fewer than two values.
    """
    if values.ndim != 1 or len(values) < 2:
        raise InputError(f"a bootstrap resamples two or more values [N], got {list(values.shape)}")
    values = values.detach().to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [values[torch.randint(len(values), values.shape, generator=generator)].mean() for _ in range(resamples)]
    )
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)
