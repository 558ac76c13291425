"""POST, GET and DELETE /v1/videos: jobs that outlive their request, and the server."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from starlette.datastructures import Headers
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from vivace.errors import InputError
from vivace.generation import video
from vivace.generation.generate import FPS
from vivace.generation.job import nearest_frames
from vivace.serve.failures import Cancelled
from vivace.serve.http.envelope import ApiError, api_error, disk_error, in_its_words, renamed
from vivace.serve.http.images import BINARY, fields_of
from vivace.serve.http.schema import VideoOrder, check_pixels, from_form, preset, read
from vivace.serve.http.server import Server, is_form, note, read_form, read_json, server_of
from vivace.serve.http.uploads import pictures
from vivace.serve.job import Job, Progress, Result
from vivace.serve.request import Request as EngineRequest

logger = logging.getLogger(__name__)
router = APIRouter()

VideoId = Annotated[str, Path(pattern=r"^video_[0-9a-f]{24}$")]
_SCHEMA = VideoOrder.model_json_schema()
_FORM = {**_SCHEMA, "properties": {**_SCHEMA["properties"], "input_reference": BINARY}}
_CONTENT = {"application/json": {"schema": _SCHEMA}, "multipart/form-data": {"schema": _FORM}}


class Clip(FileResponse):
    """A video or the parts of it that are asked for, in the API's envelope where it has no such parts."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = False

        async def worded(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refused = True
                size = Headers(raw=message["headers"]).get("content-range")
                error = ApiError(
                    message["status"],
                    "the video has no such range of bytes",
                    code="invalid_range",
                    headers={"Content-Range": size} if size else None,
                )
                await error.response()(scope, receive, send)
            elif not refused:
                await send(message)

        await super().__call__(scope, receive, worded)


@router.post("/v1/videos", openapi_extra={"requestBody": {"required": True, "content": _CONTENT}})
async def create(request: Request) -> Response:
    """Begin a video; its record comes back at once."""
    server = server_of(request)
    order, wanted = await _asked(request)
    with renamed({"image": "input_reference"}):
        job = server.engine.submit(wanted, most_pixels=server.settings.most_video_pixels)
    note(request, [job])
    record = {
        "id": f"video_{secrets.token_hex(12)}",
        "object": "video",
        "status": "queued",
        "progress": 0,
        "created_at": int(time.time()),
        "completed_at": None,
        "expires_at": None,
        "error": None,
        "model": wanted.model,
        "prompt": order.prompt,
        "seconds": order.seconds or (f"{wanted.frames / (order.fps or FPS):g}" if wanted.frames else "auto"),
        "size": order.size or "auto",
        "remixed_from_video_id": None,
    }
    try:
        server.shelf.put(record)
    except OSError as error:
        job.cancel()
        raise disk_error(error) from None
    server.follow(record["id"], job, follow(server, record["id"], job))
    return JSONResponse(record)


async def _asked(request: Request) -> tuple[VideoOrder, EngineRequest]:
    """A video's order and request. Here, so that nothing holds its picture as it came while it waits."""
    server = server_of(request)
    if not is_form(request):
        order: VideoOrder = read(VideoOrder, await read_json(request), server.settings)
        return order, _request(order, server)
    async with read_form(request, most_files=1) as form:
        order = from_form(VideoOrder, form, server.settings, files=("input_reference",))
        wanted = _request(order, server)
        async with server.decoding:
            images = await pictures(form, "input_reference", settings=server.settings)
            with renamed({"image": "input_reference"}):
                fields = await asyncio.to_thread(fields_of, images)
                return order, await server.fitted(replace(wanted, **fields))


def _request(order: VideoOrder, server: Server) -> EngineRequest:
    alias = server.alias(order.model, media="video")
    frames = _frames(order, server, alias)
    return order.request(model=alias, quality=preset(order.quality), frames=frames, fps=order.fps)


@router.get("/v1/videos")
async def index(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=100)] = None,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The records, page by page."""
    server = server_of(request)
    records = server.shelf.all()
    if order == "asc":
        records.reverse()
    names = [record["id"] for record in records]
    if after is not None:
        if after not in names:
            raise ApiError(404, "no such video", code="video_not_found", param="after")
        records = records[names.index(after) + 1 :]
    page = records[:limit]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return JSONResponse({"object": "list", "data": page, "has_more": len(records) > limit, **ends})


@router.get("/v1/videos/{video_id}")
async def retrieve(request: Request, video_id: VideoId) -> Response:
    """One record."""
    return JSONResponse(_record(server_of(request), video_id))


@router.get("/v1/videos/{video_id}/content")
async def content(request: Request, video_id: VideoId, variant: Literal["video"] = "video") -> Response:
    """The video itself, as mp4."""
    server = server_of(request)
    record = _record(server, video_id)
    path = server.shelf.video(video_id)
    if record["status"] != "completed":
        raise ApiError(409, f"the video is {record['status']}", code="video_not_ready")
    if not path.is_file():
        raise ApiError(404, "the video's file is gone; ask for it again", code="video_not_found", param="video_id")
    return Clip(path, media_type="video/mp4")


@router.delete("/v1/videos/{video_id}")
async def delete(request: Request, video_id: VideoId) -> Response:
    """End a video's job and forget it."""
    server = server_of(request)
    _record(server, video_id)
    try:
        server.shelf.delete(video_id)
    except OSError as error:
        raise disk_error(error) from None
    server.unfollow(video_id)
    return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})


