"""DiCache (arXiv 2508.17356): a shallow probe decides, and also says how far the old residuals are to be carried on.

The first `depth` blocks always run. Their output's relative change from step to step adds up to the decision. On a
skip, what all blocks add is extrapolated from the last two computed steps, as far as the probe itself has moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.cache.policy import Holds
from vivace.cache.window import Windowed

if TYPE_CHECKING:
    import torch

    from vivace.cache.call import Call
    from vivace.passes.target import Target


@dataclass(eq=False)
class Memory:
    """The last probe, the change since the last computed step, and of the last two of those probe and whole."""

    probe: torch.Tensor | None = None
    change: float = 0.0
    residuals: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()  # (of the probe, of all blocks), older first
    skips: int = 0


@dataclass(frozen=True, kw_only=True)
class DiCache(Windowed):
    """Skip while a probe of the first blocks changes little, and extrapolate by what the probe shows."""

    name: ClassVar[str] = "dicache"
    blocks: ClassVar[bool] = True
    probes: ClassVar[bool] = True
    stacked: ClassVar[bool] = True
    holds: ClassVar[Holds] = Holds(hiddens=5)

    threshold: float = 0.1
    """Sum of relative changes of the probe's output, from which a step is computed."""

    depth: int = 1
    """Blocks of the probe."""

    retain: float = 0.2
    """Share of the steps, at the beginning, that is always computed."""

    least: ClassVar = {**Windowed.least, "depth": 1}
    most: ClassVar = {"retain": 1}

    def refuses(self, target: Target) -> str | None:
        return self.leaves_none(target, "depth")

    def fresh(self) -> Memory:
        return Memory()

    def serve(self, memory: Memory, call: Call) -> Any:
        from vivace.cache.change import relative_change

        front = call.front(self.depth)
        probe = front.state.x
        if memory.probe is not None:
            memory.change += relative_change(probe, memory.probe)
        memory.probe = probe
        early = call.step <= self.retain * len(call.schedule)
        forced = not memory.residuals or early or self.forced(call, skips=memory.skips)
        if forced or memory.change >= self.threshold:
            out, rest = call.rest(front)
            memory.residuals = (*memory.residuals[-1:], (front.grown, front.grown + rest))
            memory.change, memory.skips = 0.0, 0
            return out
        call.skipped = True
        memory.skips += 1
        front.state.x = front.start + _carried(memory.residuals, front.grown)
        return call.end(front.state)


def _carried(residuals: tuple[tuple[torch.Tensor, torch.Tensor], ...], probe: torch.Tensor) -> torch.Tensor:
    """The residual of all blocks where the probe's residual stands at `probe`."""
    if len(residuals) == 1:
        return residuals[0][1]
    (probe_older, older), (probe_newer, newer) = residuals
    moved, step = (probe - probe_older).abs().mean(), (probe_newer - probe_older).abs().mean()
    # On the device: no host read beside the decision's. A probe that stood still gives 0 / 0, which is no step.
    reach = (moved / step).nan_to_num(1.0).clamp(1.0, 1.5)
    return older + reach * (newer - older)
