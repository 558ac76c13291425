"""A fixed mask of steps, and the policies that are one: known before the run, they read nothing from the device.

Only outputs of the denoiser are kept, so that any model runs them, the whole forward is one graph, and memory is a few
latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.cache.policy import Holds, Policy
from vivace.errors import InputError

if TYPE_CHECKING:
    from vivace.cache.call import Call, Schedule
    from vivace.cache.trail import Trail

MOST_STEPS = 10_000  # of one run: a list that a stranger wrote must not fill the memory


@dataclass(frozen=True, kw_only=True)
class Steps(Policy):
    """Compute exactly the steps of a list or mask, and estimate the others from the last computed outputs."""

    name: ClassVar[str] = "steps"
    holds: ClassVar[Holds] = Holds(outputs=3)

    compute: str = ""
    """The steps to compute: `0-9,12,15` from 0, or a mask `1110110` with one digit a step."""

    order: int = 0
    """The estimate: 0 the last computed output, 1 or 2 a polynomial in time through the last two or three."""

    most: ClassVar = {"order": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        read_steps(self.compute)

    def fresh(self) -> Trail:
        from vivace.cache.trail import Trail

        return Trail(self.order + 1)

    def computes(self, step: int, schedule: Schedule) -> bool:
        if is_mask(self.compute) and len(self.compute) != schedule.whole:
            raise InputError(
                f"the mask of cache={self.name!r} has {len(self.compute)} steps and this run has {schedule.whole}; "
                "give one digit for each, or list the steps to compute"
            )
        return step + schedule.first in read_steps(self.compute)

    def serve(self, memory: Trail, call: Call) -> Any:
        return serve_step(self, memory, call, estimate=partial(memory.at, call.time, order=self.order))


def serve_step(policy: Policy, memory: Trail, call: Call, *, estimate: Callable[[], Any]) -> Any:
    """The output of one step, computed and kept, or an estimate; the first of a branch is always computed."""
    if policy.computes(call.step, call.schedule) or not len(memory):
        out = call.whole()
        memory.keep(out, time=call.time)
        return out
    call.skipped = True
    return estimate()


def is_mask(text: str) -> bool:
    """Whether `text` is a mask rather than a list."""
    return len(text) > 2 and set(text) <= {"0", "1"}


def read_steps(text: str) -> frozenset[int]:
    """`0-9,12` or `1110110` -> the steps to compute. Raises InputError."""
    if is_mask(text):
        return frozenset(i for i, digit in enumerate(text) if digit == "1")
    found: set[int] = set()
    for part in text.replace("+", ",").split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(
                f"steps: compute={text!r} is no list of steps; write it like 0-9,12,15 or as a mask like 1110110"
            )
        # Numbers of thousands of digits are not even read.
        low, high = (int(one) if len(one) < 20 else MOST_STEPS for one in (first, last or first))
        if high < low:
            raise InputError(f"steps: compute={text!r} goes from {first} to {last}; write the lower step first")
        if high >= MOST_STEPS:
            raise InputError(
                f"steps: compute names step {last or first}; the last that a run may have is {MOST_STEPS - 1}"
            )
        found |= set(range(low, high + 1))
    return frozenset(found)
