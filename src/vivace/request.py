"""One request: the span of one pipeline call, which the layers around the denoiser share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vivace.host_times import keeping_times
from vivace.one_off import give_class

LAYERS: tuple[tuple[str, str], ...] = (
    ("request", "outermost: what the layers inside remember must begin and end with one picture"),
    ("cache", "outside the graphs: it decides on the host, and declares the segments that they record"),
    ("graphs", "outside the blocks: it replays their kernels, and takes no decision that a replay would freeze"),
    ("blocks", "innermost: the arithmetic"),
)
"""The layers around a denoiser's blocks, outermost first, each with the reason for its place."""

LAYER: ContextVar[str | None] = ContextVar("vivace_layer", default=None)
"""The block that computes at this moment, where someone asked to know (the NaN guard, radial attention)."""


@dataclass(frozen=True)
class Announce:
    """A forward pre-hook by which a block says its name before it computes; fused blocks say it themselves."""

    name: str

    def __call__(self, *call: Any) -> None:
        LAYER.set(self.name)


EXACT: ContextVar[bool] = ContextVar("vivace_exact", default=False)
"""Whether this denoiser call keeps to 16 bit where it could do with less; a recording is of one or the other."""


@dataclass(eq=False)
class Request:
    """What one pipeline call knows about itself. Every thread and every task has its own."""

    step: int = 0  # scheduler steps done so far: an index into this request's timesteps, repeated ones included
    branch: str | None = None  # what the pipeline calls this denoiser call: "cond", "uncond"; None where it is silent
    scheduler: Any = None  # the pipeline's
    times: tuple[float, ...] = ()  # of every step, where there is no scheduler to tell them
    batch: int | None = None  # samples that the scheduler steps; None before its first step
    sample: Any = None  # what its last step made
    memo: dict[Any, Any] = field(default_factory=dict)  # values that hold for the request; dropped when it ends

    @property
    def timesteps(self) -> Any:
        """The scheduler's, a tensor [S], once it knows them; else None."""
        return getattr(self.scheduler, "timesteps", None)

    @property
    def steps(self) -> int | None:
        """How many steps it takes in all, once its scheduler knows; image to image begins within the scheduler's."""
        if self.times:
            return len(self.times)
        if self.timesteps is None:
            return None
        return len(self.timesteps) - (getattr(self.scheduler, "begin_index", None) or 0)


_CURRENT: ContextVar[Request | None] = ContextVar("vivace_request", default=None)


def current() -> Request | None:
    """The request that this thread or task is in, or None: a bare denoiser call."""
    return _CURRENT.get()


@contextmanager
def open_request(*, scheduler: Any = None, times: Sequence[float] = ()) -> Iterator[Request]:
    """A request for the length of a `with` block. For sampling loops of one's own; pipelines open theirs.

    A loop of one's own gives the time of every step as `times`, and sets the request's `step` (and `branch`) itself.
    Nested requests do not see each other; the end also comes on an exception or a cancel.
    """
    request = Request(scheduler=scheduler, times=tuple(times))
    token = _CURRENT.set(request)
    try:
        yield request
    finally:
        _CURRENT.reset(token)
        request.memo.clear()
        request.sample = None


@contextmanager
def keeping(exact: bool) -> Iterator[None]:
    """Whether denoiser calls outside a request keep to 16 bit, for the length of a `with` block.

    For loops of one's own that open no request: its steps would say so, but step caches and memories go with it.
    """
    token = EXACT.set(exact)
    try:
        yield
    finally:
        EXACT.reset(token)


@contextmanager
def within(request: Request | None) -> Iterator[None]:
    """Be in a request that another thread opened, for the length of a `with` block; None: in no request."""
    token = _CURRENT.set(request)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def scope_pipeline(
    pipe: Any,
    *,
    members: dict[str, Any],
    undo: Callable[[Callable[[], None]], Any],
    opening: Callable[[], None] = lambda: None,
) -> None:
    """Give `pipe` a class whose `__call__` opens and closes a Request; `members` are added to that class.

    Undos are handed to `undo`; `opening` is called before each Request.
    """
    stock = type(pipe)

    @functools.wraps(stock.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        opening()
        # Each time, because the user may have put in another scheduler since.
        scheduler = getattr(self, "scheduler", None)
        count_steps(scheduler, undo)
        with open_request(scheduler=scheduler):
            return stock.__call__(self, *args, **kwargs)

    # At once too: what takes hold of `scheduler.step` before the first call must take the one that counts.
    count_steps(getattr(pipe, "scheduler", None), undo)
    undo(give_class(pipe, {"__call__": __call__, **members}))


def count_steps(scheduler: Any, undo: Callable[[Callable[[], None]], Any] = lambda step: None) -> None:
    """Let every `scheduler.step` count in the request it happens in, and know its time without asking the device.

    What is no scheduler is left alone.
    """
    stock = type(scheduler)
    if not hasattr(stock, "step") or getattr(stock, "vivace_counts", False):
        return
    members = keeping_times(stock)
    uncounted = members.get("step", stock.step)

    @functools.wraps(stock.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = uncounted(self, *args, **kwargs)
        if (request := current()) is not None:
            request.step += 1
            sample = kwargs.get("sample", args[2] if len(args) > 2 else None)
            request.batch = None if sample is None else len(sample)
            request.sample = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        return result

    undo(give_class(scheduler, {**members, "step": step, "vivace_counts": True}))
