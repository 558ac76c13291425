"""Whether the server lives, whether it takes requests, what it counts, which models it has, and its pictures' links."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import JSONResponse, Response

from vivace.serve.http.envelope import ApiError
from vivace.serve.http.server import server_of
from vivace.serve.model import Model
from vivace.serve.studio import Studio

router = APIRouter()


@router.head("/livez", include_in_schema=False)
@router.get("/livez")
async def livez() -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """Requests are taken: nothing loads, drains, is stuck or lost."""
    health = server_of(request).engine.health()
    if health.ready:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable", "reason": health.reason}, 503, headers={"Retry-After": "5"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    server = server_of(request)
    return Response(server.gauges.text(server.engine), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The aliases that requests may name."""
    engine = server_of(request).engine
    return JSONResponse({"object": "list", "data": [_model(engine, one) for one in engine.models.values()]})


@router.get("/v1/models/{alias:path}")  # it may be named as on a hub
async def model(request: Request, alias: Annotated[str, Path(max_length=200)]) -> Response:
    """One alias."""
    engine = server_of(request).engine
    return JSONResponse(_model(engine, engine.model(alias)))


@router.get("/v1/files/{name}")
async def file(request: Request, name: Annotated[str, Path(max_length=64)]) -> Response:
    """A picture, at the address that its answer named, until that expires."""
    server = server_of(request)
    # With the key and without a signature nothing is found either: the address is what was given away.
    found = server.links.get(name) if server.links.signed(request.url.path, request.url.query) else None
    if found is None:
        raise ApiError(404, "no such picture, or not any more", code="file_not_found")
    return Response(found[0], media_type=found[1])


def _model(engine: Studio, found: Model) -> dict[str, object]:
    facts = {"media": found.media, "loaded": engine.loaded(found.alias), "loras": [*found.spec.loras]}
    return {"id": found.alias, "object": "model", "created": 0, "owned_by": "vivace", **facts}
