"""MagCache (arXiv 2506.09045): the residual's magnitude follows a law of the model, which tells when to compute.

Each step's magnitude, relative to the step before, is known from one calibrated run. Products of these ratios since
the last computed step say how far its residual is off; steps are skipped while the errors add up to little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.cache.policy import Holds, Policy

if TYPE_CHECKING:
    import torch

    from vivace.cache.call import Call
    from vivace.passes.target import Target


@dataclass(eq=False)
class Memory:
    """Since the last computed step: product of ratios, error, steps; and what the blocks added at it."""

    ratio: float = 1.0
    error: float = 0.0
    skips: int = 0
    rest: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MagCache(Policy):
    """Skip while the known ratios of residual magnitudes add up to a small error."""

    name: ClassVar[str] = "magcache"
    blocks: ClassVar[bool] = True
    stacked: ClassVar[bool] = True
    holds: ClassVar[Holds] = Holds(hiddens=1)

    ratios: tuple[float, ...] = ()
    """Magnitude of every step's residual over the step before; other numbers of steps take the nearest."""

    threshold: float = 0.06
    """Error that may add up until a step is computed."""

    max_skips: int = 3
    """Steps that may be skipped in a row."""

    retain: float = 0.2
    """Share of the steps, at the beginning, that is always computed."""

    most: ClassVar = {"retain": 1}

    def refuses(self, target: Target) -> str | None:
        return None if self.ratios else "magcache needs ratios=, one a step, from a calibrated run of the model"

    def fresh(self) -> Memory:
        return Memory()

    def serve(self, memory: Memory, call: Call) -> Any:
        steps = len(call.schedule)
        if call.step >= int(self.retain * steps + 0.5):
            memory.ratio *= nearest(self.ratios, steps)[call.step]
            memory.skips += 1
            memory.error += abs(1 - memory.ratio)
            if memory.rest is not None and memory.error <= self.threshold and memory.skips <= self.max_skips:
                front = call.front(0)
                call.skipped = True
                front.state.x = front.state.x + memory.rest
                return call.end(front.state)
            memory.ratio, memory.error, memory.skips = 1.0, 0.0, 0
        out, memory.rest = call.rest(call.front(0))
        return out


def nearest(values: Sequence[float], length: int) -> list[float]:
    """`values` at `length` places from the first to the last, each the nearest there is."""
    if length == len(values):
        return list(values)
    if length == 1:
        return [values[-1]]
    scale = (len(values) - 1) / (length - 1)
    return [values[round(i * scale)] for i in range(length)]
