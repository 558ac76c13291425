"""Running the application until a signal ends it: drain first, leave at once at the second signal."""

from __future__ import annotations

import logging
import os
import threading
import time
from types import FrameType

import uvicorn

from vivace.serve.engine import Engine
from vivace.serve.http.app import create_app
from vivace.serve.http.log import configure
from vivace.serve.http.settings import Settings

logger = logging.getLogger(__name__)

LOST = 70  # exit code when the device is lost: a supervisor has to start a new process
HEADER_BYTES = 32_768
IDLE_SECONDS = 20  # that a connection may stay open between requests
LINGER = 2  # seconds for answers to reach their clients


class Draining(uvicorn.Server):
    """A server whose first signal refuses new requests, finishes the running ones, and then ends it."""

    def __init__(self, config: uvicorn.Config, *, engine: Engine, seconds: float) -> None:
        super().__init__(config)
        self.engine, self.seconds = engine, seconds
        self.signals = 0

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
        while self.engine.running and time.monotonic() < end:
            time.sleep(0.05)
        self.engine.close(timeout=LINGER)
        self.should_exit = True


def run(engine: Engine, settings: Settings) -> int:
    """Serve until a signal; the process's exit code."""
    configure()
    config = uvicorn.Config(
        create_app(engine, settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        # Not whichever is installed: the other one has no limit for headers.
        http="h11",
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=LINGER,
    )
    server = Draining(config, engine=engine, seconds=settings.drain_seconds)
    threading.Thread(target=_end_with_device, args=(server,), daemon=True).start()
    server.run()
    return LOST if engine.lost else 0


def _end_with_device(server: Draining) -> None:
    while not server.should_exit:
        if server.engine.lost:
            server.should_exit = True
        time.sleep(0.5)
