"""The application: the routes behind the guard, over one engine."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.types import Scope

from vivace.errors import InputError
from vivace.generation import video
from vivace.memory import heap
from vivace.serve.failures import Failure
from vivace.serve.http import a1111, envelope, images, status, videos
from vivace.serve.http.envelope import ApiError
from vivace.serve.http.gauges import Gauges
from vivace.serve.http.guard import OPEN, Guard
from vivace.serve.http.links import Links
from vivace.serve.http.schema import limited
from vivace.serve.http.server import Server
from vivace.serve.http.settings import Settings
from vivace.serve.http.shelf import Shelf
from vivace.serve.request import Request
from vivace.serve.studio import Studio

if TYPE_CHECKING:
    from vivace.serve.ui.mount import Mounted

logger = logging.getLogger(__name__)

FIRST = Request(
    prompt="a red circle, a green square and a blue triangle on a yellow background", steps=8, seed=0, priority=-8
)
"""A picture with many colours. Previews are learned from a first one, and the page's first visitor shall have them."""
PROBES = (*OPEN, "/metrics")
"""What machines ask every few seconds, for as long as the server runs."""
SWEEP = 60.0  # seconds between two looks for what is over its time
AGAIN = 60.0  # seconds between two looks whether models that could not be loaded can be by now


def create_app(engine: Studio, settings: Settings | None = None, *, warm: bool = True) -> FastAPI:
    """The ASGI application. It loads the models at start, unless `warm` is off.

    It does not close the engine: who made it does. Raises InputError for a model of videos where none can be written.
    """
    settings = settings or Settings()
    if any(model.media == "video" for model in engine.models.values()):
        video.require()
    gauges = Gauges()
    server = Server(
        engine=engine,
        settings=settings,
        gauges=gauges,
        links=Links(seconds=settings.link_seconds, most_bytes=settings.link_bytes),
        shelf=Shelf(settings.folder, seconds=settings.video_seconds, most_bytes=settings.video_bytes),
    )
    # What was refused left no request that the engine would tidy up after.
    server.sweeps += [server.shelf.sweep, server.links.kept.sweep, heap.give_back]
    engine.observe(batch=gauges.batch, job=gauges.job)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_sweep(server)), asyncio.create_task(_revive(engine))]
        if warm:
            tasks.append(asyncio.create_task(_warm(engine, drawn=settings.ui)))
        try:
            yield
        finally:
            await server.close(tasks)

    # No pages of its own: they would load scripts from elsewhere.
    app = FastAPI(
        title="Vivace",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        responses={"default": envelope.DESCRIBED},
    )
    app.state.server = server
    envelope.install(app)
    for part in (images, videos, status, *((a1111,) if settings.a1111 else ())):
        app.include_router(part.router)
    page = None
    if settings.ui:
        from vivace.serve.ui.mount import mount

        page = mount(app, server)

    _guard(app, server, page)
    app.openapi_schema = limited(app.openapi(), settings)
    return app


def _guard(app: FastAPI, server: Server, page: Mounted | None) -> None:
    """Put the guard before everything, the page's own ways past it included."""

    def passes(scope: Scope) -> bool:
        signed = server.links.signed(scope["path"], scope["query_string"].decode("latin-1"))
        return signed or (page is not None and page.admits(scope))

    def full(scope: Scope) -> ApiError | None:
        return None if page is not None and page.takes_no_place(scope) else server.full()

    def quiet(scope: Scope) -> bool:
        return scope["path"] in PROBES or (page is not None and page.loads(scope))

    app.add_middleware(
        Guard,
        settings=server.settings,
        passes=passes,
        full=full,
        quiet=quiet,
        count=server.gauges.http,
        answering=server.answering,
    )


async def _warm(engine: Studio, *, drawn: bool) -> None:
    await _load(engine)
    if drawn:
        with suppress(InputError, Failure):
            await engine.submit(FIRST)


async def _revive(engine: Studio) -> None:
    """Where no model can be loaded, try again: nobody sends a server that is not ready what would load one."""
    while True:
        await asyncio.sleep(AGAIN)
        if all(model.broken for model in engine.models.values()):
            await _load(engine)


async def _load(engine: Studio) -> None:
    # Those that can be are served.
    try:
        await _aside(engine.load)
    except (InputError, Failure) as error:
        logger.error("not all models are loaded: %s", error)


def _aside(work: Callable[[], None]) -> asyncio.Future[None]:
    """Have `work` done in a thread whose end the process does not wait for: a load may take minutes."""
    done: Future[None] = Future()
    done.set_running_or_notify_cancel()

    def do() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=do, name="vivace-load", daemon=True).start()
    return asyncio.wrap_future(done)


async def _sweep(server: Server) -> None:
    while True:
        await asyncio.to_thread(server.sweep)
        await asyncio.sleep(SWEEP)
