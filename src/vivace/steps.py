"""Where a running pipeline stands, told step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Step:
    """`done` of `total` steps of picture number `picture` (from 0) of `pictures`."""

    done: int
    total: int
    picture: int
    pictures: int


class Counter:
    """What a pipeline gets from `pipe.progress_bar(...)`: it counts, and tells each step."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self.tell = tell
        self.done = 0
        self.total = 0
        self.over: Iterable[Any] = ()

    def __call__(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Counter:
        self.over = () if iterable is None else list(iterable)
        self.done, self.total = 0, len(self.over) if total is None else total
        self.tell(self.done, self.total)
        return self

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __iter__(self) -> Iterator[Any]:
        for item in self.over:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        """`n` more steps are done."""
        self.done += n
        self.tell(self.done, self.total)


@contextmanager
def counted(
    pipe: DiffusionPipeline, on_step: Callable[[Step], None] | None, *, picture: int, pictures: int
) -> Iterator[Counter]:
    """Tell `on_step` of each step `pipe` does inside the block, in place of diffusers' own bar.

    Every stock pipeline asks `self.progress_bar` for a bar, also those without a step callback, and it is told the true
    number of steps where strength skips some.
    """

    def tell(done: int, total: int) -> None:
        if on_step is not None:
            on_step(Step(done=done, total=total, picture=picture, pictures=pictures))

    counter = Counter(tell)
    vars(pipe)["progress_bar"] = counter
    try:
        yield counter
    finally:
        del vars(pipe)["progress_bar"]
