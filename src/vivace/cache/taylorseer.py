"""TaylorSeer (arXiv 2503.06923) on the denoiser's output: full steps at an interval, the others from a Taylor series.

Derivatives are differences over the distance in steps between full steps, as in the paper. On the output rather than
on every module: the same prediction for the memory of a few latents (diffusers calls it the lite mode).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.cache.policy import Holds, Policy

if TYPE_CHECKING:
    import torch

    from vivace.cache.call import Call, Schedule


@dataclass(eq=False)
class Memory:
    """The last full step and, of every tensor of its output, the value and its derivatives."""

    step: int | None = None
    factors: list[list[torch.Tensor]] = field(default_factory=list)  # per tensor, by order, in fp32
    dtypes: list[torch.dtype] = field(default_factory=list)
    spec: Any = None


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Policy):
    """Compute every `interval`-th step, and predict the others."""

    name: ClassVar[str] = "taylorseer"
    holds: ClassVar[Holds] = Holds(outputs=3)

    interval: int = 5
    """One step in so many is computed."""

    warmup: int = 3
    """Steps at the beginning that are always computed."""

    cooldown: int = 0
    """Steps at the end that are always computed."""

    order: int = 1
    """Highest derivative used; 1 is the safest."""

    least: ClassVar = {"interval": 1, "warmup": 1}
    most: ClassVar = {"order": 2}

    def fresh(self) -> Memory:
        return Memory()

    def computes(self, step: int, schedule: Schedule) -> bool:
        ending = len(schedule) - 1 - step < self.cooldown
        return step < self.warmup or (step - self.warmup - 1) % self.interval == 0 or ending

    def serve(self, memory: Memory, call: Call) -> Any:
        import torch
        from torch.utils._pytree import tree_flatten, tree_unflatten

        if memory.step is None or self.computes(call.step, call.schedule):
            out = call.whole()
            leaves, memory.spec = tree_flatten(out)
            if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
                # FLUX.2 hands out the keys and values of its references once: nothing to add up.
                return out
            memory.factors = self._differences(leaves, memory, call.step)
            memory.dtypes, memory.step = [leaf.dtype for leaf in leaves], call.step
            return out
        call.skipped = True
        distance = call.step - memory.step
        leaves = [_series(f, distance).to(d) for f, d in zip(memory.factors, memory.dtypes, strict=True)]
        return tree_unflatten(leaves, memory.spec)

    def _differences(self, leaves: list[torch.Tensor], memory: Memory, step: int) -> list[list[torch.Tensor]]:
        """Value and derivatives of every tensor: in fp32, as differences of near values lose all digits of bf16."""
        found = []
        for place, leaf in enumerate(leaves):
            series = [leaf.float().clone()]
            for older in memory.factors[place][: self.order] if memory.step is not None else ():
                series.append((series[-1] - older) / (step - (memory.step or 0)))
            found.append(series)
        return found


def _series(factors: list[torch.Tensor], distance: int) -> torch.Tensor:
    total = factors[0].clone()
    for order, factor in enumerate(factors[1:], start=1):
        total.add_(factor, alpha=distance**order / math.factorial(order))
    return total
