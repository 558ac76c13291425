"""`vivace ui`: the web page, with the built-in model or any others."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from functools import partial
from typing import Annotated

import typer

from vivace.cli.serve import DRAIN, leave, planned


def ui(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[ALIAS=MODEL]...", help="Models; the built-in one if none is given.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 7860,
    api_key: Annotated[str | None, typer.Option(envvar="VIVACE_API_KEY", help="What the page asks for.")] = None,
    preset: Annotated[str, typer.Option(help="The one that is chosen at first.")] = "exact",
    lora: Annotated[list[str] | None, typer.Option(help="ALIAS=FILE: a LoRA to choose from; for every model.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    few_step: Annotated[bool, typer.Option("--few-step", help="Every model with its few-step student.")] = False,
    memory: Annotated[float | None, typer.Option(help="GiB of weights that stay loaded.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="A name this server also goes by.")] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """Open the web page: draw, edit and compare pictures. It is `vivace serve --ui`, with less to say."""
    plan = planned(
        models,
        lora,
        **{"preset": preset, "dtype": dtype, "device": device, "few_step": few_step, "memory": memory},
        **{"host": host, "allowed_hosts": tuple(allowed_host or ()), "drain_seconds": DRAIN[False], "ui": True},
    )
    from vivace.serve.http.run import run

    page = f"http://{_reached(host)}:{port}/ui/"
    settings = plan.settings(api_key=api_key, port=port)
    leave(run(plan.engine(), settings, ready=partial(_announce, page, show=show)))


def _reached(host: str) -> str:
    """The name by which a server that listens at `host` is reached from here."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{name}]" if ":" in name else name


def _has_screen() -> bool:
    # Elsewhere `webbrowser` may start one that takes the terminal.
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _announce(page: str, *, show: bool) -> None:
    """Say where the page is, and open it."""
    print(f"vivace: {page} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    if show and _has_screen():
        # In a thread: some browsers are waited for until they end.
        threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()
