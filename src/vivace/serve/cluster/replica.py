"""A replica: an engine in a process of Ray's, with a GPU of its own, and what it tells the door of a request."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

from vivace.errors import InputError
from vivace.serve.cluster.inside import stay_inside
from vivace.serve.failures import Failure
from vivace.serve.http.app import FIRST
from vivace.serve.http.log import configure
from vivace.serve.http.run import LOST
from vivace.serve.job import Preview, Progress, Result
from vivace.serve.plan import read_plan
from vivace.serve.request import Request

logger = logging.getLogger(__name__)

TELL = 0.25  # seconds between two messages about the progress of one request: each costs both sides a millisecond


@dataclass(frozen=True)
class Taken:
    """The replica has the request, and is this process."""

    pid: int


@dataclass(frozen=True)
class Failed:
    """It will have no result, for this reason: as a value, since Ray would wrap what is raised."""

    error: Failure | InputError


Told = Taken | Progress | Preview | Result | Failed


class Replica:
    """Draws requests, several at a time. Before it counts as ready its weights are loaded, and for the page a picture
    is drawn, from which the previews are learned.
    """

    def __init__(self, plan: dict[str, object]) -> None:
        configure()
        stay_inside()
        wanted = read_plan(plan)
        # What waits, waits at the door: a request that is here has its place.
        self.engine = wanted.engine()
        self.engine.load()
        if wanted.ui:
            with suppress(Failure, InputError):
                self.engine.submit(FIRST).result()
        self.outcomes: Counter[str] = Counter()
        self.engine.observe(batch=lambda batch: None, job=lambda job: self.outcomes.update([job.status]))

    async def ended(self) -> dict[str, int]:
        """How many of its requests were done, cancelled, failed. Ray answers when one of its places is free."""
        return dict(self.outcomes)

    async def draw(self, request: Request) -> AsyncIterator[Told]:
        """What happens to a request, up to its result; ending the iteration early ends it within a step."""
        try:
            job = self.engine.submit(request)
        except (Failure, InputError) as error:
            yield Failed(error)
            return
        try:
            yield Taken(os.getpid())
            told = time.monotonic()
            async for event in job:
                now = time.monotonic()
                if isinstance(event, Progress) and now - told < TELL:
                    continue
                told = now
                yield event
            yield await job
        except (Failure, InputError) as error:
            yield Failed(error)
        finally:
            job.cancel()

    async def check_health(self) -> None:
        """Ray asks now and then. A device that is lost or does not answer comes back with a new process only.

        It ends this one at once, since what it holds would wait for nothing: the door has it drawn elsewhere.
        """
        # Requests that are too large for the memory are no reason: their like would end one replica after another.
        if self.engine.lost or self.engine.stuck:
            logger.error("ending this replica: %s", self.engine.health().reason)
            os._exit(LOST)

    async def __del__(self) -> None:
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.close(timeout=1.0)