def _record(server: Server, video_id: str) -> dict[str, Any]:
    record = server.shelf.get(video_id)
    if record is None:
        raise ApiError(404, "no such video", code="video_not_found", param="video_id")
    return record


def _frames(order: VideoOrder, server: Server, alias: str) -> int | None:
    """How many frames an order wants; None: the model's own; of seconds as many as it can make. Raises ApiError."""
    frames = order.frames
    if order.seconds is not None:
        frames = nearest_frames(max(1, int(order.seconds) * (order.fps or FPS)), server.engine.model(alias).source)
    if frames is not None and frames > server.settings.most_frames:
        raise ApiError(
            400,
            f"that is {frames} frames, the most is {server.settings.most_frames}",
            code="invalid_value",
            param="seconds" if order.seconds else "frames",
        )
    check_pixels(order.pixels, server.settings.most_video_pixels, count=frames or 1)
    return frames


async def follow(server: Server, name: str, job: Job) -> None:
    """Keep a job's record true until it is over, then write its video."""
    try:
        _note(server, name, status="in_progress" if job.started else "queued")
        async for event in job:
            if isinstance(event, Progress):
                _note(server, name, status="in_progress", progress=int(99 * event.step / max(1, event.total)))
        result = await job
        await asyncio.to_thread(_write, server, name, result)
        width, height = result.pictures[0].size
        effective = in_its_words(
            {key: value for key, value in result.effective.items() if key not in ("size", "model")}
        )
        seconds = len(result.pictures) / effective.get("fps", FPS)
        facts = {"size": f"{width}x{height}", "seconds": f"{seconds:g}", "timings": dict(result.timings), **effective}
        _put(server, name, status="completed", progress=100, completed_at=int(time.time()), **facts)
        await asyncio.to_thread(server.sweep)
    except Cancelled:
        _put(server, name, status="failed", error={"code": "cancelled", "message": "the job was cancelled"})
    except asyncio.CancelledError:
        job.cancel()
        raise
    except Exception as error:
        known = disk_error(error) if isinstance(error, OSError) else api_error(error)
        _put(server, name, status="failed", error={"code": known.code or "failed", "message": known.message})


def _write(server: Server, name: str, result: Result) -> None:
    effective = dict(result.effective)
    known = {"fps": effective.get("fps", FPS), "seed": effective.pop("seed"), "settings": effective}
    try:
        with server.shelf.whole(server.shelf.video(name)) as part:
            video.write(result.pictures, part, prompt="", **known)
    except InputError as error:
        # It is worded for the command line, and names the path.
        raise error.__cause__ or error from None


def _note(server: Server, name: str, **facts: Any) -> None:
    record = server.shelf.get(name)
    if record is not None:
        server.shelf.note(record | facts)


def _put(server: Server, name: str, **facts: Any) -> None:
    """Write a record's change to disk; where that has no room, at least say so in memory."""
    record = server.shelf.get(name)
    if record is None:
        return
    record = record | facts | {"expires_at": server.shelf.expiry}
    try:
        server.shelf.put(record)
    except OSError as error:
        logger.error("the record of %s cannot be written", name)
        server.shelf.note(
            record | {"status": "failed", "error": {"code": "disk_full", "message": str(disk_error(error))}}
        )
