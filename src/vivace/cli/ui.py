"""`vivace ui`: the web page, with the built-in model or any others."""

from __future__ import annotations

import os
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from typing import Annotated

import typer

from vivace.cli.serve import serve


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
    address = f"http://{_reached(host)}:{port}"
    threading.Thread(target=_announce, args=(address,), kwargs={"show": show}, daemon=True).start()
    serve(
        models,
        host=host,
        port=port,
        api_key=api_key,
        preset=preset,
        lora=lora,
        dtype=dtype,
        device=device,
        few_step=few_step,
        memory=memory,
        allowed_host=allowed_host,
        ui=True,
    )


def _reached(host: str) -> str:
    """The name by which a server that listens at `host` is reached from here."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{name}]" if ":" in name else name


def _has_screen() -> bool:
    # Elsewhere `webbrowser` may start one that takes the terminal.
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _announce(address: str, *, show: bool) -> None:
    """Say where the page is, and open it, as soon as it is there."""
    while True:
        try:
            urllib.request.urlopen(f"{address}/livez", timeout=5).close()
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    print(f"vivace: {address}/ui/ (Ctrl-C ends it)", file=sys.stderr, flush=True)
    if show and _has_screen():
        webbrowser.open(f"{address}/ui/")
