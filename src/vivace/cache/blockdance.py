"""BlockDance (arXiv 2503.15927): early blocks, which draw structure, are reused for a step while late blocks run.

In the middle of a run, the first step of every group computes everything and keeps the streams after block `after`;
the others of the group start from those and compute only the blocks behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.cache.policy import Holds, Policy
from vivace.errors import InputError

if TYPE_CHECKING:
    import torch

    from vivace.cache.call import Call
    from vivace.passes.target import Target


@dataclass(eq=False)
class Memory:
    """The streams after the early blocks, at the first step of the group."""

    x: torch.Tensor | None = None
    text: torch.Tensor | None = None
    skips: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockDance(Policy):
    """Reuse the early blocks' result within groups of steps."""

    name: ClassVar[str] = "blockdance"
    blocks: ClassVar[bool] = True
    stacked: ClassVar[bool] = True
    holds: ClassVar[Holds] = Holds(streams=1)

    after: int | None = None
    """Blocks whose result is reused; None: 20, or a third of a smaller model's."""

    group: int = 2
    """Steps of a group, of which the first is computed."""

    begin: float = 0.4
    """Share of the steps after which reuse begins."""

    end: float = 0.95
    """Share of the steps after which it ends."""

    least: ClassVar = {"after": 1, "group": 2}
    most: ClassVar = {"begin": 1, "end": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.begin >= self.end:
            raise InputError(
                f"blockdance: from begin={self.begin:g} to end={self.end:g} there is no step to reuse; give an end "
                "above begin, or no cache"
            )

    def refuses(self, target: Target) -> str | None:
        return None if self.after is None else self.leaves_none(target, "after")

    def fresh(self) -> Memory:
        return Memory()

    def serve(self, memory: Memory, call: Call) -> Any:
        assert call.split is not None
        steps, blocks = len(call.schedule), len(call.split.blocks)
        first = int(self.begin * steps)
        active = first <= call.step < int(self.end * steps)
        if not active:
            memory.x = None
            return call.whole()
        front = call.front(0)
        after = self.after or min(20, max(1, blocks // 3))
        if (call.step - first) % self.group == 0 or memory.x is None:
            front = call.through(front, to=after)
            memory.x, memory.text, memory.skips = front.state.x, front.state.text, front.state.skips
            return call.back(front)
        call.skipped = True
        front.at = after
        front.state.x, front.state.text, front.state.skips = memory.x, memory.text, memory.skips
        return call.back(front)
