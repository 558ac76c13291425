"""The seconds that a bench may take, and what is known of how long its next part would."""

from __future__ import annotations

import time
from collections.abc import Sequence

from vivace.errors import InputError
from vivace.serve.request import Request

MARGIN = 1.1  # how much longer than the part before the next one is taken to last: a machine drifts


class Spent(Exception):
    """What comes next would outlast the budget; `seconds` is what it is expected to take."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"about {seconds:.0f} s more")
        self.seconds = seconds


class NoTime(InputError):
    """A budget in which nothing at all can be measured."""


class Allowance:
    """A budget in seconds (None: no end) since `began`, which is now, and the pace of each server, in seconds a
    denoising step."""

    def __init__(self, seconds: float | None, *, began: float | None = None) -> None:
        self.seconds = seconds
        self.cut = False  # whether somebody was refused because it was over
        self._began = time.monotonic() if began is None else began
        self._paces: dict[str, float] = {}

    @property
    def taken(self) -> float:
        return time.monotonic() - self._began

    def learn(self, server: str, requests: Sequence[Request], *, seconds: float) -> None:
        """A server took so long for these."""
        self._paces[server] = seconds / _steps(requests)

    def expected(self, server: str, requests: Sequence[Request]) -> float:
        """The seconds that a server will take for these; none where it has not been asked yet: `check` ends it."""
        return MARGIN * self._paces.get(server, 0.0) * _steps(requests)

    def need(self, server: str, requests: Sequence[Request], *, more: float = 0.0) -> None:
        """Raises Spent where these, with `more` seconds of something else, would end after the budget does."""
        needed = more + self.expected(server, requests)
        if self.seconds is not None and self.taken + needed > self.seconds:
            raise Spent(needed)

    def check(self) -> None:
        """Raises Spent where the budget is over: for who is about to make one more picture."""
        if self.seconds is not None and self.taken > self.seconds:
            self.cut = True
            raise Spent(0.0)


def _steps(requests: Sequence[Request]) -> int:
    return sum(request.steps or 1 for request in requests)
