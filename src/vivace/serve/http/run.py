"""Running the application until a signal ends it: drain first, leave at once at the second signal."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vivace.errors import InputError
from vivace.serve.engine import Engine
from vivace.serve.http.app import create_app
from vivace.serve.http.envelope import ApiError
from vivace.serve.http.log import configure
from vivace.serve.http.server import Server
from vivace.serve.http.settings import Settings
from vivace.serve.http.shelf import held

logger = logging.getLogger(__name__)

LOST = 70  # exit code when the device is lost: a supervisor has to start a new process
HEADER_BYTES = 32_768
IDLE_SECONDS = 20  # that the head of a request may take, about
KEEP_SECONDS = 75  # that a connection stays open between requests: longer than proxies keep theirs, which is a minute
LINGER = 2  # seconds for what is open after that


class Impatient(H11Protocol):
    """A connection that is closed when the head of a request, for which nobody needs a key, is too long in coming.

    uvicorn has a clock for the time between two requests alone: who opens connections and says nothing keeps them all.
    """

    late: asyncio.TimerHandle | None = None
    seen: tuple[bool, object] = (True, None)  # at the last look: whether it waited for a head, and after which request

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self.late = self.loop.call_later(IDLE_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.late is not None:
            self.late.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets the API's envelope too; an answer that has begun is cut off."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = ApiError(400, "that is no HTTP request that can be read", code="invalid_http").response()
            head = h11.Response(status_code=400, headers=[*answer.raw_headers, (b"connection", b"close")])
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _look(self) -> None:
        over = self.cycle is None or self.cycle.response_complete
        now = (over and self.timeout_keep_alive_task is None, self.cycle)
        if now[0] and now == self.seen:
            self.transport.close()
            return
        self.seen, self.late = now, self.loop.call_later(IDLE_SECONDS, self._look)


class Draining(uvicorn.Server):
    """A server whose first signal refuses new requests, finishes and answers the running ones, and ends it then."""

    def __init__(
        self, config: uvicorn.Config, *, server: Server, engine: Engine, ready: Callable[[], None] | None
    ) -> None:
        super().__init__(config)
        self.engine, self.ready = engine, ready
        self.seconds, self.answering = server.settings.drain_seconds, server.answering
        self.signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.ready is not None:
            self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the second time, end the process without further ado."""
        self.signals += 1
        if self.signals > 1:
            os._exit(128 + sig)
        # In a thread: the loop goes on answering, and a signal handler must not wait.
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        logger.info("draining")
        self.engine.drain()
        end = time.monotonic() + self.seconds
        # What is drawn has yet to be encoded, and read by whoever asked.
        while (self.engine.running or self.answering) and time.monotonic() < end:
            time.sleep(0.05)
        self.engine.close(timeout=LINGER)
        self.should_exit = True


def run(engine: Engine, settings: Settings, *, ready: Callable[[], None] | None = None) -> int:
    """Serve until a signal; the process's exit code. `ready` is called once, when it answers.

    Raises InputError for where it cannot listen, and for a folder of videos that is another server's.
    """
    sockets = listen(settings.host, settings.port)
    with held(settings.folder):
        return _run(engine, settings, sockets, ready)


def _run(engine: Engine, settings: Settings, sockets: list[socket.socket], ready: Callable[[], None] | None) -> int:
    configure()
    app = create_app(engine, settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        # Not whichever is installed: the other one has no limit for headers.
        http=Impatient,
        ws="none",
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=KEEP_SECONDS,
        timeout_graceful_shutdown=LINGER,
    )
    server = Draining(config, server=app.state.server, engine=engine, ready=ready)
    threading.Thread(target=_end_with_device, args=(server,), daemon=True).start()
    server.run(sockets)
    return LOST if engine.lost else 0


def listen(host: str, port: int) -> list[socket.socket]:
    """Bound sockets, one for each address that the host has here. Raises InputError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InputError(f"--host {host} is no address; name one of this machine's, such as 127.0.0.1") from error
    sockets: list[socket.socket] = []
    refused: list[OSError] = []
    for family, address in dict.fromkeys((one[0], one[4][:2]) for one in found):
        try:
            sockets.append(socket.create_server(address, family=family))
        except OSError as error:
            refused.append(error)
    taken = any(error.errno == errno.EADDRINUSE for error in refused)
    # Not for one address alone: a name may stand for one of IPv6 too where the machine has none.
    if taken or not sockets:
        for one in sockets:
            one.close()
        reason = "is taken" if taken else f"cannot be listened at ({refused[0].strerror})"
        raise InputError(f"port {port} of {host} {reason}; choose another --port or --host")
    return sockets


def _end_with_device(server: Draining) -> None:
    while not server.should_exit:
        if server.engine.lost:
            server.should_exit = True
        time.sleep(0.5)
