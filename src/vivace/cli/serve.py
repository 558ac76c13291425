"""`vivace serve`: an HTTP server that speaks the OpenAI image and video API."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from vivace.errors import InputError, install

if TYPE_CHECKING:
    from vivace.serve.plan import Plan

DRAIN = {False: 30.0, True: 600.0}
"""Seconds for what runs after SIGTERM, alone and on Ray, where a replica may be ended in the middle of a video."""


def serve(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[ALIAS=MODEL]...", help="Models; the built-in one if none is given.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="VIVACE_API_KEY", help="What clients have to send.")] = None,
    preset: Annotated[str, typer.Option(help="For requests that ask for no quality.")] = "exact",
    lora: Annotated[
        list[str] | None, typer.Option(help="ALIAS=FILE: a LoRA that requests may name; for every model.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    few_step: Annotated[bool, typer.Option("--few-step", help="Every model with its few-step student.")] = False,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 16,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that share a denoiser call.")] = 16,
    memory: Annotated[float | None, typer.Option(help="GiB of weights that stay loaded.")] = None,
    parked: Annotated[
        float | None, typer.Option(min=0, help="GiB of weights in host memory that had to leave; half of what is free.")
    ] = None,
    drain: Annotated[
        float | None, typer.Option(min=0, help="Seconds for what runs after SIGTERM: 30, with --ray 600.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where video jobs are kept.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="A name this server also goes by.")] = None,
    a1111: Annotated[bool, typer.Option("--a1111", help="A small part of the A1111 API too.")] = False,
    ui: Annotated[bool, typer.Option("--ui", help="The web page too, at /ui.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="On Ray Serve: several replicas behind one address.")] = False,
    address: Annotated[
        str | None, typer.Option(help="With --ray: a cluster that runs (auto: this machine's), not one of its own.")
    ] = None,
    replicas: Annotated[
        str | None, typer.Option(metavar="N or N-M", help="With --ray: how many, M when there is much to do; 1.")
    ] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="With --ray: of a replica; 1 where there are some.")] = None,
    cpus: Annotated[float | None, typer.Option(min=0.1, help="With --ray: of a replica; 1.")] = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="With --ray: Ray's dashboard, on 127.0.0.1; its token is in the log.")
    ] = False,
) -> None:
    """Serve pictures and videos over HTTP: POST /v1/images/generations and its kin."""
    only = {"address": address, "replicas": replicas, "gpus": gpus, "cpus": cpus, "dashboard": dashboard or None}
    stray = [f"--{name}" for name, value in only.items() if value is not None]
    if stray and not ray:
        raise InputError(f"{stray[0]} needs --ray; add it, or leave {stray[0]} out")
    plan = planned(
        models,
        lora,
        **{"preset": preset, "dtype": dtype, "device": device, "few_step": few_step},
        **{"host": host, "a1111": a1111, "ui": ui, "folder": str(folder) if folder else None},
        **{"allowed_hosts": tuple(allowed_host or ()), "drain_seconds": DRAIN[ray] if drain is None else drain},
        **{"max_running": max_running, "max_queue": max_queue, "max_batch": max_batch},
        **{"gpus": gpus, "cpus": cpus, "memory": memory, "parked": parked},
        **(_range(replicas) if replicas else {}),
    )
    if not ray:
        from vivace.serve.http.run import run

        leave(run(plan.engine(), plan.settings(api_key=api_key, port=port)))
    from vivace.serve.cluster.run import run as run_on_ray

    raise typer.Exit(run_on_ray(plan, api_key=api_key, port=port, address=address, dashboard=dashboard))


def leave(code: int) -> NoReturn:
    """End this process in order, but without waiting for what still loads, or for a device that does not answer.

    Python's own end would abort it where a thread is in native code.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def planned(models: Sequence[str] | None, lora: Sequence[str] | None, **fields: Any) -> Plan:
    """The plan of what was typed; None is what was not. Raises InputError, also for an extra that is not installed."""
    # Before diffusers is imported: no model may bring code of its own.
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    try:
        from vivace.serve.http import run  # noqa: F401
        from vivace.serve.plan import read_plan

        if fields["ui"]:
            import gradio  # noqa: F401
    except ImportError as error:
        extra = "ui" if fields["ui"] else "serve"
        raise InputError(f"serving needs {error.name}; install it with: {install(extra)}") from error
    typed = {name: value for name, value in fields.items() if value is not None}
    return read_plan({"models": _pairs(models or ("builtin=builtin",)), "loras": _pairs(lora or ()), **typed})


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    """`ALIAS=VALUE` each -> alias -> value. Raises InputError, also for an alias that stands for two things."""
    found: dict[str, str] = {}
    for text in texts:
        alias, equals, value = text.partition("=")
        if not (alias and equals and value):
            raise InputError(f"{text!r} is not ALIAS=VALUE; write it like sdxl=~/models/sdxl")
        if alias in found:
            raise InputError(f"the alias {alias} was given twice, for {found[alias]} and {value}; rename one")
        found[alias] = value
    return found


def _range(text: str) -> dict[str, int]:
    """`2` or `1-4` -> how many replicas there are at least and at most. Raises InputError."""
    low, dash, high = text.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()):
        raise InputError(f"--replicas {text!r} is neither a number nor a range; write it like 2 or 1-4")
    return {"replicas": int(low), **({"max_replicas": int(high)} if dash else {})}
