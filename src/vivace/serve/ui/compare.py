"""The same picture made two ways, one after the other, with the time of each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vivace.serve.prepare import fitted
from vivace.serve.ui.draw import State, Studio, failed
from vivace.serve.ui.form import NO_CACHE, Form

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Way:
    """One side: a preset and a step cache."""

    preset: Any
    cache: Any

    @property
    def title(self) -> str:
        return f"{self.preset}" if self.cache in (None, NO_CACHE) else f"{self.preset} + {self.cache}"


async def compare(studio: Studio, form: Form, *, ways: tuple[Way, Way], visitor: str | None) -> AsyncIterator[State]:
    """The states of a comparison: for each side a warm-up of one step, then the picture; last of all both.

    A preset's first call sets things up; a time with that in it would say nothing of the next picture's. So a side is
    one request, which is warmed up where it is drawn: on a cluster two requests may go to two replicas.
    """
    engine, settings = studio.server.engine, studio.server.settings
    made: list[tuple[State, Image.Image]] = []
    try:
        forms = [replace(form, preset=way.preset, cache=way.cache) for way in ways]
        # Both are checked before either is drawn.
        requests = [one.request(studio.server, studio.inputs) for one in forms]
        requests = [await asyncio.to_thread(fitted, one, engine.model(one.model).source) for one in requests]
        seed = requests[0].seed
        for one, way, request in zip(forms, ways, requests, strict=True):
            side = {"side": len(made), "title": way.title}
            job = engine.submit(replace(request, seed=seed, warm=True), most_pixels=settings.most_pixels)
            async for state in studio.follow(job, visitor=visitor):
                warming = state["state"] == "waiting" and not state["ahead"]
                yield {**state, **side, **({"state": "warming"} if warming else {})}
            result = await job
            seed = job.seed  # where it was left open, the second side takes the first one's
            entry = await asyncio.to_thread(studio.entry, job, result, one)
            timings = _of_the_picture(result.timings)
            entry |= {"title": way.title, "seconds": timings["total_s"], "timings": timings}
            made.append((entry, result.pictures[0]))
        (first, one), (second, other) = made
        apart = await asyncio.to_thread(difference, one, other)
        yield {"state": "compared", "sides": [first, second], "difference": apart}
    except Exception as error:
        yield failed(error)


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures' pixels, as a share of the full range; 1 where their sizes differ."""
    import numpy as np

    if one.size != other.size:
        return 1.0
    a, b = (np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in (one, other))
    return float(abs(a - b).mean() / 255)


def _of_the_picture(timings: Mapping[str, float]) -> dict[str, float]:
    """The times without the wait, and the warming up that is a part of it."""
    return {**timings, "queue_s": 0.0, "total_s": round(timings["total_s"] - timings["queue_s"], 4)}
