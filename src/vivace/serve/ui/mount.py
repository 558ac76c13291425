"""Putting the page on a server."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr
from fastapi import FastAPI
from starlette.types import Scope

from vivace.errors import InputError
from vivace.serve.http.server import Server
from vivace.serve.ui.draw import Studio
from vivace.serve.ui.gate import AT, INPUTS, JOIN, SIGN_IN, Gate, below, welcomes
from vivace.serve.ui.inputs import Inputs, routes
from vivace.serve.ui.layout import page
from vivace.serve.ui.login import Login
from vivace.serve.ui.look import asset, theme

KEPT_BYTES = 512 * 2**20  # of pictures to edit


@dataclass(frozen=True)
class Mounted:
    """The page on its server."""

    login: Login

    def admits(self, scope: Scope) -> bool:
        """Whether the page's own sign-in stands in for the API key of a request."""
        return welcomes(scope) or (below(scope["path"]) and self.login.holds(scope))

    def takes_no_place(self, scope: Scope) -> bool:
        """Whether a request is let in while the queue is full: signing in, and events of the page, which says so."""
        return scope["path"] in (AT + JOIN, SIGN_IN)

    def loads(self, scope: Scope) -> bool:
        """Whether a request is for one of the page's dozens of parts, not for the page itself."""
        return scope["method"] == "GET" and below(scope["path"]) and scope["path"] not in (AT, f"{AT}/")


def mount(app: FastAPI, server: Server) -> Mounted:
    """Serve the page below /ui, and / leads to it. Raises InputError where no model makes pictures."""
    if not any(model.media == "image" for model in server.engine.models.values()):
        raise InputError("the page draws pictures, and none of these models makes any; give one that does")
    inputs, login = Inputs(seconds=server.settings.link_seconds, most_bytes=KEPT_BYTES), Login(server.settings)
    server.sweeps.append(inputs.kept.sweep)
    app.include_router(routes(inputs, path=INPUTS))
    app.include_router(login.routes(path=SIGN_IN, scope=AT))
    gr.mount_gradio_app(
        app,
        page(Studio(server, inputs)),
        AT,
        server_name=server.settings.host,
        server_port=server.settings.port,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=server.settings.most_upload,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=asset("page.css"),
    )
    app.add_middleware(Gate, holds=login.holds, form=login.form)
    return Mounted(login)
