"""The page on a real server: the built-in model, or a tiny one."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from vivace.serve import Engine
from vivace.serve.http.app import create_app
from vivace.serve.http.settings import Settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 240  # seconds, on a machine that does much else
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of one module alone: while it runs, no other test of the process can have an event loop."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("this machine has no chromium; apt-get install chromium")
    with playwright.sync_playwright() as running:
        running.selectors.set_test_id_attribute("id")
        options = ["--disable-gpu", "--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else ["--disable-gpu"]
        found = running.chromium.launch(executable_path=CHROMIUM, args=options)
        playwright.expect.set_options(timeout=1000 * PATIENCE)
        yield found
        found.close()


@pytest.fixture
def visit(browser, site) -> Iterator[Callable[..., Any]]:
    """Opens the page of `site`; at the end it scrolls down alone, asked no other server, and nothing went wrong."""
    opened, hosts, wrong = [], set(), []

    def watch(page: Any) -> None:
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)

    def visit(size: str = "desktop", *, where: str = site.url, **options: Any) -> Any:
        width, height = SIZES[size]
        touch = {"is_mobile": True, "has_touch": True} if size == "phone" else {}
        context = browser.new_context(viewport={"width": width, "height": height}, **touch, **options)
        context.set_default_timeout(1000 * PATIENCE)
        opened.append(context)
        page = context.new_page()
        watch(page)
        page.goto(where)
        if where == site.url:
            page.locator("body[data-ready]").wait_for()
        return page

    yield visit
    pages = [page for context in opened for page in context.pages]
    sideways = [page.url for page in pages if page.evaluate("document.documentElement.scrollWidth > innerWidth")]
    for context in opened:
        context.close()
    assert sideways == []
    assert {host for host in hosts if host} == {urlsplit(site.url).netloc}
    assert wrong == []


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
