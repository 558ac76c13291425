"""The same picture made two ways, one after the other, with the time of each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vivace.serve.request import Request
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
    """The states of a comparison: for each side a warm-up of one step, then the picture; last of all both."""
    engine, settings = studio.server.engine, studio.server.settings
    made: list[tuple[State, Image.Image]] = []
    try:
        forms = [replace(form, preset=way.preset, cache=way.cache) for way in ways]
        # Both are checked before either is drawn.
        requests = [one.request(studio.server, studio.inputs) for one in forms]
        seed = requests[0].seed
        for one, way, request in zip(forms, ways, requests, strict=True):
            side = {"side": len(made), "title": way.title}
            # A preset's first call sets things up; a time with that in it would say nothing of the next picture's.
            async for _ in studio.follow(warm := engine.submit(_warmed(request)), visitor=visitor):
                yield {"state": "warming", **side}
            await warm
            job = engine.submit(replace(request, seed=seed), most_pixels=settings.most_pixels)
            async for state in studio.follow(job, visitor=visitor):
                yield {**state, **side}
            result = await job
            seed = job.seed  # where it was left open, the second side takes the first one's
            entry = await asyncio.to_thread(studio.entry, job, result, one)
            entry |= {"title": way.title, "seconds": _seconds(result.timings)}
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


def _warmed(request: Request) -> Request:
    # Of an edit's steps only the share `strength` is taken: of one step that would be none.
    strength = None if request.strength is None else 1.0
    return replace(request, steps=1, strength=strength, seed=0, previews=0)


def _seconds(timings: Any) -> float:
    """From the first text to the picture, without the wait."""
    return round(timings["total_s"] - timings["queue_s"], 4)
