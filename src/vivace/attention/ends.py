"""16-bit attention for the first and last steps of a request, where the chosen backend is not exact.

The first steps lay out a picture and the last ones finish its texture; both show errors that the middle forgives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

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


@contextmanager
def exact_ends(steps: int) -> Iterator[None]:
    """A denoiser call, exact where it is among the first or last `steps` of its request."""
    token = request.EXACT.set(at_an_end(request.current(), steps))
    try:
        yield
    finally:
        request.EXACT.reset(token)


def at_an_end(now: request.Request | None, steps: int) -> bool:
    """Whether a request is in its first or last `steps` steps; a call outside a request is not."""
    if now is None:
        return False
    total = now.steps
    return now.step < steps or (total is not None and now.step >= total - steps)
