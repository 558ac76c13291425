"""The segments of one denoiser call that has a step cache, run by the worker: what is skipped is in nobody's batch.

The cache decides in the request's own thread, with what it remembers of this request alone. What it wants computed goes
to the worker, where the same segments of other requests, at other steps of theirs, join it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vivace import request
from vivace.serve import layout
from vivace.serve.call import Axes, Cat, Digest, Form, split
from vivace.serve.layout import Layout, Layouts, NoLayout

if TYPE_CHECKING:
    from vivace.lane import Lane
    from vivace.serve.call import Call

logger = logging.getLogger(__name__)

Send = Callable[..., "Call"]
"""Has a segment of the denoiser run by the worker: name, arguments, form, compute, part."""

WHOLE = "forward"
"""The segment from the denoiser's own arguments to its output."""


@dataclass(frozen=True)
class Opening:
    """The form of a front: from the denoiser's own arguments to a state."""

    axes: Axes
    layout: Layout

    def describe(self, kwargs: Mapping[str, Any], *, digest: Digest) -> tuple[Hashable, int] | None:
        """See Form."""
        return self.axes.describe(kwargs, digest=digest)

    def join(self, calls: Sequence[Mapping[str, Any]], *, rows: Sequence[int], cat: Cat) -> dict[str, Any]:
        """See Form."""
        return self.axes.join(calls, rows=rows, cat=cat)

    def split(self, out: Any, *, rows: Sequence[int]) -> list[Any]:
        """See Form."""
        return _split_front(self.layout, out, rows)


@dataclass(frozen=True)
class Middle:
    """The form of a segment from a state on: to a further state, or to the output.

    `origin` says what was equal of the arguments that the state was made of: then so is what has no rows in it.
    """

    kind: str
    layout: Layout
    origin: Hashable
    rows: int

    def describe(self, kwargs: Mapping[str, Any], *, digest: Digest) -> tuple[Hashable, int] | None:
        """See Form."""
        try:
            return (self.origin, layout.describe(dict(self.layout.plan(kwargs)), kwargs)), self.rows
        except (TypeError, KeyError, ValueError, AttributeError):
            return None

    def join(self, calls: Sequence[Mapping[str, Any]], *, rows: Sequence[int], cat: Cat) -> dict[str, Any]:
        """See Form."""
        return layout.join(dict(self.layout.plan(calls[0])), calls)

    def split(self, out: Any, *, rows: Sequence[int]) -> list[Any]:
        """See Form."""
        if self.kind == "blocks":
            return _split_front(self.layout, out, rows)
        if self.kind == "rest":
            grown = layout.split(self.layout.x, out[1], rows=rows)
            return list(zip(split(out[0], rows), grown, strict=True))
        return split(out, rows)


def _split_front(of: Layout, out: Mapping[str, Any], rows: Sequence[int]) -> list[Any]:
    starts = layout.split(of.x, out["start"], rows=rows)
    states = layout.split(dict(of.plan(out["state"])), out["state"], rows=rows)
    signals = split(out.get("signal"), rows)
    parts = zip(starts, states, signals, strict=True)
    return [{"start": start, "state": state, "at": out["at"], "signal": signal} for start, state, signal in parts]


class Segments:
    """Runs the segments of one request's denoiser call on the worker."""

    def __init__(
        self, lane: Lane, *, axes: Axes, digest: Digest, layouts: Layouts, send: Send, alone: bool, end: bool
    ) -> None:
        self._lane, self._axes, self._digest = lane, axes, digest
        self._layouts, self._send, self._alone = layouts, send, alone
        self._end = end  # whether it is among the steps whose attention is exact
        self._front: tuple[Layout, Hashable, int] | None = None  # of the state that is under way

    def __call__(self, name: str, segment: Callable[..., Any], /, **kwargs: Any) -> Any:
        kind = name.partition(" ")[0]
        where = (getattr(segment, "func", None), *map(_identity, getattr(segment, "args", ())), self._end)
        run = partial(self._lane.segment, partial(self._lane.run, name), segment, self._end)
        send = partial(self._send, name, kwargs, part=where)
        if kind == WHOLE:
            return send(form=self._axes, compute=run).out
        if kind == "front" and not self._alone:
            return self._open(where, run, send, kwargs)
        form: Form | None = None
        if self._front is not None:
            of, origin, rows = self._front
            form = Middle(kind, of, origin, rows)
        return send(form=form, compute=run).out

    def apart(self, segment: Callable[..., Any], /, **kwargs: Any) -> Any:
        """Run a segment that reads more than its arguments: for this request alone."""
        run = partial(self._lane.segment, self._lane.run.apart, segment, self._end)
        return self._send("forward", kwargs, part=None, form=None, compute=run).out

    def clear(self) -> None:
        """Nothing is kept here."""

    def _open(self, where: Hashable, run: Callable[..., Any], send: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """A call's front; the first of its kind is computed twice, to see where the rows are."""
        found = self._axes.describe(kwargs, digest=self._digest)
        if found is None:
            return send(form=None, compute=run).out
        origin, rows = (where, found[0]), found[1]
        if origin not in self._layouts:
            out, of = send(form=None, compute=partial(_learn, run, self._axes, rows)).out
            self._layouts.keep(origin, of)
        else:
            of = self._layouts.get(origin)
            out = send(form=Opening(self._axes, of) if of else None, compute=run).out
        self._front = (of, origin, rows) if of else None
        return out


def _learn(run: Callable[..., Any], axes: Axes, rows: int, /, **kwargs: Any) -> tuple[Any, Layout | None]:
    """A front, and the layout of its state where it can be told."""
    out = run(**kwargs)
    try:
        doubled = axes.join([kwargs, kwargs], rows=[rows, rows], cat=lambda name, parts: torch.cat(parts))
        with request.within(request.Request()):
            twice = run(**doubled)
        return out, Layout.of(out["state"], twice["state"], rows=rows)
    except (NoLayout, RuntimeError, MemoryError) as error:
        logger.info("calls between these blocks go alone: %s", error)
        return out, None


def _identity(argument: Any) -> Hashable:
    return argument if isinstance(argument, int) else id(argument)
