"""Policies that decide step by step, within a window: the first and last steps are always computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vivace.cache.policy import Policy

if TYPE_CHECKING:
    from vivace.cache.call import Call


@dataclass(frozen=True, kw_only=True)
class Windowed(Policy):
    """A policy with steps at either end that are computed in any case, and a limit to skipping in a row."""

    warmup: int = 1
    """Steps at the beginning that are always computed."""

    warmup_every: int = 1
    """Of these, one in so many is; the others where the signal says so."""

    cooldown: int = 0
    """Steps at the end that are always computed."""

    max_skips: int | None = None
    """Steps that may be skipped in a row; None: no limit."""

    least: ClassVar = {"warmup": 1, "warmup_every": 1}

    def forced(self, call: Call, *, skips: int) -> bool:
        """Whether this step is computed whatever the signal says, after `skips` skipped ones in a row."""
        limit = self.max_skips is not None and skips >= self.max_skips
        warming = call.step < self.warmup and call.step % self.warmup_every == 0
        return warming or call.left < self.cooldown or limit
