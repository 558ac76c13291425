"""16-bit attention for the first and last steps of a request, where the chosen backend is not exact.

The first steps lay out a picture and the last ones finish its texture; both show errors that the middle forgives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from vivace import request
from vivace.attention.backend import Attend, Backend
from vivace.attention.native import NATIVE
from vivace.attention.packed import Packed


def with_exact_ends(backend: Backend) -> Attend:
    """`backend.attend`, or native's in calls for which `exact_ends` says so."""

    def attend(q, k, v, *, mask=None, scale=None):
        chosen = NATIVE if request.EXACT.get() else backend
        return chosen.attend(q, k, v, mask=mask, scale=scale)

    if not isinstance(packed := backend.attend, Packed):
        return attend
    return replace(packed, attend=attend, serves=lambda **call: not request.EXACT.get() and packed.serves(**call))


@dataclass(frozen=True)
class Ends:
    """Which steps of a request are exact."""

    steps: int  # at each end
    share: float = 0.0  # of all its steps, at the beginning

    def hold(self, now: request.Request | None) -> bool:
        """Whether a request is at such a step; outside one its caller says so (`request.keeping`), or it is not."""
        if now is None:
            return request.EXACT.get()
        total = now.steps
        if total is None:
            return now.step < self.steps
        return now.step < max(self.steps, math.ceil(self.share * total)) or now.step >= total - self.steps


@contextmanager
def exact_ends(ends: Ends) -> Iterator[None]:
    """A denoiser call, exact where its request is at such a step."""
    token = request.EXACT.set(ends.hold(request.current()))
    try:
        yield
    finally:
        request.EXACT.reset(token)
