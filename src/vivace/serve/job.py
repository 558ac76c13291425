"""One submitted request: its state, its events, its result."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vivace.serve.failures import Cancelled, DeadlineExceeded
from vivace.serve.request import Request

if TYPE_CHECKING:
    from PIL import Image

    from vivace.passes.target import Note

Status = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`step` of `total` steps are done."""

    step: int
    total: int
    seconds_left: float | None  # of denoising; None before the first step


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A small picture of what is there after `step` steps."""

    step: int
    picture: Image.Image


Event = Progress | Preview


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a request."""

    pictures: tuple[Image.Image, ...]  # one, or the frames of a video
    effective: Mapping[str, Any]  # what was used: model, preset, seed, steps, size, ...
    timings: Mapping[str, float]  # seconds
    calls: Mapping[str, float]  # denoiser calls, and how many requests shared one on average
    applied: tuple[Note, ...] = ()  # what the accelerations did and left, as the report says it


class Job:
    """A request on its way. Any thread may wait for it, watch it and cancel it; `await job` works too."""

    def __init__(self, request: Request, *, model: str, seed: int) -> None:
        self.id = secrets.token_hex(12)
        self.request = request
        self.model = model  # alias
        self.seed = seed
        self.status: Status = "queued"
        self.created = time.monotonic()
        self.started: float | None = None
        self.finished: float | None = None
        self.error: BaseException | None = None
        self.withdraw: Callable[[Job], None] = lambda job: None  # takes the job from whatever holds it
        self.ended: Callable[[Job], None] = lambda job: None  # told of its end, once
        self.events: list[Event] = []
        self.stop: BaseException | None = None  # why it has to end at the next step
        self._result: Result | None = None
        self._listeners: list[Callable[[], None]] = []
        self._changed = threading.Condition()

    @property
    def over(self) -> bool:
        return self.finished is not None

    def cancel(self, reason: BaseException | None = None) -> None:
        """End it: at once where it waits, within a step where it runs. Does nothing to one that is over."""
        with self._changed:
            if self.over or self.stop is not None:
                return
            self.stop = reason or Cancelled("the job was cancelled")
        self.withdraw(self)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result. Raises its Failure or InputError, or TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.over, timeout):
                raise TimeoutError(f"job {self.id} is {self.status} after {timeout} s")
        if self.error is not None:
            raise self.error
        assert self._result is not None
        return self._result

    def watch(self) -> Iterator[Event]:
        """Its events as they come, from the first one; ends when the job is over."""
        seen = 0
        while True:
            with self._changed:
                while not self.over and len(self.events) == seen:
                    self._changed.wait()
                new, over = self.events[seen:], self.over
            yield from new
            seen += len(new)
            if over:
                return

    def __await__(self) -> Generator[Any, None, Result]:
        return self._wait().__await__()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Its events as they come, from the first one; ends when the job is over, also when it failed."""
        async for event in self.follow():
            if event is not None:
                yield event

    async def follow(self, *, silence: float | None = None) -> AsyncIterator[Event | None]:
        """The same, with None in between whenever nothing came for `silence` seconds."""
        seen = 0
        with self._alarm() as ring:
            while True:
                ring.clear()
                with self._changed:
                    new, over = self.events[seen:], self.over
                for event in new:
                    yield event
                seen += len(new)
                if over and not new:
                    return
                if not over:
                    try:
                        await asyncio.wait_for(ring.wait(), silence)
                    except TimeoutError:
                        yield None

    async def _wait(self) -> Result:
        with self._alarm() as ring:
            while not self.over:
                ring.clear()
                if self.over:
                    break
                await ring.wait()
        return self.result()

    @contextlib.contextmanager
    def _alarm(self) -> Iterator[asyncio.Event]:
        """An event of the running loop, set at every change."""
        loop, ring = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            # The loop may have been closed under a job that outlives it.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ring.set)

        with self._changed:
            self._listeners.append(tell)
        try:
            yield ring
        finally:
            with self._changed:
                self._listeners.remove(tell)

    def check(self) -> None:
        """Raise what should end it: a cancel, or the deadline of its run."""
        if self.stop is not None:
            raise self.stop
        if self.time_left() == 0:
            raise self.late()

    def late(self) -> DeadlineExceeded:
        """What ends it when the time of its run is over."""
        return DeadlineExceeded(f"it ran longer than {self.request.run_seconds:g} s")

    def time_left(self) -> float | None:
        """Until the deadline of its run; None without one."""
        if self.request.run_seconds is None or self.started is None:
            return None
        return max(0.0, self.started + self.request.run_seconds - time.monotonic())

    def begin(self) -> None:
        self._change(lambda: setattr(self, "status", "running"))
        self.started = time.monotonic()

    def tell(self, event: Event) -> None:
        self._change(lambda: self.events.append(event))

    def finish(self, result: Result | None = None, *, error: BaseException | None = None) -> None:
        """Set the outcome, once; later ones are ignored."""

        if error is not None:
            # They would keep the frames and tensors of the whole run alive; also of what was told to be over before.
            error.__traceback__ = error.__cause__ = error.__context__ = None
        first = False

        def end() -> None:
            nonlocal first
            if self.over:
                return
            first = True
            self._result = result
            self.error = error
            self.status = "done" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"
            self.finished = time.monotonic()
            self.withdraw = lambda job: None

        self._change(end)
        if first:
            with contextlib.suppress(Exception):  # a counter that fails is no reason to lose a thread, or an answer
                self.ended(self)

    def _change(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()
            listeners = list(self._listeners)
        for tell in listeners:
            tell()
