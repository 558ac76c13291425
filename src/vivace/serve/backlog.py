"""The backlog: jobs that wait for a thread, bounded, the most urgent first."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from vivace.serve.failures import Busy, DeadlineExceeded, Unavailable
from vivace.serve.job import Job
from vivace.serve.model import Mode, Model
from vivace.serve.prepare import Prepared


@dataclass(eq=False, kw_only=True)
class Entry:
    """A waiting job and what it needs."""

    job: Job
    prepared: Prepared
    warm: Prepared | None = None  # what is run before it
    model: Model
    mode: Mode
    along: bool = False  # whether it goes with others of its mode, past those who wait for another
    order: int = field(default_factory=itertools.count().__next__)

    @property
    def video(self) -> bool:
        return self.model.media == "video"


class Backlog:
    """At most `most` waiting jobs. A job is handed out when its model can take its mode; a job that has to wait for
    its model's mode holds back later ones of the same model, so that no mode starves another. When a mode begins, as
    many as there are `places` of those who wait for it go together, unless something more urgent waits: one by one in
    turns with others, none would share a call, and the model would be changed for each.

    A job that an idle thread is on its way to take does not wait: as many as there are idle threads come at once.
    A quarter of the `places` is kept from those who would hold one for long while other `models` could draw: who waits
    until a model is loaded or changed, and videos beside models of pictures, for which a quarter of the waiting places
    is none either. The thread that became idle last is woken first: who asks one thing after another is served by one
    thread, whose memory is warm, and not by each in turn, which keep some each.
    """

    def __init__(self, most: int, *, places: int, models: Collection[Model] = ()) -> None:
        self.most, self.places = most, places
        self._kept = max(1, places // 4) if places > 1 and len(models) > 1 else 0
        self._mixed = self._kept > 0 and len({model.media for model in models}) > 1
        self._taken: set[Entry] = set()
        self._waiting: list[Entry] = []
        self._idle: list[threading.Condition] = []  # of the threads that wait for a job, each its own; all of the lock
        self._coming: set[threading.Condition] = set()  # of those that were woken for a new job and have not looked yet
        self._lock = threading.RLock()
        self._closed = False

    def __len__(self) -> int:
        return max(0, len(self._waiting) - len(self._coming))

    @property
    def idle(self) -> int:
        """Threads that wait for a job."""
        return len(self._idle)

    def put(self, entry: Entry, *, full: Callable[[], Busy]) -> None:
        """Raises Busy when it is full, Unavailable when it is closed."""
        with self._lock:
            if self._closed:
                raise Unavailable("the engine is closing")
            videos = sum(one.video for one in self._waiting)
            crowded = self._mixed and entry.video and videos >= self.most - self.most // 4
            if len(self) >= self.most or crowded:
                raise full()
            self._waiting.append(entry)
            self._waiting.sort(key=lambda one: (-one.job.request.priority, one.order))
            self._coming.update(self._wake(1))

    def take(self) -> Entry | None:
        """The next job that can begin, its model reserved; waits for one. None when the backlog is closed and empty."""
        with self._lock:
            while True:
                entry = self._next()
                if entry is not None:
                    self._waiting.remove(entry)
                    self._taken.add(entry)
                    return entry
                if self._closed and not self._waiting:
                    return None
                mine = threading.Condition(self._lock)
                self._idle.append(mine)
                mine.wait()
                self._coming.discard(mine)

    def done(self, entry: Entry) -> None:
        """What was taken is over, and its model free again."""
        with self._lock:
            self._taken.discard(entry)
            self._wake(len(self._waiting))

    def wake(self) -> None:
        """A model became free, or is loaded."""
        with self._lock:
            self._wake(len(self._waiting))

    def remove(self, job: Job) -> bool:
        """Take a waiting job out; False where it does not wait."""
        with self._lock:
            found = [entry for entry in self._waiting if entry.job is job]
            self._waiting = [entry for entry in self._waiting if entry.job is not job]
            if found:  # it may have held back others
                self._wake(len(self._waiting))
            return bool(found)

    def expire(self) -> None:
        """End the jobs that waited too long."""
        now = time.monotonic()
        with self._lock:
            for entry in list(self._waiting):
                limit = entry.job.request.queue_seconds
                if limit is not None and now - entry.job.created > limit:
                    self.remove(entry.job)
                    entry.job.finish(error=DeadlineExceeded(f"it waited longer than {limit:g} s"))

    def close(self) -> list[Job]:
        """Take no more; the jobs that waited."""
        with self._lock:
            self._closed = True
            left, self._waiting = [entry.job for entry in self._waiting], []
            self._wake(len(self._idle))
            return left

    def _wake(self, most: int) -> list[threading.Condition]:
        """So many threads at most, each to look for a job."""
        woken = [self._idle.pop() for _ in range(min(most, len(self._idle)))]
        for one in woken:
            one.notify()
        return woken

    @property
    def _crowded(self) -> bool:
        """Whether the places that are left are kept from those who hold one for long."""
        return self._kept > 0 and sum(map(self._long, self._taken)) >= self.places - self._kept

    def _long(self, entry: Entry) -> bool:
        """Whether it holds its place for long."""
        return (self._mixed and entry.video) or not entry.model.is_in(entry.mode)

    def _next(self) -> Entry | None:
        held: dict[Model, int] = {}  # with the priority of the first that waits for it
        for entry in self._waiting:
            first = held.get(entry.model)
            if first is not None and not (entry.along and entry.job.request.priority >= first):
                continue
            begins = not entry.model.active
            patient = self._long(entry) and not (begins and not entry.video)
            if not (patient and self._crowded) and entry.model.reserve(entry.mode):
                if begins:
                    self._gather(entry)
                return entry
            held.setdefault(entry.model, entry.job.request.priority)
        return None

    def _gather(self, first: Entry) -> None:
        """Those who go with the first of a mode that begins."""
        alike = [one for one in self._waiting if one.model is first.model and one.mode == first.mode]
        for one in alike[: self.places]:
            one.along = True
