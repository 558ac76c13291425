"""A picture as the page follows it: a state after each step, then the picture with all that is to be told of it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from vivace.generation.picture import chunks
from vivace.serve.failures import Cancelled
from vivace.serve.http.envelope import api_error
from vivace.serve.http.server import Server
from vivace.serve.job import Job, Preview, Progress, Result
from vivace.serve.prepare import fitted
from vivace.serve.ui.form import Form
from vivace.serve.ui.inputs import Inputs

if TYPE_CHECKING:
    from PIL import Image

THUMB = 320  # pixels of a thumbnail's longer side

State = dict[str, Any]


class Studio:
    """Draws for the page's visitors, and knows which jobs are whose."""

    def __init__(self, server: Server, inputs: Inputs) -> None:
        self.server, self.inputs = server, inputs
        self._jobs: dict[str, set[Job]] = {}  # of a visitor

    def cancel(self, visitor: str | None) -> None:
        """End all that is drawn for a visitor."""
        for job in tuple(self._jobs.get(visitor or "", ())):
            job.cancel()

    async def draw(self, form: Form, *, visitor: str | None) -> AsyncIterator[State]:
        """The states of one picture: waiting, drawing, then done, cancelled or error; the last one stays."""
        try:
            request = form.request(self.server, self.inputs)
            request = await asyncio.to_thread(fitted, request, self.server.engine.model(request.model).source)
            job = self.server.engine.submit(request, most_pixels=self.server.settings.most_pixels)
            async for state in self.follow(job, visitor=visitor):
                yield state
            result = await job
            yield {"state": "done", "picture": await asyncio.to_thread(self.entry, job, result, form)}
        except Exception as error:
            yield failed(error)

    async def follow(self, job: Job, *, visitor: str | None) -> AsyncIterator[State]:
        """The states of a job until it is over. Whoever stops listening ends it."""
        jobs = self._jobs.setdefault(visitor or "", set())
        jobs.add(job)
        # Itself counts among those that wait.
        state: State = {"state": "waiting", "ahead": max(0, self.server.engine.queued - 1)}
        try:
            yield state
            async for event in job:
                if isinstance(event, Preview):
                    state = {**state, "preview": data_uri(event.picture, "JPEG")}
                if isinstance(event, Progress):
                    done = {"step": event.step, "total": event.total, "seconds_left": event.seconds_left}
                    state = {**state, "state": "drawing", **done}
                yield state
        finally:
            job.cancel()
            jobs.discard(job)
            if not jobs:
                self._jobs.pop(visitor or "", None)

    def entry(self, job: Job, result: Result, form: Form) -> State:
        """A finished picture: its address, its thumbnail, and what made it. Of a large one it takes a second."""
        picture, effective = result.pictures[0], dict(result.effective)
        raw = png(picture, prompt=job.request.prompt, effective=effective)
        small = picture.copy()
        small.thumbnail((THUMB, THUMB))
        return {
            "id": job.id,
            "url": self.server.links.add(raw, media_type="image/png"),
            "thumb": data_uri(small, "WEBP"),
            "width": picture.width,
            "height": picture.height,
            "prompt": job.request.prompt,
            "effective": effective,
            "timings": dict(result.timings),
            "calls": dict(result.calls),
            "applied": [{"name": note.name, "done": note.done, "detail": note.detail} for note in result.applied],
            "form": form.plain(seed=job.seed),
        }


def failed(error: BaseException) -> State:
    """The state that says why there is no picture, and in which field the mistake is."""
    if isinstance(error, Cancelled):
        return {"state": "cancelled"}
    known = api_error(error)
    return {"state": "error", "message": known.message, "field": known.param}


def png(picture: Image.Image, *, prompt: str, effective: dict[str, Any]) -> bytes:
    """The file, which says how it was made (`vivace info`)."""
    buffer = io.BytesIO()
    settings = {name: value for name, value in effective.items() if name != "seed"}
    carried = chunks(prompt=prompt, seed=effective["seed"], settings=json.loads(json.dumps(settings, default=str)))
    picture.convert("RGB").save(buffer, "PNG", pnginfo=carried)
    return buffer.getvalue()


def data_uri(picture: Image.Image, kind: str) -> str:
    """A small picture inside the page."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, kind, quality=80)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
