"""The engine: takes requests, runs each in a thread on its model's stock pipeline, batches what they compute.

Knows nothing of HTTP.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vivace.errors import InputError
from vivace.load import resolve_dtype
from vivace.memory import heap
from vivace.serve.admit import admit, model_of
from vivace.serve.backlog import Backlog, Entry
from vivace.serve.causes import named, public
from vivace.serve.failures import Busy, OutOfMemory, Unavailable
from vivace.serve.gather import Gather
from vivace.serve.job import Job, Result
from vivace.serve.model import Model, Spec, lane_of
from vivace.serve.request import Request
from vivace.serve.room import Room
from vivace.serve.run import Run
from vivace.serve.studio import Health
from vivace.serve.worker import Batch, Worker, fatal, out_of_memory

logger = logging.getLogger(__name__)

LOST_TO_MEMORY = 3  # requests in a row that run out of memory before the engine counts as unwell
REST = 60.0  # seconds that it then does: who asks whether it is ready sends it nothing that could show that it is well

CLOCK = 0.1  # seconds between two looks at who waited too long
TIDY = 60.0  # seconds after which memory that requests freed goes back to the system


class Engine:
    """Runs requests on one or several models.

    `models` maps an alias to what `vivace.load` takes, to a pipeline, or to a Spec; the first alias is the default.
    `threads` requests run at a time and `queue` more may wait; where there are models of pictures and of videos, videos
    leave the pictures a quarter of both. `batch` requests at most share a call. `memory` is the most bytes of weights
    that stay loaded, `parked` of those that wait in host memory instead (None: half of what is free there). `stale` is
    how many seconds a single call may take before the engine counts as unwell. `gather` makes what decides, for one
    device, how long calls wait for others to share them. Raises InputError for a model that cannot be one, or not on
    this machine.
    """

    def __init__(
        self,
        models: Mapping[str, Any] | None = None,
        *,
        queue: int = 64,
        threads: int = 16,
        batch: int = 16,
        memory: int | None = None,
        parked: int | None = None,
        stale: float = 300.0,
        gather: Callable[[], Gather] | None = None,
    ) -> None:
        least = {"queue": (queue, 1), "threads": (threads, 1), "batch": (batch, 1), "memory": (memory, 0)}
        for name, (value, low) in {**least, "parked": (parked, 0), "stale": (stale, 0)}.items():
            if value is not None and value < low:
                raise InputError(f"{name} is {value}; an engine takes {low} or more")
        given = models or {"builtin": "builtin"}
        if not isinstance(given, Mapping):
            raise InputError(
                f"models is {given!r:.100}; give aliases with their models, as in {{'sdxl': '~/models/sdxl'}}"
            )
        self.models = {alias: Model(alias, _spec(what)) for alias, what in given.items()}
        _check_apart(self.models)
        for model in self.models.values():
            resolve_dtype(model.spec.dtype, model.device)  # said now, not by the first request
        self.room, self.stale = Room(device=memory, host=parked), stale
        self._batch, self._gather = batch, gather
        self._on_batch: Callable[[Batch], None] = lambda batch: None
        self._on_job: Callable[[Job], None] = lambda job: None
        self._backlog = Backlog(queue, places=threads, models=self.models.values())
        self.workers: dict[torch.device, Worker] = {}  # of the devices that were computed on so far
        self._running: set[Job] = set()
        self._preparing: set[Job] = set()  # of these, those whose model is loaded or changed for them
        self._recent: deque[float] = deque(maxlen=32)  # seconds that requests ran
        self._lost = 0  # requests in a row that ran out of memory
        self._lost_at = 0.0  # when the last of them did
        self._untidy = False  # whether a request ended since freed memory went back
        self._loading = 0
        self._closing = False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._places = threads
        self._threads = [
            threading.Thread(target=self._serve, name=f"vivace-request-{i}", daemon=True) for i in range(threads)
        ]
        self._threads.append(threading.Thread(target=self._watch_clock, name="vivace-clock", daemon=True))
        for thread in self._threads:
            thread.start()
        # What still computes when the interpreter is gone ends the process by an abort, whatever its exit code was.
        atexit.register(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def observe(self, *, batch: Callable[[Batch], None], job: Callable[[Job], None]) -> None:
        """Have every module call and every job's end told from now on, in the threads where they happen."""
        self._on_batch, self._on_job = batch, job
        for worker in self.workers.values():
            worker.watch = batch

    @property
    def most_queued(self) -> int:
        return self._backlog.most

    @property
    def most_taken(self) -> int:
        """Requests that there is room for when there are no others, running and waiting."""
        return self._backlog.most + self._places

    @property
    def queued(self) -> int:
        """Requests that wait to begin."""
        return len(self._backlog)

    @property
    def running(self) -> int:
        """Requests that are worked on; one that is over may still be in a call that is computed for nobody."""
        return sum(job.finished is None for job in list(self._running))

    def submit(self, request: Request, *, most_pixels: int | None = None) -> Job:
        """Queue a request. Raises InputError for one that cannot be done, Busy for a full queue, Unavailable.

        `most_pixels`, of all its frames, also holds for a size that the model chooses.
        """
        entry = admit(request, self.models, most_pixels=most_pixels)
        entry.job.withdraw, entry.job.ended = self._withdraw, lambda job: self._on_job(job)
        self._backlog.put(entry, full=self.busy)
        return entry.job

    def busy(self) -> Busy:
        """What a full queue answers."""
        return Busy(f"{self.queued} requests are waiting; try again later", retry_after=self._wait_estimate())

    def model(self, alias: str | None) -> Model:
        """The model of an alias; None: the default one. Raises UnknownModelError."""
        return model_of(self.models, alias)

    def loaded(self, alias: str) -> bool:
        """Whether the weights of a model are where it computes."""
        return self.models[alias].nbytes > 0

    def load(self, *aliases: str) -> None:
        """Load models now rather than at their first request; none named: as many as stay.

        Raises InputError or Failure.
        """
        with self._lock:
            self._loading += 1
        try:
            for model in [self.model(alias) for alias in aliases] or self._first():
                mode = model.mode_of(Request())
                while not model.reserve(mode):
                    self._open()
                    time.sleep(0.05)
                try:
                    model.ready(mode, room=partial(self._room_for, model, self._open), check=self._open)
                except Exception as error:
                    raise self._told(error, model, {"model": model.alias}) from None
                finally:
                    model.leave()
                    self._backlog.wake()
        finally:
            with self._lock:
                self._loading -= 1

    def health(self) -> Health:
        """Whether requests can be taken now."""
        reasons = [
            (self._closing, "it is draining"),
            (self._loading > 0, "a model is being loaded"),
            (all(model.broken for model in self.models.values()), "no model can be loaded"),
            (self.lost, "the device is lost"),
            (self.stuck, "the device does not answer"),
            (self._lost >= LOST_TO_MEMORY and time.monotonic() - self._lost_at < REST, "requests run out of memory"),
        ]
        reason = next((text for holds, text in reasons if holds), "")
        return Health(ready=not reason, reason=reason)

    @property
    def lost(self) -> bool:
        """Whether a device is gone for good; only a new process gets it back."""
        return any(worker.dead for worker in self.workers.values())

    @property
    def stuck(self) -> bool:
        """Whether a device has not answered for longer than a call takes."""
        return any(worker.stale(self.stale) for worker in self.workers.values())

    def drain(self) -> None:
        """Take no more requests; those that wait fail, those that run go on."""
        with self._lock:
            self._closing = True
        for job in self._backlog.close():
            job.finish(error=Unavailable("the engine is closing"))

    def close(self, *, grace: float = 0.0, timeout: float = 10.0) -> None:
        """Drain, give running requests `grace` seconds, cancel the rest, end the threads, for which it waits `timeout`
        seconds at most: what is in the middle of a load cannot be ended, and is given up. The end of the process does
        it too, where nobody did."""
        atexit.unregister(self.close)
        self.drain()
        end = time.monotonic() + grace
        while self._running and time.monotonic() < end:
            time.sleep(0.02)
        for job in list(self._running):
            job.cancel(Unavailable("the engine is closing"))
        self._closed.set()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        for job in list(self._running):
            job.finish(error=Unavailable("the engine is closing"))
        for worker in self.workers.values():
            worker.close(max(0.0, end - time.monotonic()))
        for model in self.models.values():
            model.close()

    def _serve(self) -> None:
        while (entry := self._backlog.take()) is not None:
            self._one(entry)
            # The entry would hold its pictures until the next one comes.
            del entry

    def _watch_clock(self) -> None:
        tidied = time.monotonic()
        while not self._closed.wait(CLOCK):
            self._backlog.expire()
            for job in list(self._preparing):
                if job.time_left() == 0:
                    job.finish(error=job.late())
            for worker in list(self.workers.values()):
                worker.expire()
            if self._untidy and time.monotonic() - tidied > TIDY:
                self._untidy, tidied = False, time.monotonic()
                heap.give_back()

    def _one(self, entry: Entry) -> None:
        job, model = entry.job, entry.model
        with self._lock:
            self._running.add(job)
        result, error = None, None
        try:
            result = self._draw(entry)
        except BaseException as caught:
            error = self._told(caught, model, {"job": job.id})
        finally:
            model.leave()
            for worker in list(self.workers.values()):
                worker.leave(job)
            self._backlog.done(entry)
            with self._lock:
                self._running.discard(job)
                self._untidy = True
                self._lost, self._lost_at = (
                    (self._lost + 1, time.monotonic()) if isinstance(error, OutOfMemory) else (0, 0)
                )
        job.finish(result, error=error)

    def _draw(self, entry: Entry) -> Result:
        job, model = entry.job, entry.model
        job.begin()
        self._preparing.add(job)
        try:
            job.check()
            model.ready(entry.mode, room=partial(self._room_for, model, job.check), check=job.check)
        except InputError as error:
            if out_of_memory(error) or fatal(error):
                raise
            raise named(error, job.request) from None
        finally:
            self._preparing.discard(job)
        self._backlog.wake()  # those of its mode who left a place to other models meanwhile
        run = partial(Run, job, model=model, worker=self._worker(model))
        if entry.warm is not None:
            run(entry.warm, shown=False)()
        started = time.monotonic()
        result = run(entry.prepared)()
        self._recent.append(time.monotonic() - started)
        return result

    def _told(self, error: BaseException, model: Model, facts: Mapping[str, str]) -> BaseException:
        """What the waiting side gets to see. A GPU says in whoever waits for it next what went wrong in a call."""
        return self._worker(model).lose(error) if fatal(error) else public(error, facts)

    def _first(self) -> Iterator[Model]:
        """The models, without those that would drive one out which is loaded already."""
        for alias, model in self.models.items():
            if self.room.fits(model, self.models.values()) or not any(map(self.loaded, self.models)):
                yield model
            else:
                logger.info("%s is loaded at its first request: --memory has no room for all", alias)

    @contextmanager
    def _room_for(self, model: Model, check: Callable[[], None]) -> Iterator[None]:
        try:
            with self.room.made(model, self.models.values(), check=check):
                yield
        finally:
            # Models that had to take a rest from requests take them again.
            self._backlog.wake()

    def _open(self) -> None:
        """Raises Unavailable."""
        if self._closing:
            raise Unavailable("the engine is closing")

    def _withdraw(self, job: Job) -> None:
        if self._backlog.remove(job):
            job.finish(error=job.stop)
            return
        if job in self._preparing:
            # A load may take minutes, and nothing ends it: its thread comes after it.
            job.finish(error=job.stop)
        for worker in list(self.workers.values()):
            worker.withdraw(job)

    def _worker(self, model: Model) -> Worker:
        device = model.device
        with self._lock:
            if device not in self.workers:
                gather = self._gather and self._gather()
                worker = self.workers[device] = Worker(device, most=self._batch, gather=gather, watch=self._on_batch)
                worker.sizes = _sizes
            return self.workers[device]

    def _wait_estimate(self) -> float:
        """Seconds until the queue has moved, from what requests took lately."""
        usual = sum(self._recent) / len(self._recent) if self._recent else 1.0
        return max(1.0, usual * len(self._backlog) / self._places)


