"""How many requests go best into one call, from what calls took: more is not always quicker."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

KEPT = 512  # kinds of calls that are remembered
TRIALS = 3  # calls of a size before its time counts: the first ones compile and warm up
GAIN = 1.05  # how much quicker twice as many have to be, for each request
FADE = 0.998  # what an old measurement is still worth, with every call since: no size is given up for good


@dataclass(eq=False)
class Rate:
    """Requests a second in calls of one size, at best: what else the machine does only makes them slower."""

    best: float = 0.0
    trials: int = 0
    last: int = 0  # the call of its kind, counted from the first, that was of this size

    def ran(self, rate: float, *, now: int) -> None:
        self.best = max(rate, self.best * FADE ** (now - self.last)) if self.trials > 1 else rate
        self.trials, self.last = self.trials + 1, now

    def hoped(self, now: int) -> float:
        """What it may be by now."""
        return self.best / FADE ** min(now - self.last, 1000)


class Rates:
    """Rates by kind of call and size. Sizes between two powers of two count as the smaller."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, dict[int, Rate]] = OrderedDict()

    def ran(self, key: Hashable, *, size: int, seconds: float) -> None:
        """A call of `size` requests took so long."""
        rates = self._known.setdefault(key, {})
        self._known.move_to_end(key)
        if len(self._known) > KEPT:
            self._known.popitem(last=False)
        now = sum(rate.trials for rate in rates.values())
        rates.setdefault(_power(size), Rate()).ran(size / max(seconds, 1e-9), now=now)

    def best(self, key: Hashable, *, most: int) -> int:
        """The size to run, of at most `most`: halved as long as that is as quick for each, or has not been tried."""
        rates, size = self._known.get(key, {}), most
        now = sum(rate.trials for rate in rates.values())
        while size > 1:
            here, half = (rates.get(n, Rate()) for n in (_power(size), _power(size) // 2))
            if here.trials < TRIALS:
                return size
            if half.trials >= TRIALS and half.hoped(now) * GAIN < here.hoped(now):
                return size
            size = _power(size) // 2
        return max(size, 1)


def _power(size: int) -> int:
    return 1 << (size.bit_length() - 1)
