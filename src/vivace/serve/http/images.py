"""POST /v1/images/generations and /v1/images/edits."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import JSONResponse, Response, StreamingResponse

from vivace.serve.failures import FieldError
from vivace.serve.http.envelope import ApiError, api_error, in_its_words
from vivace.serve.http.schema import EditOrder, ImageOrder, from_form, read
from vivace.serve.http.server import Server, note, read_form, read_json, server_of, while_connected
from vivace.serve.http.uploads import pictures
from vivace.serve.job import Job, Preview, Progress, Result
from vivace.serve.request import Request as EngineRequest

router = APIRouter()

FILES = ("image", "image[]", "mask")
SEED_SPACE = 2**63
SILENCE = 15.0  # seconds after which a stream says that it is still there: proxies cut what says nothing for a minute


def _body(kind: type[Any], media_type: str, files: dict[str, Any] | None = None) -> dict[str, Any]:
    """The request body of a route's own description."""
    schema = kind.model_json_schema()
    if files:
        schema["properties"] |= files
        schema["required"] = [*schema.get("required", []), "image"]
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


BINARY = {"type": "string", "format": "binary"}


def json_body(kind: type[Any]) -> dict[str, Any]:
    """The JSON body of a route's own description."""
    return _body(kind, "application/json")


@router.post("/v1/images/generations", openapi_extra=json_body(ImageOrder))
async def generations(request: Request) -> Response:
    """Pictures from a prompt."""
    server = server_of(request)
    order: ImageOrder = read(ImageOrder, await read_json(request), server.settings)
    return await _answer(request, order, first_of(request, order), name="image_generation")


@router.post(
    "/v1/images/edits", openapi_extra=_body(EditOrder, "multipart/form-data", {"image": BINARY, "mask": BINARY})
)
async def edits(request: Request) -> Response:
    """Pictures from a prompt and other pictures; what is transparent in the mask is painted anew."""
    order, first = await _edit(request)
    return await _answer(request, order, first, name="image_edit")


async def _edit(request: Request) -> tuple[EditOrder, EngineRequest]:
    """An edit's order and request. Here, so that nothing holds its pictures as they came while it waits."""
    server = server_of(request)
    async with read_form(request, most_files=server.settings.most_files) as form:
        order: EditOrder = from_form(EditOrder, form, server.settings, files=FILES)
        first = first_of(request, order)
        async with server.decoding:
            images = await pictures(form, "image", "image[]", settings=server.settings)
            masks = await pictures(form, "mask", settings=server.settings)
            if not images:
                raise ApiError(400, "the field 'image' is missing", code="missing_field", param="image")
            if len(masks) > 1:
                raise ApiError(400, "one mask is taken", code="invalid_value", param="mask")
            fields = await asyncio.to_thread(fields_of, images, masks)
            return order, await server.fitted(replace(first, strength=order.strength, **fields))


def fields_of(images: Sequence[Image.Image], masks: Sequence[Image.Image] = ()) -> dict[str, Any]:
    """A request's fields of these pictures."""
    # Not converted where there is nothing to: that would be a copy of each.
    plain = tuple(image if image.mode == "RGB" else image.convert("RGB") for image in images)
    found: dict[str, Any] = {"images": plain}
    return found | ({"mask": mask_of(masks[0], images[0])} if masks else {})


def mask_of(mask: Image.Image, image: Image.Image) -> Image.Image:
    """White where it is painted anew: where OpenAI's masks are transparent; a mask without transparency is as it is."""
    if mask.size != image.size:
        raise ApiError(400, "the mask is not of the image's size", code="invalid_image", param="mask")
    if mask.mode == "RGBA":
        return mask.getchannel("A").point([255 - value for value in range(256)])
    return mask.convert("L")


async def _answer(request: Request, order: ImageOrder, first: EngineRequest, *, name: str) -> Response:
    if order.stream:
        (job,) = _submit(request, order, first)
        # Some proxies keep an answer back until much of it is there, unless they are told.
        headers = {"X-Accel-Buffering": "no"}
        return StreamingResponse(_events(job, order, name=name), media_type="text/event-stream", headers=headers)
    results, data = await make(request, order, first)
    return JSONResponse(_envelope(order, results) | {"data": data})


async def make(
    request: Request, order: ImageOrder, first: EngineRequest, *, watch: set[Job] | None = None
) -> tuple[list[Result], list[dict[str, Any]]]:
    """The pictures of an order, from its first one's request on, and their entries in the answer; ended when the client
    goes away.

    While they are made their jobs are in `watch`.
    """
    server, watch = server_of(request), set() if watch is None else watch
    jobs = _submit(request, order, first)
    watch.update(jobs)
    try:
        results = await while_connected(request, _all(jobs))
        return results, [await asyncio.to_thread(_entry, server, order, result) for result in results]
    finally:
        watch.difference_update(jobs)
        for job in jobs:
            job.cancel()


