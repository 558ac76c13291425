"""DeepCache (arXiv 2312.00858): a UNet's deep features change slowly, so most steps run only its outermost levels.

Every `interval`-th step computes everything and keeps the stream where it enters the last `levels` up blocks. The
others run as many down blocks, for their skips, and these up blocks on the stream that was kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.cache.policy import Holds, Policy

if TYPE_CHECKING:
    import torch

    from vivace.cache.call import Call
    from vivace.passes.target import Target


@dataclass(eq=False)
class Memory:
    """The stream in front of the last up blocks, and how many skips these take."""

    deep: torch.Tensor | None = None
    skips: int = 0


@dataclass(frozen=True, kw_only=True)
class DeepCache(Policy):
    """Compute a UNet's inner levels only now and then."""

    name: ClassVar[str] = "deepcache"
    blocks: ClassVar[bool] = True
    holds: ClassVar[Holds] = Holds(hiddens=1)

    interval: int = 3
    """One step in so many computes everything."""

    levels: int = 1
    """Down blocks, and as many up blocks, that always run."""

    least: ClassVar = {"interval": 1, "levels": 1}

    def refuses(self, target: Target) -> str | None:
        family = target.family
        if family is None or "up_blocks" not in family.blocks:
            return "deepcache needs a UNet's down and up blocks; use firstblock, or planned"
        levels = min(len(list(d.get_submodule("down_blocks").children())) for d in target.denoisers.values())
        return None if self.levels < levels else f"deepcache: levels={self.levels} is all this UNet has ({levels})"

    def fresh(self) -> Memory:
        return Memory()

    def serve(self, memory: Memory, call: Call) -> Any:
        assert call.split is not None
        up = len(call.split.blocks) - self.levels
        front = call.front(0)
        if memory.deep is None or call.step % self.interval == 0:
            front = call.through(front, to=up)
            memory.deep, memory.skips = front.state.x, len(front.state.skips)
            return call.back(front)
        call.skipped = True
        front = call.through(front, to=self.levels)
        front.at = up
        # The down blocks also left skips for the up blocks that are not run.
        front.state.x, front.state.skips = memory.deep, front.state.skips[: memory.skips]
        return call.back(front)
