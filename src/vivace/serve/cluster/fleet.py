"""The replicas as one engine: the door's application asks a Fleet what it would ask an Engine."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from vivace.errors import InputError
from vivace.serve.admit import admit, model_of
from vivace.serve.cluster.replica import Failed, Taken
from vivace.serve.failures import Busy, DeadlineExceeded, Failure, Unavailable
from vivace.serve.job import Job, Result
from vivace.serve.model import Model, Spec
from vivace.serve.request import Request
from vivace.serve.studio import Health
from vivace.serve.worker import Batch

logger = logging.getLogger(__name__)

TRIES = 3  # replicas that a request may lose before it is given up: it may be what ends them
MARGIN = 30.0  # seconds that a replica gets beyond a request's own limits before it counts as lost


class LostError(Exception):
    """The replica that drew a request is gone."""


class Fleet:
    """Has the replicas behind `handle` draw; lives in the event loop where it is made.

    At most `queue` requests wait for one of the `places` of each replica. `alive` says how many of at most `replicas`
    run.
    """

    def __init__(
        self,
        handle: Any,
        specs: Mapping[str, Spec],
        *,
        queue: int,
        places: int,
        replicas: int,
        alive: Callable[[], int],
    ) -> None:
        self.models = {alias: Model(alias, spec) for alias, spec in specs.items()}
        self.most_queued = queue
        self.most_taken = queue + places * replicas
        self.retried = 0  # times that a request was sent again
        self._draw = handle.options(method_name="draw", stream=True)
        self._places, self._alive = places, alive
        self._waiting: set[Job] = set()
        self._running: dict[Job, int] = {}  # and the process that draws it
        self._recent: deque[float] = deque(maxlen=32)  # seconds that requests ran
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._on_job: Callable[[Job], None] = lambda job: None

    @property
    def queued(self) -> int:
        """Requests that no replica has a place for; one on its way to a free place does not wait."""
        return max(0, len(self._waiting) - max(0, self._alive() * self._places - len(self._running)))

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def unfinished(self) -> int:
        """Requests that are not over, wherever they are."""
        return len(self._waiting) + len(self._running)

    @property
    def drawing(self) -> list[int]:
        """The processes of the replicas that draw something."""
        return sorted(set(self._running.values()))

    def submit(self, request: Request, *, most_pixels: int | None = None) -> Job:
        """Queue a request. Raises InputError for one that cannot be done, Busy for a full queue, Unavailable."""
        job = admit(request, self.models, most_pixels=most_pixels).job
        if self._closing:
            raise Unavailable("the server is closing")
        if self.queued >= self.most_queued:
            raise self.busy()
        self._waiting.add(job)
        work = asyncio.run_coroutine_threadsafe(self._follow(job), self._loop)

        def withdraw(job: Job) -> None:
            # The task may never have begun; the replica ends its part within a step.
            work.cancel()
            self._over(job, error=job.stop)

        job.withdraw, job.ended = withdraw, lambda job: self._on_job(job)
        return job

    def busy(self) -> Busy:
        """What a full queue answers."""
        usual = sum(self._recent) / len(self._recent) if self._recent else 1.0
        wait = max(1.0, usual * len(self._waiting) / (self._places * max(1, self._alive())))
        return Busy(f"{self.most_queued} requests are waiting; try again later", retry_after=wait)

    def model(self, alias: str | None) -> Model:
        """The model of an alias; None: the default one. Raises UnknownModelError."""
        return model_of(self.models, alias)

    def loaded(self, alias: str) -> bool:
        """Whether a replica has the weights of a model."""
        return alias in self.models and self._alive() > 0

    def load(self, *aliases: str) -> None:
        """Nothing: a replica that runs has loaded its models."""

    def health(self) -> Health:
        """Whether requests can be taken now."""
        reasons = [(self._closing, "it is draining"), (self._alive() < 1, "no replica runs")]
        reason = next((text for holds, text in reasons if holds), "")
        return Health(ready=not reason, reason=reason)

    def observe(self, *, batch: Callable[[Batch], None], job: Callable[[Job], None]) -> None:
        """Have every finished job told from now on; the module calls happen elsewhere."""
        self._on_job = job

    def drain(self) -> None:
        """Take no more requests; those that wait fail, those that run go on."""
        self._closing = True
        for job in list(self._waiting):
            job.cancel(Unavailable("the server is closing"))

    async def _follow(self, job: Job) -> None:
        """Have a job drawn, on another replica where one is lost, and end it whatever happens."""
        try:
            self._over(job, await self._result(job))
        except asyncio.CancelledError:
            self._over(job, error=job.stop or Unavailable("the server is closing"))
        except (Failure, InputError) as error:
            self._over(job, error=error)
        except Exception as error:
            logger.error("a request failed on its way", exc_info=error)
            self._over(job, error=Failure("the request failed inside; the log says why"))

    def _over(self, job: Job, result: Result | None = None, *, error: BaseException | None = None) -> None:
        self._waiting.discard(job)
        self._running.pop(job, None)
        if job.over:
            return
        job.finish(result, error=error)
        if result is not None and job.started is not None and job.finished is not None:
            self._recent.append(job.finished - job.started)

    async def _result(self, job: Job) -> Result:
        waits, runs = job.request.queue_seconds, job.request.run_seconds
        # Of all tries together: a client waits no longer because replicas were lost.
        ends = None if runs is None else self._loop.time() + (waits or 0) + runs
        for number in range(TRIES):
            try:
                return await self._attempt(job, ends=ends)
            except (LostError, Unavailable) as error:
                logger.warning("%s on replica %d for %s", error, number + 1, job.id)
                self._running.pop(job, None)
                if self._closing:
                    break
                self.retried += 1
                self._waiting.add(job)
        raise Unavailable("the replicas that drew it were lost; ask again")

    async def _attempt(self, job: Job, *, ends: float | None) -> Result:
        """One replica's result. Raises LostError where the replica is gone, and the job's own failure.

        `ends` is when the time of all tries is over, by the loop's clock.
        """
        left = None if ends is None else ends - self._loop.time()
        if left is not None and left <= 0:
            raise DeadlineExceeded("its time was over before a replica had drawn it; those that had begun were lost")
        waits, runs = _least(job.request.queue_seconds, left), _least(job.request.run_seconds, left)
        # Settled, so that every try draws the same.
        request = replace(job.request, seed=job.seed, queue_seconds=waits, run_seconds=runs)
        told = self._draw.remote(request)
        try:
            async with asyncio.timeout(waits) as limit:
                async for event in told:
                    if isinstance(event, Taken):
                        self._begin(job, event)
                        limit.reschedule(None if ends is None else ends + MARGIN)
                    elif isinstance(event, Result):
                        return event
                    elif isinstance(event, Failed):
                        raise event.error
                    else:
                        job.tell(event)
            raise LostError("a replica ended without a result")
        except TimeoutError:
            if job in self._waiting:
                raise DeadlineExceeded(f"it waited longer than {waits:g} s") from None
            raise LostError("a replica gives no answer") from None
        except BackPressureError:
            raise self.busy() from None
        except RayTaskError:
            raise
        except (RayError, RayServeException) as error:
            raise LostError(f"a replica was lost ({type(error).__name__})") from None
        finally:
            told.cancel()

    def _begin(self, job: Job, taken: Taken) -> None:
        self._waiting.discard(job)
        self._running[job] = taken.pid
        job.begin()


def _least(limit: float | None, left: float | None) -> float | None:
    """The earlier of two limits, either of which may be none."""
    return min((one for one in (limit, left) if one is not None), default=None)
