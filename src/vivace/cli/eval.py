"""`vivace eval`: what a model's pictures are worth, in figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def eval(
    model: Annotated[str, typer.Argument(help="What to examine: builtin.")] = "builtin",
    captions: Annotated[int, typer.Option(help="Captions to draw.")] = 4000,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the model's own number where not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's own where not given.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the captions and the noise.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Examine the built-in model: caption accuracy with its interval, FID and KID in its reader's features."""
    from rich.console import Console
    from rich.progress import Progress

    from vivace.cli.generate import quiet
    from vivace.errors import InputError
    from vivace.load import find, load_source

    if model != "builtin":
        raise InputError(f"eval examines builtin, got {model!r}; only its world has a reader")
    if steps is not None and steps < 1:
        raise InputError(f"--steps must be 1 or more, got {steps}")
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise InputError(f"--json {json} cannot be written; name a file in a folder that exists")
    source = find(model)
    settings = {"steps": 28, **source.defaults}
    settings |= {name: value for name, value in (("steps", steps), ("guidance", guidance)) if value is not None}

    from vivace.builtin.reader import load_reader
    from vivace.evals import builtin
    from vivace.evals.metric import table, to_json
    from vivace.machine import machine

    exam = builtin.draw_exam(captions, seed=seed)
    call = {"guidance_scale": settings["guidance"]} if "guidance" in settings else {}
    with quiet(), Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        pipe = load_source(source, device=device)
        pipe.set_progress_bar_config(disable=True)
        reader = load_reader(device=pipe.device)
        task = progress.add_task("drawing", total=captions)
        answers = builtin.take(
            exam, pipe, reader, steps=settings["steps"], seed=seed,
            on_pictures=lambda done: progress.update(task, completed=done), **call,
        )  # fmt: skip
    rows = builtin.metrics(exam, answers, reader, seed=seed)
    if json is not None:
        about = {"command": f"vivace eval {model}", "captions": captions, **settings, "seed": seed}
        about |= {"device": str(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch."), "machine": machine()}
        json.write_text(to_json(rows, about=about) + "\n", encoding="utf-8")
    Console().print(table(rows, title=f"{model}: {captions:,} captions, {settings['steps']} steps"))
