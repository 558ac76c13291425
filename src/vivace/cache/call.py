"""One denoiser call as a policy sees it: whole, or in segments that the graph layer may record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from vivace.family import Split, State

if TYPE_CHECKING:
    from vivace.lane import Run


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of one request."""

    times: tuple[float, ...]  # of every step, as the scheduler counts time; Heun and PNDM repeat some
    first: int = 0  # place of the first one in the scheduler's own list: image to image starts late
    scheduler: str = ""  # class name

    @property
    def whole(self) -> int:
        """Steps of the scheduler's own list."""
        return self.first + len(self.times)

    def __len__(self) -> int:
        return len(self.times)


@dataclass(kw_only=True, eq=False)
class Call:
    """One call of the denoiser. A policy asks for what it wants computed, and sets `skipped` where that is not all."""

    step: int  # of this request, from 0
    schedule: Schedule
    kwargs: Mapping[str, Any]
    forward: Callable[..., Any]
    run: Run
    split: Split | None = None
    branch: str | None = None  # as the pipeline calls it: "cond", "uncond"
    batch: int | None = None  # samples that the scheduler steps; None before its first step
    shared: dict[str, Any] = field(default_factory=dict)  # what the branches of this request tell each other
    skipped: bool = False
    first: bool = False  # nothing is remembered of this branch
    check: Callable[..., None] = lambda spared=(): None
    """Raises `Changed` where the denoiser is not what `split` and recordings were made of; `spared` modules may be. A
    segment looks at what it computes with while the device computes, and is thrown away where that has changed. A
    policy that only adds up what it remembers never looks."""

    @property
    def time(self) -> float:
        return self.schedule.times[self.step]

    @property
    def left(self) -> int:
        """Steps after this one."""
        return len(self.schedule) - 1 - self.step

    def whole(self) -> Any:
        """The denoiser's output, computed."""
        self.check()
        return self.run("forward", self.forward, **self.kwargs)

    @property
    def rows(self) -> int:
        """Samples in this call: twice the batch where both halves of guidance are one call."""
        return max(len(t) for t in tree_leaves(dict(self.kwargs)) if isinstance(t, torch.Tensor) and t.ndim > 2)

    def second_half(self) -> Any:
        """The output for the second half of the samples alone."""
        self.check()
        rows = self.rows
        half = tree_map_only(
            torch.Tensor, lambda t: t[rows // 2 :] if t.ndim and len(t) == rows else t, dict(self.kwargs)
        )
        return self.run("forward", self.forward, **half)

    def front(self, depth: int, *, signal: bool = False) -> Front:
        """Everything up to the first `depth` blocks that change the stream, and TeaCache's signal if that is wanted."""
        assert self.split is not None
        name = f"front of {depth}{' and its signal' if signal else ''}"
        if self.first:
            # Since the last request more may have changed than a recording survives.
            self.check()
        try:
            front = Front(**self.run(name, partial(_front, self.split, depth, signal), **self.kwargs))
        except Exception:
            self.check()
            raise
        # All that a skipped step computes with: looking at every weight would take longer than the step.
        self.check([block.module for block in self.split.blocks[front.at :]])
        return front

    def through(self, front: Front, *, to: int) -> Front:
        """The blocks from where `front` stands up to block `to`, not included; what follows looks at them too."""
        assert self.split is not None
        segment = partial(_through, self.split, front.at, to)
        return Front(**self.run(f"blocks {front.at} to {to}", segment, start=front.start, **vars(front.state)))

    def back(self, front: Front) -> Any:
        """The output, by the blocks after `front`."""
        assert self.split is not None
        try:
            return self.run(f"back from {front.at}", partial(_back, self.split, front.at), **vars(front.state))
        finally:
            self.check()

    def apart(self, forward: Callable[..., Any]) -> Any:
        """The output by `forward`, which reads more than the arguments: never recorded."""
        self.check()
        return self.run.apart(forward, **self.kwargs)

    def rest(self, front: Front) -> tuple[Any, torch.Tensor]:
        """The output, by the blocks after `front`, and what these blocks added to the stream."""
        assert self.split is not None
        try:
            return self.run(f"rest from {front.at}", partial(_rest, self.split, front.at), **vars(front.state))
        finally:
            self.check()

    def end(self, state: State) -> Any:
        """The output from a stream as it stands after the last block."""
        assert self.split is not None
        return self.run("end", partial(_end, self.split), **vars(state))


class Front:
    """A call that has come some way: the stream at its start, its state now, and the next block.

    `signal` foretells how much the output changes (`Split.signal`); None unless it was asked for.
    """

    def __init__(
        self, *, start: torch.Tensor, state: Mapping[str, Any], at: int, signal: torch.Tensor | None = None
    ) -> None:
        self.start, self.state, self.at, self.signal = start, State(**state), at, signal

    @property
    def grown(self) -> torch.Tensor:
        """What the blocks so far added to the stream."""
        return self.state.x - self.start


def _front(split: Split, depth: int, signal: bool, **kwargs: Any) -> dict[str, Any]:
    depth = min(depth, len(split.blocks))
    state = split.ready(split.prologue(**kwargs), 0, max(depth, signal))
    start, at, changed = state.x, 0, 0
    seen = split.signal(state) if signal and split.signal is not None else None
    # Blocks that prepare something else than the stream (Wan VACE's control) say nothing about it.
    while changed < depth and at < len(split.blocks):
        before = state.x
        state = split.through(state, at, at + 1)
        changed += state.x is not before
        at += 1
    return {"start": start, "state": vars(state), "at": at, "signal": seen}


def _through(split: Split, at: int, to: int, *, start: torch.Tensor, **state: Any) -> dict[str, Any]:
    # Ready for one block more, which follows: what is kept of such a state is complete.
    ready = split.ready(State(**state), at, to + 1)
    return {"start": start, "state": vars(split.through(ready, at, to)), "at": to}


def _back(split: Split, at: int, **state: Any) -> Any:
    return split.epilogue(split.through(State(**state), at))


def _rest(split: Split, at: int, **state: Any) -> tuple[Any, torch.Tensor]:
    now = split.through(State(**state), at)
    return split.epilogue(now), now.x - state["x"]


def _end(split: Split, **state: Any) -> Any:
    return split.epilogue(State(**state))
