"""Pyramid attention broadcast (arXiv 2408.12588): attention's outputs are used again at the next steps.

Cross-attention changes least and is reused longest. What is kept is the output of each attention module, so this needs
the stock blocks; fused ones do not call these modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.cache.policy import Holds, Policy

if TYPE_CHECKING:
    import torch

    from vivace.cache.call import Call
    from vivace.passes.target import Target


@dataclass(eq=False)
class Memory:
    """Attention module -> its last computed output."""

    outputs: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Broadcast:
    """What the attention modules of one denoiser call are to do: reuse by kind, and the outputs."""

    reuse: dict[str, bool]  # kind -> whether to reuse
    outputs: dict[str, Any]
    reused: bool = False

    def __call__(self, name: str, kind: str, compute: Callable[[], Any]) -> Any:
        """The output of the attention module `name`."""
        if self.reuse[kind] and name in self.outputs:
            self.reused = True
            return self.outputs[name]
        out = self.outputs[name] = compute()
        return out


_ACTIVE: ContextVar[Broadcast | None] = ContextVar("vivace_broadcast", default=None)


@dataclass(frozen=True, kw_only=True)
class PAB(Policy):
    """Compute attention only at every n-th step, in the middle of the run."""

    name: ClassVar[str] = "pab"
    modules: ClassVar[bool] = True
    holds: ClassVar[Holds] = Holds(attentions=1)

    self_every: int = 2
    """One step in so many computes self-attention (and joint attention)."""

    cross_every: int = 3
    """One step in so many computes cross-attention."""

    warmup: int = 5
    """Steps at the beginning that are always computed."""

    cooldown: int = 5
    """Steps at the end that are always computed."""

    least: ClassVar = {"self_every": 1, "cross_every": 1}

    def refuses(self, target: Target) -> str | None:
        for denoiser in target.denoisers.values():
            found = list(attentions(denoiser))
            if not found:
                return "pab found no attention modules of diffusers' in this model; use firstblock, or planned"
            hooked = [name for name, module in found if "forward" in vars(module)]
            if hooked:
                return f"{hooked[0]} carries a hook, which pab would have to stand behind; remove sequential offload"
        return None

    def fresh(self) -> Memory:
        return Memory()

    def serve(self, memory: Memory, call: Call) -> Any:
        active = self.warmup <= call.step and call.left >= self.cooldown
        place = call.step - self.warmup
        every = {"self": self.self_every, "cross": self.cross_every}
        broadcast = Broadcast({kind: active and place % n != 0 for kind, n in every.items()}, memory.outputs)
        # Not through a graph: what it reuses is no argument of the call.
        out = call.apart(partial(_served_by, broadcast, call.forward))
        call.skipped = broadcast.reused
        return out


def _served_by(broadcast: Broadcast, forward: Callable[..., Any], /, **kwargs: Any) -> Any:
    token = _ACTIVE.set(broadcast)
    try:
        return forward(**kwargs)
    finally:
        _ACTIVE.reset(token)


def attentions(denoiser: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The attention modules of a denoiser, by name."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    for name, module in denoiser.named_modules():
        if isinstance(module, Attention | AttentionModuleMixin):
            yield name, module


def broadcasting(name: str, module: torch.nn.Module) -> dict[str, Any]:
    """Members of a class that asks the broadcast of its call, where there is one, before it computes."""
    stock = type(module)
    kind = "cross" if getattr(module, "is_cross_attention", False) else "self"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        active = _ACTIVE.get()
        if active is None:
            return stock.forward(self, *args, **kwargs)
        return active(name, kind, lambda: stock.forward(self, *args, **kwargs))

    return {"forward": forward}
