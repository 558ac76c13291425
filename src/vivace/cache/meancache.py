"""MeanCache: steps are skipped by a fixed schedule, and their velocity follows from the average velocity before.

Over the last computed steps, from time s to e, the latent moved at the average velocity u = (x_e - x_s) / (e - s).
Its difference from the velocity at s gives half the derivative along the path, by which the last velocity is carried
over the next step. What Euler's method does to the latent is summed up here from the velocities themselves, so that
each guidance branch has its own u. The published schedules are for 50 steps; other numbers take the same places.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.cache.policy import Holds, Policy
from vivace.errors import InputError

if TYPE_CHECKING:
    from vivace.cache.call import Call, Schedule
    from vivace.passes.target import Target

STEPS = 50
"""Of the published schedules."""

SPAN = 6
"""Computed steps that an average velocity may reach back over."""

# Computed steps -> which of the 50, and for every gap between two of them how many computed steps the average velocity
# spans, as (times, span).
SCHEDULES: dict[int, tuple[tuple[int, ...], tuple[tuple[int, int], ...]]] = {
    30: ((*range(20), 24, 28, 32, 36, 40, 43, 45, 47, 48, 49), ((19, 1), (5, 1), (3, 5), (2, 1))),
    25: ((*range(17), 24, 32, 40, 43, 45, 47, 48, 49), ((16, 1), (3, 1), (3, 5), (2, 1))),
    17: ((*range(9), 10, 17, 24, 31, 38, 45, 48, 49), ((8, 1), (1, 2), (5, 1), (1, 4), (1, 1))),
    10: ((0, 1, 3, 7, 14, 21, 28, 35, 42, 49), ((1, 1), (1, 2), (6, 1), (1, 4))),
}


@dataclass(eq=False)
class Memory:
    """The path so far, as sums of velocity times step, and the last computed steps on it."""

    path: list[Any] | None = None  # per tensor of the output
    steps: deque[tuple[float, list[Any], list[Any]]] = field(default_factory=lambda: deque(maxlen=SPAN))
    end: tuple[float, list[Any]] | None = None  # time and path after the last computed step
    spec: Any = None
    dtypes: list[Any] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class MeanCache(Policy):
    """A fixed schedule of computed steps; between them the average velocity is carried on."""

    name: ClassVar[str] = "meancache"
    holds: ClassVar[Holds] = Holds(outputs=2 * SPAN + 2)

    of50: int = 25
    """Which schedule: how many of 50 steps it computes (10, 17, 25 or 30)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of50 not in SCHEDULES:
            raise InputError(f"meancache: of50 is one of {', '.join(map(str, SCHEDULES))}, got {self.of50}")

    def refuses(self, target: Target) -> str | None:
        if target.family is not None and target.family.prediction == "flow":
            return None
        return "meancache carries velocities on, so it needs a flow model; use steps with order=1, or planned"

    def fresh(self) -> Memory:
        return Memory()

    def computes(self, step: int, schedule: Schedule) -> bool:
        return step in rescaled(self.of50, len(schedule))

    def serve(self, memory: Memory, call: Call) -> Any:
        import torch
        from torch.utils._pytree import tree_flatten, tree_unflatten

        spans = rescaled(self.of50, len(call.schedule))
        step = call.schedule.times[call.step + 1] - call.time if call.left else 0.0
        if self.computes(call.step, call.schedule) or memory.end is None:
            out = call.whole()
            leaves, memory.spec = tree_flatten(out)
            if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
                # FLUX.2 hands out the keys and values of its references once: nothing to carry on.
                return out
            memory.dtypes = [leaf.dtype for leaf in leaves]
            leaves = [leaf.float().clone() for leaf in leaves]
            memory.path = memory.path or [leaf.new_zeros(()) for leaf in leaves]
            memory.steps.append((call.time, memory.path, leaves))
            memory.path = [sum_ + leaf * step for sum_, leaf in zip(memory.path, leaves, strict=True)]
            memory.end = (call.time + step, memory.path)
            return out
        call.skipped = True
        before = max((place for place in spans if place < call.step), default=0)
        leaves = _carried(memory, span=spans.get(before, 1), step=step)
        assert memory.path is not None
        memory.path = [sum_ + leaf * step for sum_, leaf in zip(memory.path, leaves, strict=True)]
        return tree_unflatten([v.to(d) for v, d in zip(leaves, memory.dtypes, strict=True)], memory.spec)


def rescaled(of50: int, steps: int) -> dict[int, int]:
    """The steps of a run of `steps` that are computed -> how many of those the average velocity spans after each."""
    places, runs = SCHEDULES[of50]
    spans = [span for times, span in runs for _ in range(times)]
    scale = (steps - 1) / (STEPS - 1)
    # Where several places fall on one step, the last one says what follows it.
    return {round(place * scale): span for place, span in zip(places, [*spans, 1], strict=True)}


def _carried(memory: Memory, *, span: int, step: float) -> list[Any]:
    """The velocity for a step of `step` in time, by the average over the last `span` computed steps."""
    assert memory.end is not None
    start, before, first = memory.steps[-min(span, len(memory.steps))]
    end, after = memory.end
    last = memory.steps[-1][2]
    if end == start:
        # Whoever gets an output may write into it.
        return [velocity.clone() for velocity in last]
    found = []
    for low, high, v, newest in zip(before, after, first, last, strict=True):
        average = (high - low) / (end - start)
        found.append(newest - (v - average) / (end - start) * step)
    return found
