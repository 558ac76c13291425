"""A real server on a real socket, and the official client."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest
import uvicorn

from vivace.families import FAMILIES
from vivace.serve import Engine
from vivace.serve.http.app import create_app
from vivace.serve.http.run import Impatient
from vivace.serve.http.settings import Settings

KEY = "a-key-of-the-tests-alone"


@dataclass(kw_only=True)
class Live:
    """A server that runs, and how to reach it."""

    url: str
    engine: Engine
    app: Any
    key: str | None

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=60)

    @property
    def http(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60)


@contextmanager
def live(engine: Engine, settings: Settings) -> Iterator[Live]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    app = create_app(engine, settings)
    config = uvicorn.Config(app, log_config=None, access_log=False, http=Impatient, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    found = Live(url=f"http://127.0.0.1:{port}", engine=engine, app=app, key=settings.api_key)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with ExitStack() as stack:
            try:
                if stack.enter_context(found.http).get("/readyz").status_code == 200:
                    break
            except httpx2.TransportError:
                pass
        time.sleep(0.05)
    try:
        yield found
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def launch() -> Iterator[Callable[..., Live]]:
    """Starts servers: `launch({"tiny": pipe}, engine={"queue": 1}, api_key=...)`."""
    with launcher() as start:
        yield start


@pytest.fixture(scope="module")
def launch_module() -> Iterator[Callable[..., Live]]:
    """Starts servers that live as long as a module's tests."""
    with launcher() as start:
        yield start


@contextmanager
def launcher() -> Iterator[Callable[..., Live]]:
    with ExitStack() as stack:

        def start(models: dict[str, Any], *, engine: dict[str, Any] | None = None, **settings: Any) -> Live:
            made = stack.enter_context(Engine(models=models, **(engine or {})))
            return stack.enter_context(live(made, Settings(**settings)))

        yield start


@pytest.fixture(scope="session")
def shared() -> Iterator[Live]:
    """One server for the tests that leave it as it was: a picture model and a video model, no key."""
    models = {"tiny": FAMILIES["sd3"].tiny(), "clip": FAMILIES["wan"].tiny()}
    with Engine(models=models) as engine, live(engine, Settings()) as found:
        yield found


@pytest.fixture
def client(shared: Live) -> openai.OpenAI:
    return shared.client


@pytest.fixture
def http(shared: Live) -> Iterator[httpx2.Client]:
    with shared.http as found:
        yield found


@pytest.fixture
def wanted() -> dict[str, Any]:
    """The JSON of a small quick picture."""
    return {"prompt": "a red circle", "size": "64x64", "steps": 2, "seed": 1}
