"""Where in space and time the tokens of a denoiser call lie, told to the attention inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

Grid = Callable[[Any, Mapping[str, Any]], tuple[int, int, int]]
"""(denoiser, its keyword arguments) -> frames, rows and columns of tokens; in that order they follow each other."""


class SpaceTime(NamedTuple):
    """How the tokens of one denoiser call lie: frame by frame."""

    frames: int
    tokens: int  # of a frame


SPACE_TIME: ContextVar[SpaceTime | None] = ContextVar("vivace_space_time", default=None)


@contextmanager
def arranged(grid: Grid, denoiser: Any, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """A denoiser call whose attention may ask how its tokens lie."""
    frames, rows, columns = grid(denoiser, kwargs)
    token = SPACE_TIME.set(SpaceTime(frames, rows * columns))
    try:
        yield
    finally:
        SPACE_TIME.reset(token)
