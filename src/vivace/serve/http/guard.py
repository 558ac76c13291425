"""The door: who may ask, from where, and how much may come in. Plain ASGI, so that nothing is read before it agrees."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vivace.serve.http.envelope import ApiError, api_error
from vivace.serve.http.settings import Settings, loopback

logger = logging.getLogger("vivace.serve.access")

OPEN = ("/livez", "/readyz")
"""The routes that need no key."""

PICTURES_IN_JSON = ("/sdapi/v1/img2img",)
"""The routes whose JSON carries pictures."""

API = ("/v1/", "/sdapi/")
"""Where the routes are whose answers are work: the page's may stay open for hours, with nothing to tell."""

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""The methods that are counted by name: whoever asks may make up others, and each would be remembered."""

PLACELESS = ("/sdapi/v1/interrupt",)
"""The routes that change something and take no place in the queue: they are wanted most when it is full."""


class Guard:
    """Checks every request before a route sees it, gives it an id, and logs what came of it.

    `passes` says whether a request carries something of ours that stands in for the key. `full` says whether the
    queue is full for it, so that a body which would only be thrown away is not read. `quiet` says whether it is one of
    many that say nothing by themselves; where it goes well, only a debugging log has it. The ids of the API's requests
    are in `answering` until the last byte of their answers is sent.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        passes: Callable[[Scope], bool],
        full: Callable[[Scope], ApiError | None],
        quiet: Callable[[Scope], bool],
        count: Callable[[str, int, float], None],
        answering: set[str],
    ) -> None:
        self.app, self.settings, self.count, self.answering = app, settings, count, answering
        self.passes, self.full, self.quiet = passes, full, quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # no route speaks it, and none that some library brings shall
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, begun = time.monotonic(), 499, False
        # What is around the application may have named it.
        request_id = scope.setdefault("state", {}).setdefault("request_id", secrets.token_hex(8))

        async def answer(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"], headers["x-content-type-options"] = request_id, "nosniff"
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            self._check(scope)
            if scope["path"].startswith(API):
                self.answering.add(request_id)
            await self.app(scope, self._counted(scope, receive), answer)
        except ClientDisconnect:
            pass  # in the middle of its body
        except asyncio.CancelledError:  # the server ends, and this has had its time
            if not begun:
                await ApiError(503, "the server is closing", code="unavailable").response()(scope, receive, answer)
            raise
        except Exception as error:
            # Answered here, so that it is counted as what it is, and both know its name.
            told = api_error(error, request_id=request_id)
            if begun:
                raise
            await told.response()(scope, receive, answer)
        finally:
            self.answering.discard(request_id)
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if scope["method"] in METHODS else "OTHER"
            self.count(f"{method} {route}", status, seconds)
            facts = {"request_id": request_id, "method": scope["method"], "route": route, "status": status}
            # What the engine's own lines about a request go by.
            jobs = {"jobs": made} if (made := scope["state"].get("jobs")) else {}
            level = logging.DEBUG if status < 400 and self.quiet(scope) else logging.INFO
            logger.log(level, "request", extra={"facts": {**facts, "seconds": round(seconds, 4), **jobs}})

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for a request that may not pass."""
        headers, path = Headers(scope=scope), scope["path"]
        # A health check inside a container asks by address, whatever name the server goes by outside.
        if path not in OPEN:
            self._check_origin(headers)
            if not self.passes(scope):
                self._check_key(headers)
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page of another site can send a form or plain text without asking; a body that says JSON it cannot.
        if kind and kind not in ("application/json", "multipart/form-data"):
            raise ApiError(415, "the body has to be application/json or multipart/form-data", code="unsupported_type")
        try:
            length = int(headers.get("content-length", "0"))
        except ValueError:
            raise ApiError(400, "the content length is not a number", code="invalid_header") from None
        if length > (most := self._room(path, kind)):
            raise _too_large(most)
        if path not in PLACELESS and (refusal := self.full(scope)) is not None:
            raise refusal

    def _check_key(self, headers: Headers) -> None:
        key = self.settings.api_key
        if key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # As bytes, because compare_digest refuses text beyond ASCII.
        same = hmac.compare_digest(given.strip().encode(), key.encode())
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401, "the API key is missing or wrong", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )

    def _check_origin(self, headers: Headers) -> None:
        """Refuse requests that a page of another site makes through a browser, DNS rebinding included."""
        host = _name(headers.get("host", ""))
        known = {name.lower() for name in (self.settings.host, *self.settings.allowed_hosts)}
        local = loopback(self.settings.host)
        if (local or self.settings.allowed_hosts) and not (host in known or (local and loopback(host))):
            raise ApiError(421, "this server does not go by that name", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and _place(origin) != headers.get("host", ""):
            raise ApiError(403, "requests from pages of other sites are refused", code="wrong_origin")

    def _room(self, path: str, kind: str) -> int:
        """The bytes that a body may have."""
        if kind == "multipart/form-data":
            return self.settings.most_bytes
        encoded = self.settings.a1111 and path in PICTURES_IN_JSON
        return self.settings.most_encoded if encoded else self.settings.most_body

    def _counted(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, with the bytes counted as they come: a length may be missing or a lie. And with a clock, or a few
        who send a byte now and then would keep what little there is of connections and memory."""
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        most = left = self._room(scope["path"], kind)
        began: float | None = None  # when it was first asked for; the end of the body is the end of the clock
        whole = False

        async def counted() -> Message:
            nonlocal left, began, whole
            if whole:
                return await receive()
            now = time.monotonic()
            began = now if began is None else began
            allowed = self.settings.body_seconds + (most - left) / self.settings.body_rate
            try:
                async with asyncio.timeout(max(0.0, began + allowed - now)):
                    message = await receive()
            except TimeoutError:
                raise _too_slow(allowed) from None
            whole = not message.get("more_body", False)
            left -= len(message.get("body", b""))
            if left < 0:
                raise _too_large(most)
            return message

        return counted


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")


def _too_slow(seconds: float) -> ApiError:
    closing = {"Connection": "close"}  # the rest of the body is on its way, or never comes
    return ApiError(408, f"the body took longer than {seconds:.0f} s", code="body_too_slow", headers=closing)


def _name(host: str) -> str:
    """A Host header without its port; "" for one that is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # "[" begins an address that never ends
        return ""


def _place(origin: str) -> str:
    """The host and port of an Origin header; "" for one that is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
