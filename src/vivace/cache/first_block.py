"""First-block cache: the first block tells whether the others are worth computing. Needs no calibration.

As in ParaAttention and diffusers: what the first block adds to the stream is compared with what it added at the last
computed step; where it changed by less than `threshold`, the other blocks add what they added then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.cache.calibration import calibration_of
from vivace.cache.policy import Holds
from vivace.cache.window import Windowed

if TYPE_CHECKING:
    import torch

    from vivace.cache.call import Call
    from vivace.cache.trail import Trail
    from vivace.passes.target import Target


@dataclass(eq=False)
class Memory:
    """Of the last computed steps: what the first block added at the newest, and what the others did."""

    rest: Trail
    added: torch.Tensor | None = None
    skips: int = 0


@dataclass(frozen=True, kw_only=True)
class FirstBlock(Windowed):
    """Skip all but the first block while that one's contribution changes little."""

    name: ClassVar[str] = "firstblock"
    blocks: ClassVar[bool] = True
    probes: ClassVar[bool] = True
    stacked: ClassVar[bool] = True
    holds: ClassVar[Holds] = Holds(hiddens=4)

    threshold: float = 0.1
    """Relative change of what the first block adds, from which the others are computed."""

    depth: int = 1
    """Blocks at the front that are always computed."""

    order: int = 0
    """What the skipped blocks add: 0 as at the last computed step, 1 or 2 extrapolated from the last ones."""

    file: str | None = None
    """A calibration, from `vivace calibrate`, that says the threshold for `computed`; None: `threshold` does."""

    computed: float | None = None
    """Share of the steps to compute, of those that the calibration has; the nearest is taken. None: half of them."""

    least: ClassVar = {**Windowed.least, "depth": 1}
    most: ClassVar = {"order": 2, "computed": 1}

    def refuses(self, target: Target) -> str | None:
        if reason := self.leaves_none(target, "depth"):
            return reason
        if self.file is None:
            return None if self.computed is None else "computed= takes a calibration's threshold; name it with file="
        calibration = calibration_of(target, file=self.file)
        assert calibration is not None
        return None if calibration.firstblock else f"{self.file} has no threshold for firstblock; pass threshold="

    def bind(self, target: Target) -> FirstBlock:
        calibration = calibration_of(target, file=self.file) if self.file else None
        if calibration is None:
            return self
        wanted = 50 if self.computed is None else 100 * self.computed
        percent = min(calibration.firstblock, key=lambda one: abs(one - wanted))
        return replace(self, threshold=calibration.firstblock[percent])

    def fresh(self) -> Memory:
        from vivace.cache.trail import Trail

        return Memory(rest=Trail(self.order + 1))

    def serve(self, memory: Memory, call: Call) -> Any:
        from vivace.cache.change import relative_change

        front = call.front(self.depth)
        added = front.grown
        if (
            memory.added is None
            or self.forced(call, skips=memory.skips)
            or relative_change(added, memory.added) > self.threshold
        ):
            out, rest = call.rest(front)
            memory.rest.keep(rest, time=call.time, own=True)
            memory.added, memory.skips = added, 0
            return out
        call.skipped = True
        memory.skips += 1
        rest = memory.rest.at(call.time, order=self.order) if self.order else memory.rest.newest
        front.state.x = front.state.x + rest
        return call.end(front.state)
