"""`vivace calibrate`: fit step caches to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vivace.cli.command import command


def calibrate(
    model: Annotated[str, typer.Argument(help="builtin, a folder, a .safetensors file, or a hub id.")],
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt a line; builtin draws its own.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The calibration to write.")] = Path(
        "calibration.json"
    ),
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the model's own number where not given.")] = None,
    shares: Annotated[str, typer.Option(help="Shares of steps to compute, one plan for each.")] = "0.25,0.33,0.5,0.67",
    captions: Annotated[int, typer.Option(help="Captions that builtin draws.")] = 32,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's own where not given.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Width and height in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Of a video; the model's own where not given.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="A diffusers scheduler: euler, unipc, ...")] = None,
    seed: Annotated[int, typer.Option(help="Draws the noise, and which prompts are held out.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
) -> None:
    """Fit the Planned schedule, TeaCache's polynomial and FirstBlock's threshold to MODEL."""
    import json

    from vivace.cli.figures import call_of, check_writable, prompts_of, settings_of, status
    from vivace.cli.generate import quiet
    from vivace.load import find, load_source

    source = find(model)
    wanted = _shares(shares)
    check_writable(output, option="-o")
    settings = settings_of(source, steps=steps, guidance=guidance, seed=seed)
    texts = prompts_of(prompts, builtin=model == "builtin", captions=captions, seed=seed)
    call = call_of(source, settings, size=size, frames=frames)

    from vivace.cache.calibrate import calibrate as fit
    from vivace.scheduler import use_scheduler

    with quiet(), status() as tell:
        pipe = load_source(source, device=device)
        pipe.set_progress_bar_config(disable=True)
        if scheduler:
            use_scheduler(pipe, scheduler, prediction=source.prediction)
        found = fit(
            pipe, texts, steps=settings["steps"], shares=wanted, seed=seed,
            tell=tell, **call,
        )  # fmt: skip
    document = {"command": command(), "model": model, **found}
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _show(document, output)


def _shares(text: str) -> list[float]:
    from vivace.errors import InputError

    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share < 1 for share in found):
        raise InputError(f"--shares {text!r} are no shares between 0 and 1; write them like 0.33,0.5")
    return found


def _show(document: dict, output: Path) -> None:
    from rich.table import Table

    from vivace.cli.figures import show

    table = Table("cache", "computed", "error", "controls", title=f"{document['model']}: {document['steps']} steps")
    for row in document.get("planned", ()):
        controls = ", ".join(f"{name} {error:.3g}" for name, error in row["controls"].items())
        table.add_row("planned", f"{len(row['compute'])} of {row['steps']}", f"{row['error']:.3g}", controls)
    for row in document.get("firstblock", ()):
        said = f"{row['computed_percent']} %, threshold {row['threshold']:.3g}"
        table.add_row("firstblock", said, f"{row['error']:.3g}", f"even mask {row['even_mask']:.3g}")
    if "teacache" in document:
        table.add_row("teacache", "", f"R² {document['teacache']['r2']:.2f} on held-out prompts", "")
    for name, reason in document["refused"].items():
        table.add_row(name, "refused", reason, "")
    show(table)
    usable = [f"--cache {name}:file={output}" for name in ("planned", "firstblock", "teacache") if name in document]
    print(f"{output}  (use it with {' or '.join(usable)})")
