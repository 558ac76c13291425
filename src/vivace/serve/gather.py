"""The gathering: which calls are waited for so that they can share one, for how long, and which group goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from vivace.serve.call import Call
from vivace.serve.job import Job
from vivace.serve.rates import Rates

KEPT = 512  # kinds of calls that are remembered
PRIORITY = 4.0  # how much more a wait counts with each step of priority
UNKNOWN = 0.01  # seconds that a call is taken to last before the first of its kind has run


@dataclass(eq=False)
class Place:
    """Where a running job is: at a call, or after one on its way to the next."""

    key: Hashable
    done: threading.Event  # of that very call, which itself would keep its tensors
    answered: float | None = None  # when it was; None: it still waits, or computes


class Gather:
    """What is known of the calls so far, by kind: how long they take, and which kind a job comes with next.

    A group of calls waits for jobs that are between two calls and whose next one is likely of its kind, at most `share`
    of what such a call takes, and `longest` seconds. That time begins when the device is free: who came while it was
    busy has not held up anything yet. So two pairs of requests that take turns become four that go together.

    With `sized`, no more go together than is quicker for each: a CPU may be as busy with one. On a GPU a call returns
    before it is computed, so that its time says little.
    """

    def __init__(self, *, share: float = 0.25, longest: float = 0.02, sized: bool = False) -> None:
        self.share, self.longest = share, longest
        self._rates = Rates() if sized else None
        self._places: dict[Job, Place] = {}
        self._next: OrderedDict[Hashable, Hashable] = OrderedDict()  # kind of call -> kind of the one after it
        self._seconds: OrderedDict[Hashable, float] = OrderedDict()

    def arrives(self, call: Call) -> None:
        """A job hands in a call."""
        before = self._places.get(call.job)
        if before is not None and before.key is not None and call.key is not None:
            _keep(self._next, before.key, call.key)
        self._places[call.job] = Place(call.key, call.done)

    def alone(self, job: Job) -> bool:
        """Whether no other job has been at a call, or is at one."""
        return all(one is job for one in self._places)

    def leaves(self, job: Job) -> None:
        """A job is over."""
        self._places.pop(job, None)

    def ran(self, calls: Sequence[Call], *, seconds: float, now: float) -> None:
        """Calls were answered together."""
        key = calls[0].key
        if key is not None:
            before = self._seconds.get(key, seconds)
            _keep(self._seconds, key, 0.7 * before + 0.3 * seconds)
            if self._rates is not None:
                self._rates.ran(key, size=len(calls), seconds=seconds)
        for call in calls:
            place = self._places.get(call.job)
            if place is not None and place.done is call.done:
                place.answered = now

    def size(self, key: Hashable, *, most: int) -> int:
        """How many calls of a kind, of at most `most`, go best together; no more than there are running jobs."""
        most = min(most, max(1, len(self._places)))
        return most if self._rates is None else self._rates.best(key, most=most)

    def wait(self, key: Hashable, calls: Sequence[Call], *, free: float, now: float) -> float:
        """Seconds that these calls should still wait for others; `free` is when the device became so."""
        window = min(self.longest, self.share * self._seconds.get(key, 0.0))
        left = max(calls[0].arrived, free) + window - now
        return left if left > 0 and self._expects(key, calls, now) else 0.0

    def urgency(self, key: Hashable, calls: Sequence[Call], *, now: float) -> float:
        """The response ratio, (wait + duration) / duration: short calls pass long ones, and none waits forever."""
        usual = self._seconds.get(key) or UNKNOWN
        return max((1 + (now - call.arrived) / usual) * PRIORITY**call.job.request.priority for call in calls)

    def _expects(self, key: Hashable, calls: Sequence[Call], now: float) -> bool:
        """Whether a job is on its way to a call of this kind, and has not been for too long."""
        here = {call.job for call in calls}
        return any(
            job not in here
            and place.answered is not None
            and now - place.answered <= self.longest
            and self._next.get(place.key, place.key) == key
            for job, place in self._places.items()
        )


def _keep(known: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > KEPT:
        known.popitem(last=False)
