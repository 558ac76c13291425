"""What the routes of one server share."""

from __future__ import annotations

import asyncio
import json
import logging
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from PIL import Image
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from vivace.serve.failures import Busy, UnknownModelError
from vivace.serve.http.envelope import ApiError, api_error, disk_error
from vivace.serve.http.gauges import Gauges
from vivace.serve.http.links import Links
from vivace.serve.http.settings import Settings
from vivace.serve.http.shelf import Shelf
from vivace.serve.job import Job
from vivace.serve.prepare import fitted
from vivace.serve.request import Request as EngineRequest
from vivace.serve.studio import Studio

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

DECODED = 2  # requests at a time whose pictures are decoded and fitted: few bytes may become many
LOOK = 0.1  # seconds between two looks at whether the client is still there


@dataclass(kw_only=True)
class Server:
    """A studio with everything around it that a request may need."""

    engine: Studio
    settings: Settings
    gauges: Gauges
    links: Links
    shelf: Shelf
    sweeps: list[Callable[[], None]] = field(default_factory=list)  # what lets go of things that are over their time
    interruptible: set[Job] = field(default_factory=set)  # what the A1111 routes make now
    answering: set[str] = field(default_factory=set)  # ids of the API's requests that are not answered to the end
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(DECODED))
    _held: list[weakref.ref[Image.Image]] = field(default_factory=list)  # what requests are made of
    _followed: dict[str, tuple[Job, asyncio.Task[None]]] = field(default_factory=dict)

    def full(self) -> ApiError | None:
        """What a request gets at the door while the queue has no room."""
        return api_error(self.engine.busy()) if self.engine.queued >= self.engine.most_queued else None

    async def fitted(self, wanted: EngineRequest) -> EngineRequest:
        """A request, its pictures of the size that is made. Raises InputError, and Busy where others' leave no room."""
        found = await asyncio.to_thread(fitted, wanted, self.engine.model(wanted.model).source)
        pictures = [*found.images, *([found.mask] if found.mask else [])]
        held = [one for ref in self._held if (one := ref()) is not None]
        if sum(len(one.getbands()) * one.width * one.height for one in (*held, *pictures)) > self.settings.held_bytes:
            wait = self.engine.busy().retry_after
            raise Busy("the pictures of other requests fill the memory; try again later", retry_after=wait)
        self._held = [weakref.ref(one) for one in (*held, *pictures)]
        return found

    def follow(self, name: str, job: Job, work: Coroutine[Any, Any, None]) -> None:
        """Have `work` keep a video job's record until it is over."""
        task = asyncio.create_task(work)
        self._followed[name] = (job, task)
        task.add_done_callback(lambda task: self._followed.pop(name, None))

    def unfollow(self, name: str) -> None:
        """End a video job, if it is not over."""
        job, task = self._followed.pop(name, (None, None))
        if job is not None and task is not None:
            task.cancel()
            job.cancel()

    def sweep(self) -> None:
        """Let go of all that is over its time."""
        for one in self.sweeps:
            try:
                one()
            except OSError as error:  # of a folder, which may be there again the next time
                logger.warning("what is over its time cannot be removed: %s", error.strerror or type(error).__name__)

    async def close(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        """Let go of everything but the engine."""
        followed = [task for _, task in self._followed.values()]
        await asyncio.wait(followed, timeout=self.settings.drain_seconds) if followed else None
        for task in (*tasks, *followed):
            task.cancel()
        await asyncio.gather(*tasks, *followed, return_exceptions=True)
        self.shelf.close()

    def alias(self, asked: str | None, *, media: str) -> str:
        """The alias asked for, or the first of this kind. Raises ApiError or UnknownModelError."""
        kinds = {alias: model.media for alias, model in self.engine.models.items()}
        if asked is None:
            asked = next((alias for alias, kind in kinds.items() if kind == media), None)
            if asked is None:
                raise ApiError(404, f"no model here makes a {media}", code="model_not_found", param="model")
        if asked not in kinds:
            raise UnknownModelError("model", f"no model {asked[:100]!r}; there are {', '.join(kinds)}")
        if kinds[asked] != media:
            raise ApiError(400, f"{asked} makes no {media}", code="invalid_value", param="model")
        return asked


def server_of(request: Request) -> Server:
    return request.app.state.server


def note(request: Request, jobs: Sequence[Job]) -> None:
    """Have the line that the log gets about a request name its jobs."""
    request.state.jobs = [job.id for job in jobs]


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body has to be application/json", code="unsupported_type")
    try:
        # Not `body()`: the request would keep it for as long as it is answered.
        found = json.loads(b"".join([part async for part in request.stream()]))
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return found


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


@asynccontextmanager
async def read_form(request: Request, *, most_files: int, most_fields: int = 64) -> AsyncIterator[FormData]:
    """The body as a form, whose files are there as long as the block lasts. Raises ApiError."""
    if not is_form(request):
        raise ApiError(415, "the body has to be multipart/form-data", code="unsupported_type")
    most_body = server_of(request).settings.most_body
    try:
        form = await request.form(max_files=most_files, max_fields=most_fields, max_part_size=most_body)
    except UnicodeError:  # of a charset that is none for text, which the client chose
        raise ApiError(400, "the form cannot be read in the charset that it names", code="invalid_form") from None
    except HTTPException as error:  # its words are of the form's parts and their limits alone
        raise ApiError(400, f"the form cannot be read: {error.detail}", code="invalid_form") from None
    except OSError as error:  # larger pictures lie in a temporary file while they come in
        raise disk_error(error) from None
    try:
        yield form
    finally:
        await form.close()


async def while_connected(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer of `work`, which is cancelled when the client goes away. Raises ApiError then."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK)
            if not task.done() and await request.is_disconnected():
                raise ApiError(499, "the client went away", code="cancelled")
        return task.result()
    finally:
        task.cancel()
