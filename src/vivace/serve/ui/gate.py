"""The page's own gate: of gradio's routes only those that this page needs, and nothing that names a file.

gradio's server can serve files, take uploads, fetch addresses, proxy and record. All of that ends here, and so does
whatever a later version adds: what is not listed is not found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vivace.serve.http.envelope import ApiError

AT = "/ui"
INPUTS, SIGN_IN = f"{AT}/inputs", f"{AT}/sign-in"
ICON, PICTURE = "/favicon.ico", Path(__file__).parent / "assets" / "icon.svg"
JOIN, ALIVE = "/gradio_api/queue/join", "/gradio_api/app_id"
FORGOTTEN = "You are signed in no longer; reload the page to sign in again."

# Paths below the page, by method. No dot may begin a part, so that nothing climbs.
_NAME = r"[\w-][\w.-]*"
OPEN = {
    "GET": re.compile(
        rf"/|/(assets|static)(/{_NAME})+|/theme\.css|/manifest\.json|{ALIVE}"
        rf"|/gradio_api/(startup-events|queue/data|heartbeat/{_NAME})"
    ),
    "POST": re.compile(rf"{JOIN}|/inputs|/sign-in"),
}
OPEN["HEAD"] = OPEN["GET"]

# What the browser may do for the page: nothing beyond this server, whatever a script asks for. gradio makes its
# components' code from text, which needs unsafe-eval.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
FOREVER = "public, max-age=31536000, immutable"  # for files with a hash in their name


class Gate:
    """Lets the page's requests through. `holds` says whether one is signed in; `form` asks for the key."""

    def __init__(self, app: ASGIApp, *, holds: Callable[[Scope], bool], form: Callable[[], Response]) -> None:
        self.app, self.holds, self.form = app, holds, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not (scope["path"] in ("/", ICON) or below(scope["path"])):
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise ApiError(404, "no such route")
        path, method = scope["path"].removeprefix(AT), scope["method"]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = HEADERS | ({"cache-control": FOREVER} if path.startswith("/assets/") else {})
                message["headers"] = [
                    *message.get("headers", []),
                    *((name.encode(), value.encode()) for name, value in more.items()),
                ]
            await send(message)

        if scope["path"] == ICON and method == "GET":
            await FileResponse(PICTURE, media_type="image/svg+xml")(scope, receive, answer)
        elif scope["path"] in ("/", AT) and method in ("GET", "HEAD"):
            await RedirectResponse(f"{AT}/", 307)(scope, receive, answer)
        elif scope["path"] in ("/", AT, ICON) or not OPEN.get(method, _NOTHING).fullmatch(path):
            raise ApiError(404, "no such route")
        elif path == "/" and not self.holds(scope):
            await self.form()(scope, receive, answer)
        elif path == JOIN and not self.holds(scope):
            # In gradio's shape, which shows it; of any other it shows nothing.
            await JSONResponse({"detail": FORGOTTEN}, 401)(scope, receive, answer)
        else:
            await self.app(scope, await _plain(receive) if path == JOIN else receive, answer)


_NOTHING = re.compile(r"(?!)")


def welcomes(scope: Scope) -> bool:
    """The requests that come before anyone has signed in: the page's address, which then asks, and its answer.

    And those of a page that outlived its sign-in: an event, which is told so, and whether the server is there again.
    """
    return (scope["method"], scope["path"]) in {
        ("GET", "/"),
        ("GET", ICON),
        ("GET", AT),
        ("GET", f"{AT}/"),
        ("GET", f"{AT}{ALIVE}"),
        ("POST", f"{AT}{JOIN}"),
        ("POST", SIGN_IN),
    }


def below(path: str) -> bool:
    return path == AT or path.startswith(f"{AT}/")


async def _plain(receive: Receive) -> Receive:
    """The body of an event, read and found to name no file: gradio would open, or fetch, what such an entry names."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        body, more = body + message.get("body", b""), message.get("more_body", False)
    try:
        names = _names_file(json.loads(body))
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON", code="invalid_json") from None
    if names:
        raise ApiError(400, "the page takes no files", code="invalid_value")
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _names_file(value: Any) -> bool:
    if isinstance(value, dict):
        return "meta" in value or any(map(_names_file, value.values()))
    return isinstance(value, list) and any(map(_names_file, value))