async def _all(jobs: Sequence[Job]) -> list[Result]:
    """Their results. Here, so that no frame holds the `gather`: one that is cancelled would stay, and its jobs."""
    return await asyncio.gather(*map(_result, jobs))


async def _result(job: Job) -> Result:
    return await job


def first_of(request: Request, order: ImageOrder) -> EngineRequest:
    """The request of an order's first picture, less what it is made of."""
    server = server_of(request)
    settings, engine = server.settings, server.engine
    if order.n > engine.most_taken:
        # Not a full queue, which would have room some time.
        raise FieldError("n", f"n is {order.n}; this server has room for {engine.most_taken} at once")
    alias = server.alias(order.model, media="image")
    return order.request(
        model=alias,
        quality=order.preset,
        queue_seconds=settings.queue_seconds,
        run_seconds=settings.run_seconds,
        previews=order.partial_images,
    )


def _submit(request: Request, order: ImageOrder, first: EngineRequest) -> list[Job]:
    """The jobs of an order, one a picture; none where not all of them find room."""
    server = server_of(request)
    settings, engine = server.settings, server.engine
    jobs: list[Job] = []
    try:
        for number in range(order.n):
            seed = None if first.seed is None else (first.seed + number) % SEED_SPACE
            jobs.append(engine.submit(replace(first, seed=seed), most_pixels=settings.most_pixels // order.n))
    except Exception:
        for job in jobs:
            job.cancel()
        raise
    note(request, jobs)
    return jobs


def _entry(server: Server, order: ImageOrder, result: Result) -> dict[str, Any]:
    """One picture of the answer."""
    raw = encode(result.pictures[0], order)
    entry: dict[str, Any] = {"seed": result.effective["seed"]}
    if order.response_format == "url":
        entry["url"] = server.links.add(raw, media_type=f"image/{order.output_format}")
    else:
        entry["b64_json"] = base64.b64encode(raw).decode("ascii")
    return entry


def encode(picture: Image.Image, order: ImageOrder) -> bytes:
    """A picture in the format an order names."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {} if order.output_format == "png" else {"quality": max(1, order.output_compression)}
    picture.convert("RGB").save(buffer, format=order.output_format.upper(), **options)
    return buffer.getvalue()


def _envelope(order: ImageOrder, results: Sequence[Result]) -> dict[str, Any]:
    """What was done, for all pictures of an answer."""
    effective = in_its_words(results[0].effective)
    width, height = effective.pop("size")
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": order.output_format,
        "quality": order.quality,
        "size": f"{width}x{height}",
        **effective,
        "timings": {name: max(one.timings[name] for one in results) for name in results[0].timings},
        "calls": _calls(results),
    }


def _calls(results: Sequence[Result]) -> dict[str, float]:
    """The calls of all pictures together; how many requests shared one, on average."""
    found = {name: sum(one.calls.get(name, 0) for one in results) for name in results[0].calls}
    return found | {"requests_per_call": round(found["requests_per_call"] / len(results), 2)}


async def _events(job: Job, order: ImageOrder, *, name: str) -> AsyncIterator[str]:
    """The server-sent events of one picture."""
    index = 0
    try:
        async for event in job.follow(silence=SILENCE):
            if event is None:
                yield ": waiting\n\n"
            if isinstance(event, Progress):
                yield f": step {event.step} of {event.total}\n\n"
            if isinstance(event, Preview) and index < order.partial_images:
                raw = await asyncio.to_thread(encode, event.picture, order)
                facts = _streamed(order, raw, size=event.picture.size)
                yield _sse(f"{name}.partial_image", facts | {"partial_image_index": index})
                index += 1
        result = await job
        raw = await asyncio.to_thread(encode, result.pictures[0], order)
        facts = _envelope(order, [result]) | _streamed(order, raw, size=result.pictures[0].size)
        yield _sse(f"{name}.completed", facts)
    except Exception as error:
        yield _sse("error", api_error(error).body)
    finally:
        job.cancel()


def _streamed(order: ImageOrder, raw: bytes, *, size: tuple[int, int]) -> dict[str, Any]:
    return {
        "b64_json": base64.b64encode(raw).decode("ascii"),
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": order.output_format,
        "quality": order.quality,
        "size": f"{size[0]}x{size[1]}",
    }


def _sse(name: str, facts: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name} | facts)}\n\n"
