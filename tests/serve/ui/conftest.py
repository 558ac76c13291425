"""The page on a real server: the built-in model, or a tiny one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from vivace.serve import Engine
from vivace.serve.http.app import create_app
from vivace.serve.http.settings import Settings

PATIENCE = 240  # seconds, on a machine that does much else


@dataclass(kw_only=True)
class Site:
    """A server with the page."""

    url: str
    engine: Engine
    app: FastAPI

    @property
    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=PATIENCE)


@contextmanager
def site(models: dict[str, Any] | None, *, engine: dict[str, Any], warm: bool, **settings: Any) -> Iterator[Site]:
    with Engine(models, **engine) as made, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app = create_app(made, Settings(ui=True, **settings), warm=warm)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield Site(url=f"http://127.0.0.1:{listener.getsockname()[1]}", engine=made, app=app)
        finally:
            server.should_exit = True
            thread.join(20)


def until(holds: Callable[[], Any]) -> Any:
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


@pytest.fixture(scope="session", name="until")
def until_fixture() -> Callable[[Callable[[], Any]], Any]:
    return until


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Site]]:
    """Starts servers with the page: `launch({"tiny": pipe}, api_key=...)`; without models, the built-in one."""
    with ExitStack() as stack:
        yield lambda models=None, *, engine=None, warm=False, **settings: stack.enter_context(
            site(models, engine=engine or {}, warm=warm, **settings)
        )


class Hold:
    """Holds the calls of a module while it is shut."""

    def __init__(self, module: Any) -> None:
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self._handle = module.register_forward_pre_hook(self._wait)

    def shut(self) -> None:
        self.reached.clear()
        self.open.clear()

    def remove(self) -> None:
        self.open.set()
        self._handle.remove()

    def _wait(self, module: Any, args: Any) -> None:
        self.reached.set()
        assert self.open.wait(PATIENCE)


@pytest.fixture(scope="session")
def hold() -> type[Hold]:
    return Hold
