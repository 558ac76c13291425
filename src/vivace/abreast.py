"""Pieces of a block that do not wait for one another, beside one another on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")

ABREAST: ContextVar[bool] = ContextVar("vivace_abreast", default=False)
"""Whether pieces run beside one another: while a graph is recorded that is to have them so."""


@contextmanager
def recorded_abreast(wanted: bool) -> Iterator[None]:
    """Pieces run beside one another for the length of a `with` block, if that is wanted."""
    token = ABREAST.set(wanted)
    try:
        yield
    finally:
        ABREAST.reset(token)


def abreast(pieces: Sequence[Callable[[], T]]) -> list[T]:
    """What the pieces return, in their order.

    In a recording that wants it, every piece but the first has a stream of its own, from here until all are done. A
    piece holds what it reads until then, so that no memory of it is given to another meanwhile.
    """
    if not ABREAST.get() or len(pieces) < 2:
        return [piece() for piece in pieces]
    here = torch.cuda.current_stream()
    sides = _streams(here.device_index, len(pieces) - 1)
    made: list[T] = []
    for side in sides:
        side.wait_stream(here)
    for side, piece in zip(sides, pieces[1:], strict=True):
        with torch.cuda.stream(side):
            made.append(piece())
    first = pieces[0]()
    for side in sides:
        here.wait_stream(side)
    return [first, *made]


@cache
def _streams(device: int, count: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(count))
