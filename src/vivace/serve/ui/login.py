"""Signing in: a browser cannot send the API key as a header, so it gets a cookie for having known it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, Response
from starlette.types import Scope

from vivace.serve.http.envelope import ApiError
from vivace.serve.http.server import read_json
from vivace.serve.http.settings import Settings

COOKIE = "vivace"
SECONDS = 12 * 3600
PAGE = Path(__file__).parent / "assets" / "sign-in.html"


class Login:
    """Who is signed in. The cookie holds an expiry and its signature, of a secret that ends with the process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._secret = secrets.token_bytes(32)

    def holds(self, scope: Scope) -> bool:
        """Whether a request may see the page: it has a valid cookie, or no key is needed."""
        if self._settings.api_key is None:
            return True
        try:
            morsel = SimpleCookie(Headers(scope=scope).get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        expires, _, signature = (morsel.value if morsel else "").partition(".")
        if not (expires.isascii() and expires.isdigit() and len(expires) <= 12) or int(expires) < time.time():
            return False
        return hmac.compare_digest(self._sign(int(expires)).encode(), signature.encode())

    def form(self) -> Response:
        """The page that asks for the key."""
        return HTMLResponse(PAGE.read_text("utf-8"), 401)

    def routes(self, *, path: str, scope: str) -> APIRouter:
        """POST `path` with {"key": ...}; the cookie holds for paths under `scope`."""
        router = APIRouter()

        @router.post(path, include_in_schema=False)
        async def sign_in(request: Request) -> Response:
            given = (await read_json(request)).get("key")
            key = self._settings.api_key
            # JSON may carry halves of characters, which have no bytes of their own.
            raw = given.encode(errors="surrogatepass") if isinstance(given, str) else b""
            if key is None or not hmac.compare_digest(raw, key.encode()):
                raise ApiError(401, "that is not the key", code="invalid_api_key")
            expires = int(time.time()) + SECONDS
            answer = Response(status_code=204)
            answer.set_cookie(
                COOKIE,
                f"{expires}.{self._sign(expires)}",
                max_age=SECONDS,
                path=scope,
                httponly=True,
                samesite="strict",
                secure=request.url.scheme == "https",
            )
            return answer

        return router

    def _sign(self, expires: int) -> str:
        return hmac.new(self._secret, str(expires).encode(), hashlib.sha256).hexdigest()
