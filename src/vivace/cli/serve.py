"""`vivace serve`: an HTTP server that speaks the OpenAI image and video API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vivace.errors import InputError


def serve(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[ALIAS=MODEL]...", help="Models; the built-in one if none is given.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="VIVACE_API_KEY", help="What clients have to send.")] = None,
    preset: Annotated[str, typer.Option(help="For requests that ask for no quality.")] = "exact",
    lora: Annotated[
        list[str] | None, typer.Option(help="ALIAS=FILE: a LoRA that requests may name; for every model.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 16,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that share a denoiser call.")] = 16,
    memory: Annotated[float | None, typer.Option(help="GiB of weights that stay loaded.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where video jobs are kept.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="A name this server also goes by.")] = None,
    a1111: Annotated[bool, typer.Option("--a1111", help="A small part of the A1111 API too.")] = False,
    ui: Annotated[bool, typer.Option("--ui", help="The web page too, at /ui.")] = False,
) -> None:
    """Serve pictures and videos over HTTP: POST /v1/images/generations and its kin."""
    # Before diffusers is imported: no model may bring code of its own.
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    try:
        from vivace.serve.http.run import run
        from vivace.serve.http.settings import Settings

        if ui:
            import gradio  # noqa: F401
    except ImportError as error:
        extra = "ui" if ui else "serve"
        raise InputError(f"serving needs {error.name}; install it with: pip install 'vivace[{extra}]'") from error
    from vivace.serve import Engine, Spec

    settings = Settings(
        host=host,
        port=port,
        api_key=api_key,
        folder=folder,
        a1111=a1111,
        ui=ui,
        allowed_hosts=tuple(allowed_host or ()),
    )
    loras = {alias: Path(path).expanduser() for alias, path in map(_pair, lora or ())}
    specs = {
        alias: Spec(source=source, preset=preset, loras=loras, dtype=dtype, device=device)
        for alias, source in map(_pair, models or ("builtin=builtin",))
    }
    budget = None if memory is None else int(memory * 2**30)
    engine = Engine(models=specs, queue=max_queue, threads=max_running, batch=max_batch, memory=budget)
    raise typer.Exit(run(engine, settings))


def _pair(text: str) -> tuple[str, str]:
    alias, equals, value = text.partition("=")
    if not (alias and equals and value):
        raise InputError(f"{text!r} is not ALIAS=VALUE; write it like sdxl=~/models/sdxl")
    return alias, value
