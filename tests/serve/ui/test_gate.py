"""What the page's door lets through of gradio, and what it does not."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys

import pytest
from starlette.routing import Mount

from vivace.families import FAMILIES

OPEN = {
    "/", "/theme.css", "/manifest.json", "/assets/{path:path}", "/static/{path:path}", "/gradio_api/startup-events",
    "/gradio_api/queue/data", "/gradio_api/queue/join", "/gradio_api/heartbeat/{session_hash}",
    "/gradio_api/app_id",
}  # fmt: skip


@pytest.fixture(scope="module")
def site(launch):
    return launch({"tiny": FAMILIES["sd3"].tiny()})


@pytest.fixture
def http(site):
    with site.http as found:
        yield found


def gradio_of(site):
    return next(route.app for route in site.app.routes if isinstance(route, Mount) and route.path == "/ui")


def routes_of(router):
    for route in router.routes:
        # FastAPI keeps an included router whole.
        yield from routes_of(route.original_router) if hasattr(route, "original_router") else [route]


def test_gradio_has_no_other_open_route(site, http):
    """Every route that this gradio has, by name: what a later version adds is closed, or fails here."""
    routes = [route for route in routes_of(gradio_of(site)) if getattr(route, "methods", None)]
    assert len(routes) > 60
    assert {route.path for route in routes} >= OPEN
    for route in routes:
        path = re.sub(r"{[^}]*}", "x", route.path)
        for method in sorted(route.methods - {"HEAD", "OPTIONS"}):
            if route.path in OPEN:
                continue
            answer = http.request(method, f"/ui{path}", json={} if method == "POST" else None)
            assert answer.status_code == 404, (method, route.path)
            assert answer.json()["error"]["message"] == "no such route", (method, route.path)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=http://127.0.0.1:1/x",
        "/gradio_api/proxy=http://127.0.0.1:1/x",
        "/file=/etc/passwd",
        "/assets/../../../../pyproject.toml",
        "/assets/%2e%2e/%2e%2e/index.html",
        "/static/..%2f..%2f..%2fserver.py",
        "/assets//etc/passwd",
        "/gradio_api/stream/x/x/1/playlist.m3u8",
    ],
)
def test_no_file_and_no_address(http, path):
    assert http.get(f"/ui{path}").status_code == 404


def test_uploads_go_nowhere_but_to_the_page(http):
    for path in ("/gradio_api/upload", "/gradio_api/process_recording"):
        assert http.post(f"/ui{path}", files={"files": ("x.png", b"x")}).status_code == 404


def event(*values, **more):
    return {"data": list(values), "fn_index": 0, "session_hash": "someone", "trigger_id": 1, **more}


def test_an_event_names_no_file(http):
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(0.3)
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        for path in (address, "/etc/passwd"):
            file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
            for value in (file, [file], {"a": {"b": [file]}}):
                for body in (event(value), event("x", event_data=value)):
                    # As bytes: how JSON spells a key must not matter.
                    raw = json.dumps(body).replace('"meta"', '"\\u006deta"')
                    headers = {"content-type": "application/json"}
                    answer = http.post("/ui/gradio_api/queue/join", content=raw, headers=headers)
                    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the page takes no files")
        with pytest.raises(TimeoutError):
            trap.accept()


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 100_000, b"\xff"])
def test_an_event_is_json(http, raw):
    answer = http.post("/ui/gradio_api/queue/join", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)


def test_the_api_s_limits_hold(http):
    headers = {"content-type": "application/json"}
    assert http.post("/ui/gradio_api/queue/join", content=b"x" * 1_000_001, headers=headers).status_code == 413
    assert http.get("/ui/", headers={"Origin": "https://evil.example"}).status_code == 403
    assert http.get("/ui/", headers={"Host": "evil.example"}).status_code == 421
    plain = {"content-type": "text/plain"}
    assert http.post("/ui/gradio_api/queue/join", content=b"{}", headers=plain).status_code == 415


def test_the_page_may_reach_nothing_else(http):
    answer = http.get("/ui/")
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["connect-src"] == policy["font-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert not [word for value in policy.values() for word in value.split() if "*" in word or "http" in word]
    assert answer.headers["cache-control"] == "no-store"
    # What the page itself loads, apart from what it says of itself to others.
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"([^\"]+)", answer.text)
    assert loaded
    assert [address for address in loaded if re.match(r"(https?:)?//", address)] == []
    style = http.get("/ui/theme.css").text
    assert "@import" not in style
    assert not re.search(r"url\(\s*['\"]?(https?:)?//", style)


def test_the_log_has_the_page_but_not_its_parts(http, caplog, until):
    def logged():
        found = [record.facts for record in caplog.records if hasattr(record, "facts")]
        return [facts["status"] for facts in found if facts["method"] == "GET"]

    with caplog.at_level(logging.INFO, "vivace.serve.access"):
        script = re.search(r"assets/[\w.-]+\.js", http.get("/ui/").text)
        assert script is not None
        for path in (f"/ui/{script[0]}", "/ui/theme.css", "/ui/assets/none.js", "/v1/models"):
            http.get(path)
        until(lambda: len(logged()) >= 3)  # a line comes after its answer
    assert logged() == [200, 404, 200]


def test_only_files_with_a_hash_are_kept_by_browsers(http):
    script = re.search(r"assets/[\w.-]+\.js", http.get("/ui/").text)
    assert script is not None
    assert "immutable" in http.get(f"/ui/{script[0]}").headers["cache-control"]
    assert http.get("/v1/models").headers["cache-control"] == "no-store"


def test_gradio_s_own_switches_are_off(site):
    blocks = gradio_of(site).blocks
    assert not blocks.share
    assert not blocks.analytics_enabled
    assert blocks.allowed_paths == []
    assert not blocks.ssr_mode
    assert not blocks.mcp_server
    assert not blocks.run_history
    assert not blocks.enable_monitoring
    assert not blocks.show_error
    assert blocks.max_file_size
    assert blocks.proxy_urls == set()
    assert blocks.footer_links == []


def test_the_address_leads_to_the_page(http):
    for path in ("/", "/ui"):
        answer = http.get(path)
        assert (answer.status_code, answer.headers["location"]) == (307, "/ui/")
    assert http.get("/favicon.ico").headers["content-type"] == "image/svg+xml"
    assert http.post("/").status_code == 404


def test_without_the_page_there_is_none():
    from starlette.testclient import TestClient

    from vivace.serve import Engine
    from vivace.serve.http.app import create_app

    with Engine({"tiny": FAMILIES["sd3"].tiny()}) as engine:
        client = TestClient(create_app(engine, warm=False), base_url="http://127.0.0.1")
        assert client.get("/ui/").status_code == client.get("/").status_code == 404


def test_models_without_pictures_are_refused():
    from vivace.errors import InputError
    from vivace.serve import Engine
    from vivace.serve.http.app import create_app
    from vivace.serve.http.settings import Settings

    with Engine({"clip": FAMILIES["wan"].tiny()}) as engine, pytest.raises(InputError, match="none of these models"):
        create_app(engine, Settings(ui=True))


WATCHED = """
import socket, time
asked = []
resolve, connect = socket.getaddrinfo, socket.socket.connect
def getaddrinfo(host, *more, **options):
    if host not in ("127.0.0.1", "localhost", "testserver", None):
        asked.append(host)
    return resolve(host, *more, **options)
def connecting(self, address):
    if isinstance(address, tuple) and not address[0].startswith("127."):
        asked.append(address[0])
    return connect(self, address)
socket.getaddrinfo, socket.socket.connect = getaddrinfo, connecting
from starlette.testclient import TestClient
from vivace.serve import Engine
from vivace.serve.http.app import create_app
from vivace.serve.http.settings import Settings
with Engine() as engine, TestClient(create_app(engine, Settings(ui=True)), base_url="http://127.0.0.1") as client:
    assert client.get("/ui/").status_code == 200
    assert client.get("/ui/theme.css").status_code == 200
    while client.get("/readyz").status_code != 200:
        time.sleep(0.1)
print("asked", asked)
"""


def test_the_server_asks_nobody():
    """gradio at its defaults asks for its newest version and reports its start; no name is looked up here."""
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "asked []"