def _spec(what: Any) -> Spec:
    """Raises InputError for what is no model."""
    spec = what if isinstance(what, Spec) else Spec(source=str(what) if isinstance(what, Path) else what)
    if isinstance(spec.source, str | Path):
        return spec
    if not hasattr(spec.source, "components"):
        raise InputError(f"{spec.source!r:.100} is no model; give what vivace.load takes, a pipeline, or a Spec")
    if spec.dtype or spec.device:
        raise InputError("a pipeline is served where it is and as it is: move it, and leave out dtype and device")
    if spec.few_step:
        raise InputError("few_step is for models that are loaded; put the student in: vivace.few_step.use_few_step")
    return spec


def _check_apart(models: Mapping[str, Model]) -> None:
    """Raise InputError for pipelines of one denoiser: what one's requests do to it, the other's would get."""
    known: dict[torch.nn.Module, str] = {}
    for alias, model in models.items():
        for name, part in model.denoisers.items():
            if known.setdefault(part, alias) != alias:
                raise InputError(
                    f"{known[part]} and {alias} have the same {name}, which an engine changes as requests want it; "
                    "give it one of them, and ask for presets by quality="
                )


def _sizes(module: torch.nn.Module, size: int) -> int:
    """How many of `size` waiting requests go into one call: a graph is recorded for 1, 2, 4, 8, ... of them."""
    return 1 << (size.bit_length() - 1) if _graphed(module) else size


def _graphed(module: torch.nn.Module) -> bool:
    from vivace.graph import Graphs

    lane = lane_of(module)
    return lane is not None and isinstance(lane.run, Graphs)


__all__ = ["Busy", "Engine", "Health", "InputError"]
