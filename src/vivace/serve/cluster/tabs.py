"""Open pages: gradio gives each of them one answer that goes on for as long as the page does, its heartbeat."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from vivace.serve.http.envelope import ApiError
from vivace.serve.ui.gate import AT

BEAT = f"{AT}/gradio_api/heartbeat/"


class Tabs:
    """Answers heartbeats with `app` until their end, which nobody's closing a page decides: a server has to end too."""

    def __init__(self) -> None:
        self._beats: set[asyncio.Task[None]] = set()
        self._over = False

    async def answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """One heartbeat, until the page is closed or `end`."""
        if self._over:
            # A browser does not come back after such an answer.
            await ApiError(503, "the server is closing", code="unavailable").response()(scope, receive, send)
            return
        beat = asyncio.ensure_future(app(scope, receive, send))
        self._beats.add(beat)
        try:
            await beat
        except asyncio.CancelledError:
            if not self._over:
                raise
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._beats.discard(beat)

    def end(self) -> None:
        """End all of them, and those to come at once."""
        self._over = True
        for beat in self._beats:
            beat.cancel()


def beats(scope: Scope) -> bool:
    """Whether a request is a page's heartbeat."""
    return scope["type"] == "http" and scope["path"].startswith(BEAT)
